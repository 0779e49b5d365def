"""Code of the user's own: objectives, selection rules, graders and samplers.

An extension is named `package.module:attribute` in a recipe, or handed over as an object in Python. Its module is
imported from the recipe's folder, the current folder or whatever is installed. The hash of its source and its state is
part of the fingerprint of what it makes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

from dasd_lite.errors import ConfigError, DasdError, DataError

_FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_import_folders: list[str] = []


def is_extension(name: str) -> bool:
    """Return whether `name` has the form `package.module:attribute`."""
    return _FORM.fullmatch(name) is not None


def add_import_folder(folder: Path) -> None:
    """Let extensions be imported from `folder`, after everything that is installed."""
    path = str(folder.resolve())
    if path not in _import_folders:
        _import_folders.append(path)
    if path not in sys.path:
        sys.path.append(path)


def import_folders() -> tuple[str, ...]:
    """Return the folders that extensions are imported from, for processes that this one starts."""
    return tuple(_import_folders)


def load_extension(name: str, *, kind: str, key: str) -> Any:
    """Import the extension `name`.

    Args:
        name: `package.module:attribute`.
        kind: What it should be, for errors: objective, selection rule, grader or sampler.
        key: The recipe's key that names it, for errors.

    Raises:
        ConfigError: The module does not exist, fails while it is imported, or has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    importlib.invalidate_caches()  # the file may be newer than the first look into its folder
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's code may raise anything while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError) and _is_or_contains(error.name, module_name):
            problem = f"cannot be imported ({reason}); the module must be installed, or be in the recipe's"
            problem += " folder or the current folder"
        else:
            problem = f"cannot be imported, because its module {module_name!r} failed: {reason}"
        raise ConfigError(f"{key} = {name!r}: the {kind} {problem}") from error
    thing: Any = module
    for part in attribute.split("."):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            raise ConfigError(f"{key} = {name!r}: module {module_name!r} has no attribute {attribute!r}") from None
    return thing


def _is_or_contains(missing: str | None, module: str) -> bool:
    """Return whether the missing module is `module` itself or a package that it should be in."""
    return missing is not None and f"{module}.".startswith(f"{missing}.")


def check_callable(thing: Any, parameters: Sequence[str], *, kind: str, key: str, accepts_class: bool = False) -> None:
    """Refuse an extension that cannot be called with `parameters` (by position).

    Args:
        thing: The extension, or a method of it.
        parameters: Names of the arguments it will get.
        kind: What it should be, for errors.
        key: The recipe's key that names it, for errors.
        accepts_class: Whether it may be a class, so that the arguments are those of its constructor.

    Raises:
        ConfigError: It is not callable, is a class, or takes other parameters.
    """
    name = name_of(thing)
    wanted = f"({', '.join(parameters)})"
    if inspect.isclass(thing) and not accepts_class:
        raise ConfigError(f"{key}: {name} is a class; a {kind} is an instance or a function, called with {wanted}")
    if not callable(thing):
        raise ConfigError(f"{key}: {name} cannot be called; a {kind} is called with {wanted}")
    try:
        signature = inspect.signature(thing)
        signature.bind(*parameters)
    except ValueError:  # some built-in functions have no signature
        return
    except TypeError:
        raise ConfigError(f"{key}: {name}{signature} cannot be a {kind}; it is called with {wanted}") from None


