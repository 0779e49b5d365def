"""A fault of a recipe as one line: file, line, key, the value found, and what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from dasd_lite.config.stages import Phase, RecipeConfig

STAGE_TABLES = tuple(name for name in Phase.model_fields if name not in ("name", "source"))


TOP_KEYS = (*RecipeConfig.model_fields, *STAGE_TABLES)


_KINDS = ("transformers", "vllm", "endpoint", "full", "lora", "qlora")


_UNIONS = ("gradient_checkpointing", "liger", "target_modules")  # keys behind which pydantic names the type it tried


Location = tuple[str | int, ...]


def joined(errors: Sequence[Mapping[str, Any]], at: Location) -> dict[Location, Mapping[str, Any]]:
    """Make one fault of those that pydantic finds in each type that a value may have."""
    found: dict[Location, Mapping[str, Any]] = {}
    for fault in errors:
        loc = (*at, *fault["loc"])
        location = tuple(key for i, key in enumerate(loc) if not (i and loc[i - 1] in _UNIONS and isinstance(key, str)))
        if location in found:
            also = str(fault["msg"]).removeprefix("Input should be ")
            found[location] = {**found[location], "msg": f"{found[location]['msg']} or {also}"}
        elif not any(other[: len(location)] == location for other in found):  # one type was nearly right
            found[location] = fault
    return found


def describe(fault: Mapping[str, Any], location: Location, where: Where) -> str:
    """Write one fault as `file:line: key = value: what would be right`."""
    keys = tuple(key for i, key in enumerate(location) if not _is_kind(location, i))
    name = where.name(keys)
    if fault["type"] == "extra_forbidden":
        return f"{where(keys)}: {name}: unknown key{_nearest(location, where.name(keys[:-1]))}"
    if fault["type"] == "missing":
        return f"{where(keys[:-1])}: {name} is missing; {_doc(keys)}"
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where(keys)}: {name} = {fault['input']!r}: should be a table of keys and values"
    if fault["type"] == "path_type":
        return f"{where(keys)}: {name} = {fault['input']!r}: should be text, a path"
    if fault["type"] in ("union_tag_not_found", "union_tag_invalid"):
        kind = fault["input"].get("kind")
        found = f"{name}.kind is missing" if kind is None else f"{name}.kind = {kind!r}"
        return f"{where(keys if kind is None else (*keys, 'kind'))}: {found}: should be one of {_kinds_of(keys)}"
    message = str(fault["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    if isinstance(fault["input"], Mapping) or not keys:
        return f"{where(keys)}: {name + ': ' if name else ''}{message}"
    return f"{where(keys)}: {name} = {fault['input']!r}: {message}"


def _is_kind(location: Location, i: int) -> bool:
    """Tell whether what stands there is no key, but which kind of table pydantic took it for."""
    return i > 0 and location[i] in _KINDS and location[i - 1] in ("student", "teacher", "method")


def _nearest(location: Location, table: str) -> str:
    """Say what may have been meant by a key that is unknown: another of the table, or one of another kind of it."""
    key = str(location[-1])
    options = _options_of(location[:-1])
    if near := difflib.get_close_matches(key, options, n=1, cutoff=0.6):
        return f"; did you mean {near[0]!r}?"
    if len(location) > 1 and _is_kind(location, len(location) - 2):
        kinds = [kind for model in _tables_at(location[:-2]) if key in model.model_fields for kind in _kinds([model])]
        if kinds:
            return f" of kind {location[-2]!r}; kind {' or '.join(map(repr, sorted(kinds)))} has it"
    return f"; {table or 'the top level'} has {', '.join(sorted(options))}"


def _options_of(location: Location) -> list[str]:
    """Return the keys that the table at `location` can have, over all kinds of it if none is named."""
    found = {name for model in _tables_at(location) for name in model.model_fields}
    return sorted(found) if location else list(TOP_KEYS)


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    own = dict(model.model_fields)
    return own | dict(Phase.model_fields) if model is RecipeConfig else own


def _tables_in(field: Any) -> list[type[BaseModel]]:
    """Return the models that a field's annotation is made of."""
    found: list[type[BaseModel]] = []
    waiting = [getattr(field, "annotation", field)]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        waiting += getattr(kind, "__args__", ())
    return found


def _kinds_of(keys: Location) -> str:
    """Return the values that `kind` can have in the table at `keys`."""
    return ", ".join(map(repr, sorted(_kinds(_tables_at(keys)))))


