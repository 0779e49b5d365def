"""Write docs/options.md: every option of a recipe with its default and meaning, read from python/dasd_lite/config.

    python docs/make_options.py [--check]

`--check` writes nothing and fails if the file is not up to date; a test runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dasd_lite.config import evaluate, models, reading, stages, train

TABLES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("At the top", stages.RecipeConfig),
    ("[prompts]", stages.PromptsConfig),
    ("[prompts], [ingest] or [evaluate] columns = { … }", reading.Columns),
    ('[teacher] or [student], kind = "transformers"', models.Transformers),
    ('[teacher] or [student], kind = "vllm"', models.Vllm),
    ('[teacher], kind = "endpoint"', models.Endpoint),
    ("[teacher] prices = { … }", models.Prices),
    ("[teacher] budget = { … }", models.Budget),
    ('[teacher], kind = "package.module:Class"', models.CustomTeacher),
    ("[sample]", stages.SampleConfig),
    ("[ingest]", stages.IngestConfig),
    ("[mix]", stages.MixConfig),
    ("[score]", stages.ScoreConfig),
    ("[select]", stages.SelectConfig),
    ("[select] weighting = { … }", stages.Weighting),
    ("[pack]", stages.PackConfig),
    ("[train]", train.TrainConfig),
    ('[train] method = { kind = "lora" or "qlora", … }', train.Lora),
    ("[evaluate]", evaluate.EvaluateConfig),
    ("[evaluate] tasks = [{ … }]", evaluate.TaskConfig),
    ("[[phase]]", stages.Phase),
)
HEAD = """# Options

`make docs` writes this file from `python/dasd_lite/config/`; do not edit it. The table of any stage can stand at the
top of a recipe, where it holds for all phases. A `[[phase]]` can override any of its keys for itself:
`sample.temperature = 0.6`. Options marked with a star change how fast a stage runs but not its result, so they are not
part of its fingerprint.
"""


def main() -> None:
    """Write the file, or compare it with what would be written."""
    target = Path(__file__).parent / "options.md"
    text = HEAD + "".join(_table(title, model) for title, model in TABLES)
    if "--check" in sys.argv:
        if target.read_text(encoding="utf-8") != text:
            sys.exit(f"{target} is not up to date; run: make docs")
    else:
        target.write_text(text, encoding="utf-8")


def _table(title: str, model: type[BaseModel]) -> str:
    lines = [f"\n## {title}\n", (model.__doc__ or "").strip(), "", "| key | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        if field.description:
            mark = " *" if models.EXECUTION in field.metadata else ""
            choices = ", ".join(_choices(field))
            default = f"{_default(field.default)}{f' of {choices}' if choices else ''}"
            meaning = field.description.replace("\n", " ")
            lines.append(f"| `{name}`{mark} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    return f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    """Write a value as a recipe would."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(inner)}' for key, inner in value.items())} }}" if value else "{ }"
    return str(value)


def _choices(field: FieldInfo) -> Iterator[str]:
    """Yield the values of an option that has a list of them."""
    yield from (choice for choice in get_args(field.annotation) if isinstance(choice, str))
    for mark in field.metadata:
        if isinstance(mark, AfterValidator) and isinstance(mark.func, models.BuiltIn):
            yield from (*mark.func.names, "package.module:attribute")


if __name__ == "__main__":
    main()