@contextlib.contextmanager
def running(thing: Any, what: str) -> Iterator[None]:
    """Report an exception of the user's code as one line that names the place in that code.

    Our own errors and torch's (out of memory, the signal that ends a recomputation) are left as they are.

    Args:
        thing: The extension.
        what: Its kind and name, for the error.

    Raises:
        DataError: The code inside the `with` raised an exception.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DasdError) or type(error).__module__.partition(".")[0] == "torch":
            raise
        frames = list(traceback.extract_tb(error.__traceback__))
        with contextlib.suppress(TypeError):
            path = inspect.getsourcefile(inspect.unwrap(_definition(thing)))
            frames = [frame for frame in frames if frame.filename == path] or frames
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{what} failed: {reason} ({frames[-1].filename}:{frames[-1].lineno})") from error


def name_of(thing: Any) -> str:
    """Return `module:qualified name` of a function, class, module or object, as errors and manifests call it.

    An object is called by its class, and a partial by its function.
    """
    if inspect.ismodule(thing):
        return thing.__name__
    if isinstance(thing, functools.partial):
        return name_of(thing.func)
    definition = _definition(thing)
    return f"{definition.__module__}:{definition.__qualname__}"


def code_hash(thing: Any) -> str:
    """Hash what an extension computes: its source, its name, and its state.

    The source is the whole file that it is defined in; what that file imports does not count. The state of an object is
    its attributes; that of a partial its function and arguments; that of a function its defaults and the variables of
    the function around it. A text attribute `fingerprint` stands for the state.

    Raises:
        ConfigError: The source cannot be read, or the state has values that cannot be hashed.
    """
    description = json.dumps(_describe(thing, name_of(thing), ()))
    return hashlib.blake2b(description.encode(), digest_size=16).hexdigest()


def _definition(thing: Any) -> Any:
    """Return what has the source and the name of `thing`: itself, or the class of an object."""
    return thing if hasattr(thing, "__qualname__") or inspect.ismodule(thing) else type(thing)


def _describe(thing: Any, owner: str, outer: tuple[int, ...]) -> list[Any]:
    """Describe an extension, or code in its state, by JSON values."""
    if isinstance(thing, functools.partial):
        described: list[Any] = ["partial"]
    else:
        described = [name_of(thing), _source_hash(_definition(thing))]
    if inspect.ismodule(thing) or inspect.isclass(thing):
        return described
    fingerprint = getattr(thing, "fingerprint", None)
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise ConfigError(
            f"{name_of(thing)}.fingerprint has the type {type(fingerprint).__name__}; it must be a string"
        )
    if fingerprint is not None:
        return [*described, fingerprint, name_of(thing)]
    outer = (*outer, id(thing))
    if inspect.ismethod(thing):
        is_known = id(thing.__self__) in outer
        return [*described, [] if is_known else _describe(thing.__self__, name_of(thing.__self__), outer)]
    return [*described, [[name, _value(value, f"{owner}: {name}", outer)] for name, value in _state(thing)]]


def _state(thing: Any) -> list[tuple[str, Any]]:
    """Return the values apart from its source that decide what a function, partial or object computes."""
    if isinstance(thing, functools.partial):
        return [("function", thing.func), ("arguments", thing.args), ("keywords", thing.keywords)]
    if inspect.isfunction(thing):
        code = thing.__code__
        columns = [column for _, _, column, _ in code.co_positions() if column]
        return [
            ("place", [code.co_firstlineno, min(columns, default=0)]),  # a file may have several lambdas
            ("defaults", [thing.__defaults__, thing.__kwdefaults__]),
            *inspect.getclosurevars(thing).nonlocals.items(),
        ]
    slots = [name for base in type(thing).__mro__ for name in base.__dict__.get("__slots__", ())]
    values = {name: getattr(thing, name) for name in slots if hasattr(thing, name)} | getattr(thing, "__dict__", {})
    return sorted(values.items())


def _value(value: Any, where: str, outer: tuple[int, ...]) -> Any:
    """Describe a value of the state by JSON values, or raise ConfigError."""
    import numpy as np

    if id(value) in outer:
        return ["outer", outer.index(id(value))]
    within = (*outer, id(value))
    match value:
        case Enum():
            return ["enum", name_of(type(value)), value.name]
        case None | bool() | int() | float() | str():
            return value
        case bytes():
            return ["bytes", value.hex()]
        case PurePath():
            return ["path", str(value)]
        case re.Pattern():
            return ["pattern", _value(value.pattern, where, within), value.flags]
        case list() | tuple():
            return ["list", *(_value(item, where, within) for item in value)]
        case set() | frozenset():
            return ["set", *sorted((_value(item, where, within) for item in value), key=json.dumps)]
        case dict():
            items = [[_value(key, where, within), _value(item, where, within)] for key, item in value.items()]
            return ["dict", *sorted(items, key=json.dumps)]
        case np.dtype():
            return ["dtype", value.str]
        case np.ndarray() | np.generic() if not value.dtype.hasobject:
            data = hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
            return ["array", value.dtype.str, list(value.shape), data]
    if inspect.isbuiltin(value) and not inspect.ismodule(value.__self__):
        return ["method", value.__name__, _value(value.__self__, where, within)]
    if inspect.isbuiltin(value) or inspect.ismodule(value) or (inspect.isclass(value) and not _has_source(value)):
        return ["name", name_of(value)]
    is_code = hasattr(value, "__qualname__") or isinstance(value, functools.partial)
    if is_code or dataclasses.is_dataclass(value) or isinstance(getattr(value, "fingerprint", None), str):
        return _describe(value, where, outer)
    raise ConfigError(
        f"{where} is of type {name_of(type(value))}, which cannot be hashed, so a change in it would go unnoticed; give"
        f" {where.partition(': ')[0]} an attribute `fingerprint`, a string that changes with its results"
    )


def _has_source(definition: Any) -> bool:
    try:
        return inspect.getsourcefile(definition) is not None
    except TypeError:
        return False


def _source_hash(definition: Any) -> str:
    """Hash the file of a definition, or its own source where it was typed in."""
    definition = inspect.unwrap(definition)
    try:
        path = inspect.getsourcefile(definition)
        if path is not None and Path(path).is_file():
            source = Path(path).read_bytes()
        else:
            source = inspect.getsource(definition).encode()
    except (OSError, TypeError):
        raise ConfigError(
            f"{name_of(definition)}: its source cannot be read, so a change in it would go unnoticed; put it in a file"
        ) from None
    return hashlib.blake2b(source, digest_size=16).hexdigest()