def _kinds(models: Sequence[type[BaseModel]]) -> set[str]:
    return {kind for model in models for kind in get_args(model.model_fields["kind"].annotation)}


def _doc(keys: Location) -> str:
    """Return the sentence that documents an option."""
    models = [RecipeConfig] if len(keys) == 1 else _tables_at(keys[:-1])
    for model in models:
        field = _fields(model).get(str(keys[-1]))
        if field is not None and field.description:
            return str(field.description)
    return {"phase": "write at least one [[phase]] table"}.get(str(keys[-1]), "it has no default")


def _tables_at(location: Location) -> list[type[BaseModel]]:
    models: list[type[BaseModel]] = [RecipeConfig]
    for i, key in enumerate(location):
        if _is_kind(location, i):
            models = [model for model in models if key in _kinds([model])]
        elif not isinstance(key, int):
            models = [inner for model in models for inner in _tables_in(_fields(model).get(str(key)))]
    return models


class Where:
    """Says where a key stands: file and line, or the command line."""

    def __init__(
        self, path: Path, lines: Mapping[Location, int], overrides: Sequence[str], names: Sequence[Any]
    ) -> None:
        """Hold the lines of a file's keys, the overrides and the names of the phases."""
        self._path, self._lines = path, lines
        self._overridden = {tuple(o.partition("=")[0].strip().split(".")) for o in overrides}
        self._names, self._told = names, set[Location]()

    def told(self, location: Location) -> bool:
        """Tell whether this fault was told already, of the table under the phases; remember it if not."""
        bare = without_phase(location)
        if bare != location and bare in self._told:
            return True
        self._told.add(location)
        return False

    def name(self, keys: Location) -> str:
        """Write keys as they are written in an override: those of a phase with its name."""
        parts = [f"[{key}]" if isinstance(key, int) else key for key in keys]
        named = self._names[int(keys[1])] if len(keys) > 1 and keys[0] == "phase" else None
        if isinstance(named, str) and re.fullmatch(r"[a-z0-9][a-z0-9_-]*", named):
            parts = [named, *parts[2:]] if len(keys) > 2 else [f"phase {named!r}"]
        return ".".join(parts).replace(".[", "[")

    def __call__(self, keys: Location) -> str:
        """Return `file:line` of a key."""
        bare = without_phase(keys)
        named = (self._names[int(keys[1])], *bare) if bare != keys else keys
        if any(key in (bare[: len(key)], named[: len(key)]) for key in self._overridden):
            return "command line"
        unwritten = keys not in self._lines and bare not in self._lines
        if unwritten and any(key[: len(named)] == named or key[: len(bare)] == bare for key in self._overridden):
            return "command line"
        for candidate in (keys, bare):
            for end in range(len(candidate), 0, -1):
                if candidate[:end] in self._lines and (end > 2 or candidate[0] != "phase" or end == len(candidate)):
                    return f"{self._path}:{self._lines[candidate[:end]]}"
        if keys[:2] in self._lines:
            return f"{self._path}:{self._lines[keys[:2]]}"
        return str(self._path)


def without_phase(keys: Location) -> Location:
    """Return the keys as they stand in the tables under the phases."""
    return keys[2:] if len(keys) > 2 and keys[0] == "phase" else keys


def key_lines(text: str) -> dict[Location, int]:
    """Return the line on which each key and each table of a TOML text stands."""
    lines: dict[Location, int] = {}
    counts: dict[str, int] = {}
    table: Location = ()
    quoted = False
    for number, line in enumerate(text.splitlines(), start=1):
        inside, quoted = quoted, quoted ^ (line.count('"""') % 2 == 1 or line.count("'''") % 2 == 1)
        if inside:
            continue
        if found := re.match(r"\s*\[\[\s*([\w.-]+)\s*\]\]", line):
            name = found.group(1)
            counts[name] = counts.get(name, -1) + 1
            table = (name, counts[name])
        elif found := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            first, *rest = found.group(1).split(".")
            table = (first, counts[first], *rest) if first in counts else (first, *rest)
        elif found := re.match(r"\s*([\w.-]+)\s*=", line):
            keys = (*table, *found.group(1).split("."))
            for end in range(len(table) + 1, len(keys) + 1):
                lines.setdefault(keys[:end], number)
            continue
        else:
            continue
        lines.setdefault(table, number)
    return lines
