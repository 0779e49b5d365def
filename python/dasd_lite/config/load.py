"""Read a recipe file into a `RecipeConfig`, with every fault of it named at once.

Input: TOML with one table per stage, and `[[phase]]` tables that may override any key of any stage
table. Output: the resolved recipe. Invariant: a fault names file, line, key, the value found, and
what would be right; a key that no option has is answered with the nearest one of its table.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dasd_lite.config.explain import STAGE_TABLES, Location, Where, describe, joined, key_lines
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.errors import ConfigError

_DEMO = Path(__file__).parents[1] / "demo"


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> RecipeConfig:
    """Read `path` with `overrides` like `select.keep=2` on top; raises ConfigError with all faults.

    An override of a stage's key holds for every phase, also for those that set the key themselves;
    `low.select.keep=2` holds for phase `low` alone. Paths in the file are relative to the file's folder
    when they are there, else to the current one.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        raw = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `dasd-lite init demo` writes one") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; a recipe is a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    if not isinstance(phases := raw.get("phase", []), list) or not all(isinstance(p, dict) for p in phases):
        line = key_lines(text).get(("phase",), key_lines(text).get(("phase", 0), 1))
        raise ConfigError(f"{path}:{line}: phase: write each phase as a [[phase]] table")
    for override in overrides:
        _apply(raw, override)
    faults: list[str] = []
    names = [phase.get("name") for phase in phases]
    where = Where(path, key_lines(text), overrides, names)
    recipe = _resolve(raw, where, faults)
    if faults or recipe is None:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return _place_paths(recipe, path.parent)


def _resolve(raw: dict[str, Any], where: Where, faults: list[str]) -> RecipeConfig | None:
    """Validate every table once as written, then the phases with the tables laid under them."""
    phases = raw.get("phase", [])
    base = {name: raw[name] for name in STAGE_TABLES if name in raw}
    for name, table in base.items():
        _validate(Phase.model_fields[name].annotation, table, (name,), where, faults)
    top = {key: value for key, value in raw.items() if key not in STAGE_TABLES}
    top["phase"] = [_merge(base, phase) for phase in phases]
    if not phases:
        top.pop("phase")
    recipe: RecipeConfig | None = _validate(RecipeConfig, top, (), where, faults)
    return recipe


def _validate(model: Any, table: Any, at: Location, where: Where, faults: list[str]) -> Any:
    try:
        return model.model_validate(table)
    except ValidationError as error:
        for location, fault in joined(error.errors(include_url=False), at).items():
            if not where.told(location):
                faults.append(describe(fault, location, where))
        return None


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one table over another, key by key; a table with another `kind` replaces the one below."""
    merged = dict(base)
    for key, value in top.items():
        under = merged.get(key)
        if (
            isinstance(under, dict)
            and isinstance(value, dict)
            and under.get("kind") == value.get("kind", under.get("kind"))
        ):
            merged[key] = _merge(under, value)
        else:
            merged[key] = value
    return merged


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one `table.key=value` in the raw tables."""
    name, sign, value = override.partition("=")
    keys = name.strip().split(".")
    names = [phase.get("name") for phase in raw.get("phase", [])]
    if not sign or not all(keys) or keys[0] == "phase" or (len(keys) == 1 and keys[0] in names):
        raise ConfigError(f"{override!r}: an override looks like select.keep=2")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # text without quotes
    phases = [p for p in raw.get("phase", []) if isinstance(p, dict)]
    named = [p for p in phases if p.get("name") == keys[0]]
    tables = named if named else [raw, *(p for p in phases if keys[0] in p)] if keys[0] in STAGE_TABLES else [raw]
    for table in tables:
        _set(table, keys[1:] if named else keys, parsed, override)


def _set(table: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{override!r}: {key} is not a table")
    table[keys[-1]] = value


def _place_paths(recipe: RecipeConfig, folder: Path) -> RecipeConfig:
    """Make the paths of a recipe usable from the current folder.

    One that lies beside the recipe file is found there; `demo:` is the folder of the demo's files.
    """

    def placed(path: Path) -> Path:
        if str(path).startswith("demo:"):
            return _DEMO / str(path).removeprefix("demo:")
        return folder / path if not path.is_absolute() and (folder / path).exists() else path

    def model(table: Any) -> Any:
        if table is None or not table.model.startswith(("demo:", "./", "../")):
            return table
        path = placed(Path(table.model))
        found = path.exists() or table.model.startswith("demo:")
        return table.model_copy(update={"model": str(path)}) if found else table

    prompts = recipe.prompts.model_copy(update={"path": placed(recipe.prompts.path) if recipe.prompts.path else None})
    phases = []
    for phase in recipe.phase:
        ingest = phase.ingest.model_copy(update={"paths": [placed(p) for p in phase.ingest.paths]})
        questions = phase.evaluate.prompts
        evaluate = phase.evaluate.model_copy(update={"prompts": placed(questions) if questions else None})
        phases.append(phase.model_copy(update={"ingest": ingest, "evaluate": evaluate}))
    tables = {"prompts": prompts, "phase": phases, "teacher": model(recipe.teacher), "student": model(recipe.student)}
    return recipe.model_copy(update=tables)
