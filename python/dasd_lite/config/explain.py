"""Turns each mistake in a recipe or in options into one line: file, line, key, value, and what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

Location = tuple[str | int, ...]

_LONGEST = 100  # characters of a value in an error
_NO_TABLE = ("model_type", "model_attributes_type", "dict_type")
_NO_KIND = ("union_tag_not_found", "union_tag_invalid")


@dataclass(frozen=True)
class Places:
    """Where the keys of a recipe, or of a table that Python code makes, are written.

    Attributes:
        root: The type of the whole, in which locations begin.
        file: The recipe's file; empty for options that Python code gives.
        written: `file:line` or `command line` of each key that is written.
        phases: The names of the phases, as written.
        table: What stands before the names of keys; empty for a recipe.
    """

    root: type[BaseModel]
    file: str = ""
    written: Mapping[Location, str] = field(default_factory=dict)
    phases: Sequence[Any] = ()
    table: str = ""

    def of(self, keys: Location) -> str:
        """Return the place of a key, or of the innermost table around it that is written."""
        for end in range(len(keys), 0, -1):
            if keys[:end] in self.written:
                return self.written[keys[:end]]
            if keys[0] == "phase" and keys[2:end] in self.written:  # in a stage table that holds for all phases
                return self.written[keys[2:end]]
        return self.file

    def name(self, keys: Location) -> str:
        """Return a key as an override would write it: those of a phase begin with the phase's name."""
        parts = [f"[{key}]" if isinstance(key, int) else _key(key) for key in keys]
        phase = self.phases[int(keys[1])] if len(keys) > 1 and keys[0] == "phase" else None
        if isinstance(phase, str) and re.fullmatch(r"[a-z0-9][a-z0-9_-]*", phase):
            parts = [_key(phase), *parts[2:]] if len(keys) > 2 else [f"phase {_value(phase)}"]
        parts = [self.table, *parts] if self.table else parts
        return ".".join(parts).replace(".[", "[")


def explain(error: ValidationError, at: Location, places: Places) -> Iterator[tuple[Location, str]]:
    """Yield each mistake that pydantic reports for the table at `at`: its keys and its line."""
    for fault in error.errors(include_url=False):
        location = (*at, *fault["loc"])
        keys, types = _walk(location, places.root)
        written, text = _describe(fault, location, keys, types, places)
        place = places.of(written)
        yield keys, f"{place}: {text}" if place else text


def shorten(text: str) -> str:
    """Cut the middle out of a long text."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 20]}…{text[-20:]}"


def _describe(
    fault: Mapping[str, Any], location: Location, keys: Location, types: Sequence[Any], places: Places
) -> tuple[Location, str]:
    """Return the keys whose line is to be named, and what is wrong there."""
    kind, value, name = fault["type"], fault["input"], places.name(keys)
    if kind == "missing":
        return keys[:-1], f"{name} is missing: {_doc(location, places)}"
    if kind == "extra_forbidden":
        return keys, f"{name}: unknown key{_hint(location, keys, places)}"
    if kind in _NO_KIND and isinstance(value, Mapping):
        known = ", ".join(sorted(known for model in _tables(types) for known in _kinds(model)))
        if "kind" not in value:
            return keys, f"{name}.kind is missing: should be one of {known}"
        return (*keys, "kind"), f"{name}.kind = {_value(value['kind'])}: should be one of {known}"
    if kind in (*_NO_TABLE, *_NO_KIND):
        message = "should be a table of keys and values"
    elif kind == "path_type":
        message = "should be a path in quotes"
    else:
        message = re.sub("^Value error, |^(Input|List|String) (?=should)| after validation", "", str(fault["msg"]))
    if isinstance(value, Mapping) or not keys:  # several keys do not fit together
        return keys, f"{name}: {message}" if name else message
    return keys, f"{name} = {_value(value)}: {message}"


def _key(key: str) -> str:
    return shorten(key if re.fullmatch(r"[\w-]+", key) else repr(key))


def _value(value: Any) -> str:
    return shorten(repr(value))


def _hint(location: Location, keys: Location, places: Places) -> str:
    """Suggest a key instead of an unknown one: a similar key of the table, or the table that has this key."""
    key = str(location[-1])
    tables = _tables(_walk(location[:-1], places.root)[1])
    options = sorted({name for model in tables for name in model.model_fields})
    if near := difflib.get_close_matches(key, options, n=1, cutoff=0.6):
        return f"; did you mean {near[0]!r}?"
    around = _tables(_walk(location[:-2], places.root)[1]) if len(location) > 2 else []
    if tables and set(tables) < set(around):  # `location[-2]` says which table of a union
        others = sorted(kind for model in around if key in model.model_fields for kind in _kinds(model))
        if others:
            return f" of kind {' or '.join(_kinds(tables[0]))}; kind {' or '.join(others)} has it"
    return f"; {places.name(keys[:-1]) or 'the top level'} has {', '.join(options)}"


def _doc(location: Location, places: Places) -> str:
    """Return the sentences that document an option."""
    fields = [model.model_fields.get(str(location[-1])) for model in _tables(_walk(location[:-1], places.root)[1])]
    documented = (option.description for option in fields if option is not None and option.description)
    return " ".join(next(documented, "it has no default").split())


# --- the types behind a location ----------------------------------------------------------------------


def _walk(location: Location, root: type[BaseModel]) -> tuple[Location, list[Any]]:
    """Follow pydantic's location of a mistake through the tables below `root`.

    Returns:
        The keys, without the tags by which pydantic says which type of a union it took, and the types that the value
        there may have.
    """
    keys: list[str | int] = []
    branches: list[tuple[str | None, Any]] = [(None, root)]
    for part in location:
        if any(tag is not None for tag, _ in branches):
            branches = [(None, kind) for tag, kind in branches if tag == part]
        else:
            keys.append(part)
            branches = [branch for _, kind in branches for branch in _branches(_below(kind, part))]
    return tuple(keys), [kind for _, kind in branches]


def _branches(annotation: Any, tag: str | None = None) -> list[tuple[str | None, Any]]:
    """Return the types of a union, each with its tag; any other type is a union of one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        return _branches(inner, next((mark.tag for mark in marks if isinstance(mark, Tag)), tag))
    if origin in (Union, UnionType):
        return [branch for part in get_args(annotation) for branch in _branches(part, tag)]
    return [] if annotation in (None, NoneType) else [(tag, annotation)]


def _below(kind: Any, key: str | int) -> Any:
    """Return the type of the values under `key` in a table, list or dictionary; None if there is none."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        option = kind.model_fields.get(str(key))
        return None if option is None else option.annotation
    return get_args(kind)[-1] if get_origin(kind) in (list, dict) else None


def _tables(types: Sequence[Any]) -> list[type[BaseModel]]:
    return [kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _kinds(model: type[BaseModel]) -> list[str]:
    """Return the values that `kind` can have in a table of a union."""
    kinds = get_args(model.model_fields["kind"].annotation) or ("package.module:Class",)
    return [repr(kind) for kind in kinds]
