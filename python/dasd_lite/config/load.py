"""Reads a recipe file into a `RecipeConfig` and reports every mistake in it at once.

Input: TOML with one table per stage, and `[[phase]]` tables that may override any key of any stage table.
Output: the resolved recipe. Each mistake is one line with file, line, key, value, and what would be right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from dasd_lite import _rust
from dasd_lite.config.chain import STAGES
from dasd_lite.config.engine import student_kind
from dasd_lite.config.explain import Location, Places, explain, shorten
from dasd_lite.config.extensions import add_import_folder
from dasd_lite.config.models import DEMO, CustomTeacher
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.errors import ConfigError

_MAX_BYTES = 1 << 20


_stages: dict[str, Any] = {stage: (Phase.model_fields[stage].annotation, None) for stage in STAGES}
_AsWritten = create_model("_AsWritten", __base__=RecipeConfig, **_stages)
"""A recipe as files write it: the tables of the stages at the top level hold for all phases."""


def load_recipe(path: str | PathLike[str], overrides: Sequence[str] = ()) -> RecipeConfig:
    """Read the recipe at `path`, with `overrides` like `select.keep=2` applied.

    An override of a stage's key holds for every phase, even if the phase sets the key itself; `low.select.keep=2` holds
    for the phase `low` alone. Relative paths in the file are relative to its folder if they exist there, otherwise to
    the current folder. Code that the recipe names can be imported from both folders afterward.

    Raises:
        ConfigError: The file cannot be read, or its recipe has mistakes; a line for each.
    """
    path = Path(path)
    draft = _read(path)
    for override in overrides:
        draft.override(override)
    recipe = draft.resolve()
    for folder in (path.parent, Path()) if recipe.extensions else ():
        add_import_folder(folder)
    return _use_paths(recipe, path.parent)


def _read(path: Path) -> _Draft:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES >> 20} MiB; a recipe is a short TOML file")
        values, lines = _parse(content.decode("utf-8"), path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `dasd-lite init demo` writes one") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; a recipe is a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{shorten(str(path))}: cannot be read: {error.strerror}") from None
    phases = values.get("phase", [])
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise ConfigError(f"{path}:{lines['phase',]}: phase: write each phase as a [[phase]] table")
    return _Draft(path, values, {keys: f"{path}:{line}" for keys, line in lines.items()})


def _parse(text: str, path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    try:
        return _rust.parse_toml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}:{error}") from None


@dataclass
class _Draft:
    """The tables of a recipe before validation, and where each key is written."""

    path: Path
    values: dict[str, Any]
    written: dict[Location, str]

    @property
    def phases(self) -> list[dict[str, Any]]:
        phases: list[dict[str, Any]] = self.values.get("phase", [])
        return phases

    def override(self, override: str) -> None:
        """Apply one `table.key=value`."""
        name, sign, text = override.partition("=")
        keys = _keys(name) if sign else ()
        names = (phase.get("name") for phase in self.phases)
        phases = {name: i for i, name in enumerate(names) if isinstance(name, str)}
        if not keys or keys[0] == "phase" or (len(keys) == 1 and keys[0] in phases):
            raise ConfigError(f"{shorten(repr(override))}: an override looks like select.keep=2")
        value = _toml_value(text)
        if keys[0] in phases:
            self._set(("phase", phases[keys[0]]), keys[1:], value, override)
            return
        self._set((), keys, value, override)
        for i, phase in enumerate(self.phases):
            if keys[0] in STAGES and keys[0] in phase:
                self._set(("phase", i), keys, value, override)

    def _set(self, above: Location, keys: Sequence[str], value: Any, override: str) -> None:
        table = self.phases[int(above[1])] if above else self.values
        for end, key in enumerate(keys[:-1], start=1):
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{shorten(repr(override))}: {shorten(repr(key))} is not a table")
            self.written.setdefault((*above, *keys[:end]), "command line")
        table[keys[-1]] = value
        replaced = (*above, *keys)
        self.written = {at: place for at, place in self.written.items() if at[: len(replaced)] != replaced}
        self.written[replaced] = "command line"

    def resolve(self) -> RecipeConfig:
        """Validate each stage table as written, then each phase with these tables below its own.

        Raises:
            ConfigError: A line for each mistake.
        """
        engine_line = self._choose_engine()
        names = [phase.get("name") for phase in self.phases]
        base = {stage: self.values[stage] for stage in STAGES if stage in self.values}
        places = Places(_AsWritten, str(self.path), self.written, names)
        mistakes: dict[Location, str] = {}
        for stage, table in base.items():
            try:
                Phase.model_fields[stage].annotation.model_validate(table)  # type: ignore[union-attr]
            except ValidationError as error:
                mistakes.update(explain(error, (stage,), places))
        values = {key: value for key, value in self.values.items() if key not in base}
        if names:
            values["phase"] = [_merge(base, phase) for phase in self.phases]
        try:
            recipe = RecipeConfig.model_validate(values)
        except ValidationError as error:
            for keys, line in explain(error, (), places):
                if keys[:1] != ("phase",) or keys[2:] not in mistakes:  # in a stage table, said once for all phases
                    mistakes[keys] = line
        if mistakes:
            raise ConfigError("\n".join(dict.fromkeys(mistakes.values())))
        recipe._engine_line = engine_line
        return recipe

    def _choose_engine(self) -> str:
        """Fill in student.kind where it is left out; return which and why, else ""."""
        student = self.values.get("student")
        if not isinstance(student, dict) or "kind" in student:
            return ""
        tables = (table.get("evaluate") for table in (self.values, *self.phases))
        evaluations = [table for table in tables if isinstance(table, dict)]
        kind, line = student_kind(student, evaluations, self.values.get("out"))
        self.values["student"] = {"kind": kind, **student}
        return line


def _keys(name: str) -> tuple[str, ...]:
    """Split `table.key`, which is written as in TOML; empty if it cannot be read."""
    try:
        value: Any = _rust.parse_toml(f"{name} = 0")[0]
    except ConfigError:
        return ()
    keys = []
    while isinstance(value, dict) and len(value) == 1:
        ((key, value),) = value.items()
        keys.append(key)
    return tuple(keys) if value == 0 else ()


def _toml_value(text: str) -> Any:
    """Read the value of an override; what is not TOML is text without quotes."""
    try:
        values = _rust.parse_toml(f"value = {text}")[0]
    except ConfigError:
        return text
    return values["value"] if len(values) == 1 else text


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one table over another, key by key; a table of another `kind` replaces the one below."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if (
            isinstance(below, dict)
            and isinstance(value, dict)
            and below.get("kind") == value.get("kind", below.get("kind"))
        ):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _use_paths(recipe: RecipeConfig, folder: Path) -> RecipeConfig:
    """Make the paths of a recipe usable from the current folder; `demo:` is the folder of the demo's files."""

    def usable(path: Path) -> Path:
        if str(path).startswith("demo:"):
            return DEMO / str(path).removeprefix("demo:")
        return folder / path if not path.is_absolute() and (folder / path).exists() else path

    def data(place: str) -> str:
        """Return a path of data, which may also be a pattern, or a place on the hub."""
        path = Path(place)
        if place.startswith("hf://") or path.is_absolute():
            return place
        is_below = any(folder.glob(place)) if re.search(r"[*?\[]", place) and not path.exists() else False
        return str(folder / path if is_below else usable(path))

    def model(table: Any) -> Any:
        if table is None or isinstance(table, CustomTeacher) or not table.model.startswith(("demo:", "./", "../")):
            return table
        path = usable(Path(table.model))
        is_local = path.exists() or table.model.startswith("demo:")
        return table.model_copy(update={"model": str(path)}) if is_local else table

    prompts = recipe.prompts.model_copy(update={"path": recipe.prompts.path and data(recipe.prompts.path)})
    phases = []
    for phase in recipe.phase:
        files, columns, asked = phase.ingest.paths, phase.pack.columns, phase.evaluate
        replayed = phase.pack.replay_from  # a folder, or the name of a phase
        if replayed is not None and recipe.replayed_phase(phase) is None:
            replayed = usable(replayed)
        stages = {
            "ingest": phase.ingest.model_copy(update={"paths": [data(path) for path in files]}),
            "pack": phase.pack.model_copy(update={"columns": columns and usable(columns), "replay_from": replayed}),
            "evaluate": asked.model_copy(
                update={
                    "prompts": asked.prompts and data(asked.prompts),
                    "tasks_folder": asked.tasks_folder and usable(asked.tasks_folder),
                }
            ),
        }
        phases.append(phase.model_copy(update=stages))
    tables = {"prompts": prompts, "phase": phases, "teacher": model(recipe.teacher), "student": model(recipe.student)}
    return recipe.model_copy(update=tables)
