"""Code of the user's own: objectives, selection rules, graders and samplers.

An extension is named `package.module:attribute` in a recipe, or handed over as an object in Python. Its module is
imported from the recipe's folder, the current folder or whatever is installed. The hash of its source is part of the
fingerprint of what it makes.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dasd_lite.errors import ConfigError

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
        ConfigError: The module cannot be imported or has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    importlib.invalidate_caches()  # the file may be newer than the first look into its folder
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's code may raise anything while it is imported
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"{key} = {name!r}: the {kind} cannot be imported ({reason}); the module must be installed, or lie in the"
            " recipe's or the current folder"
        ) from error
    thing: Any = module
    for part in attribute.split("."):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            raise ConfigError(f"{key} = {name!r}: module {module_name!r} has no attribute {attribute!r}") from None
    return thing


def check_callable(thing: Any, parameters: Sequence[str], *, kind: str, key: str) -> None:
    """Refuse an extension that cannot be called with `parameters` (by position).

    Raises:
        ConfigError: It is not callable, or takes other parameters.
    """
    name = name_of(thing)
    wanted = f"({', '.join(parameters)})"
    if not callable(thing):
        raise ConfigError(f"{key}: {name} is a {type(thing).__name__}; a {kind} is called with {wanted}")
    try:
        signature = inspect.signature(thing)
        signature.bind(*parameters)
    except ValueError:  # some built-in functions have no signature
        return
    except TypeError:
        raise ConfigError(f"{key}: {name}{signature} cannot be a {kind}; it is called with {wanted}") from None


def name_of(thing: Any) -> str:
    """Return `module:qualified name` of a function, class, module or object, as errors and manifests call it."""
    if inspect.ismodule(thing):
        return thing.__name__
    definition = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{definition.__module__}:{definition.__qualname__}"


def code_hash(thing: Any) -> str:
    """Hash the source of an extension's module, or its own where it was typed in.

    A change anywhere in the file counts; a change in what the file imports does not.
    """
    definition = thing if hasattr(thing, "__qualname__") or inspect.ismodule(thing) else type(thing)
    path = inspect.getsourcefile(definition) if not inspect.isbuiltin(definition) else None
    if path is not None and Path(path).is_file():
        source = Path(path).read_bytes()
    else:
        try:
            source = inspect.getsource(definition).encode()
        except (OSError, TypeError):
            raise ConfigError(
                f"{name_of(thing)}: its source cannot be read, so results could not be told apart; put it in a file"
            ) from None
    return hashlib.blake2b(source + name_of(thing).encode(), digest_size=16).hexdigest()
