"""Write docs/options.md: every option of a recipe with its type, default and meaning, read from config.py.

    python docs/make_options.py [--check]

`--check` writes nothing and fails when the file is not up to date; a test runs it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dasd_lite.config import models, train
from dasd_lite.config import stages as config

TABLES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("at the top", config.RecipeConfig),
    ("[prompts]", config.PromptsConfig),
    ('[teacher] or [student], kind = "transformers"', models.TransformersModel),
    ('[teacher] or [student], kind = "vllm"', models.VllmModel),
    ('[teacher], kind = "endpoint"', models.EndpointModel),
    ("[sample]", config.SampleConfig),
    ("[ingest]", config.IngestConfig),
    ("[score]", config.ScoreConfig),
    ("[select]", config.SelectConfig),
    ("[pack]", config.PackConfig),
    ("[train]", train.TrainConfig),
    ('[train] method = { kind = "lora" or "qlora", … }', train.Lora),
    ("[mix]", config.MixConfig),
    ("[evaluate]", config.EvaluateConfig),
    ("[[phase]]", config.Phase),
)
HEAD = """# Options

Written by `make docs` from `python/dasd_lite/config.py`; not by hand. Any stage table can stand at the top of a
recipe, for all phases, and any of its keys again in a `[[phase]]`, for that phase: `sample.temperature = 0.6`. Options
marked with a star change how fast a stage works, not what comes out, and are no part of its fingerprint.
"""


def main() -> None:
    """Write the file, or hold it against what would be written."""
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
            lines.append(
                f"| `{name}`{mark} | {_default(field.default)}{_choices(field.annotation)} | {field.description} |"
            )
    return "\n".join(line.replace("\n", " ") if line.startswith("|") else line for line in lines) + "\n"


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return f"`{value.model_dump()}`"
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else repr(value)}`"


def _choices(annotation: Any) -> str:
    options = [option for option in get_args(annotation) if isinstance(option, str)]
    return f" of {', '.join(options)}" if options else ""


if __name__ == "__main__":
    main()
