"""Samplers from outside of this package: a class that the recipe names, or an object that Python code passes in.

Input: `teacher = { kind = "package.module:Class", options = { … } }`, or an object. Output: a sampler that has the
methods it needs, known before anything is sampled. `collect` checks the completions that it returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dasd_lite.config.extensions import check_callable, code_hash, load_extension, name_of
from dasd_lite.data.seeds import digest
from dasd_lite.errors import ConfigError, DasdError

if TYPE_CHECKING:
    from dasd_lite.chat.spelling import TokenIds
    from dasd_lite.config.models import CustomTeacher
    from dasd_lite.inference import Completion, Request, Sampler, SamplingParams
    from dasd_lite.inference.scorer import Scorer, Scores

_KEY = "teacher.kind"
_SAMPLER = {"complete": ("requests", "params"), "status": (), "close": ()}
_SCORER = {"score": ("sequences",), "status": (), "close": ()}


class Borrowed:
    """A sampler that Python code passed in. It stays open after a stage: whoever made it closes it."""

    def __init__(self, inner: Any) -> None:
        """Wrap the object."""
        self.inner = inner

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once."""
        completions: Iterator[Completion] = self.inner.complete(requests, params)
        return completions

    def score(self, sequences: Iterable[tuple[int, TokenIds]]) -> Iterator[Scores]:
        """Score each sequence once."""
        scores: Iterator[Scores] = self.inner.score(sequences)
        return scores

    def status(self) -> str:
        """Return what the object says."""
        return str(self.inner.status())

    def close(self) -> None:
        """Leave the object open."""


def sampler_name(sampler: Sampler) -> str:
    """Return `module:Class` of a sampler, as errors call it."""
    return name_of(type(sampler.inner if isinstance(sampler, Borrowed) else sampler))


def custom_source(model: CustomTeacher | Sampler) -> str:
    """Return the fingerprint of a custom sampler: of its code, and of its options or its `fingerprint` attribute."""
    from dasd_lite.config.models import Table

    if isinstance(model, Table):
        return digest(code_hash(load_custom(model)), model.options)
    fingerprint = getattr(model, "fingerprint", "")
    if not isinstance(fingerprint, str):
        raise ConfigError(
            f"teacher: {name_of(type(model))}.fingerprint is a {type(fingerprint).__name__}; it must be a string"
        )
    return digest(code_hash(type(model)), fingerprint)


def load_custom(model: CustomTeacher, *, scoring: bool = False) -> type[Any]:
    """Import the class that the recipe names, without creating the sampler.

    Args:
        model: The teacher table.
        scoring: Whether it must also score given answers (score.by = "teacher").

    Raises:
        ConfigError: It cannot be imported, lacks a method, or does not accept its options.
    """
    sampler_class = load_extension(model.kind, kind="sampler", key=_KEY)
    if not inspect.isclass(sampler_class):
        kind = type(sampler_class).__name__
        raise ConfigError(f"{_KEY} = {model.kind!r} is a {kind}; a sampler is named by its class")
    _check_methods(sampler_class, _KEY, scoring=scoring)
    try:
        inspect.signature(sampler_class).bind(**model.options)
    except TypeError as error:
        raise ConfigError(f"teacher.options: {model.kind} does not accept {model.options}: {error}") from error
    return sampler_class


def open_custom(model: CustomTeacher | Sampler, *, scoring: bool = False) -> Any:
    """Create the sampler that the recipe names, or wrap the object that was passed in.

    Raises:
        ConfigError: As `load_custom` does, or the class rejects the values of its options (ValueError).
    """
    from dasd_lite.config.models import Table

    if not isinstance(model, Table):
        _check_methods(model, "teacher", scoring=scoring)
        return Borrowed(model)
    try:
        return load_custom(model, scoring=scoring)(**model.options)
    except DasdError:
        raise
    except ValueError as error:
        raise ConfigError(f"teacher.options: {model.kind} does not accept {model.options}: {error}") from error


def open_custom_scorer(model: CustomTeacher | Sampler) -> tuple[Scorer, str]:
    """Open a custom sampler that also scores; return it and the folder or hub id of its tokenizer."""
    scorer = open_custom(model, scoring=True)
    inner = scorer.inner if isinstance(scorer, Borrowed) else scorer
    tokenizer = getattr(inner, "tokenizer", None)
    if not isinstance(tokenizer, str):
        raise ConfigError(
            f"score.by = 'teacher': {name_of(type(inner))} has no `tokenizer`, the folder or hub id of the tokenizer"
            " whose ids it scores"
        )
    return scorer, tokenizer


def _check_methods(thing: Any, key: str, *, scoring: bool) -> None:
    """Check the methods of a sampler or its class: that they exist and take the arguments they will get."""
    is_class = inspect.isclass(thing)
    name = name_of(thing if is_class else type(thing))
    if scoring and not hasattr(thing, "score"):
        raise ConfigError(f"score.by = 'teacher': {name} cannot score given answers; it has no method `score`")
    for method, parameters in (_SCORER if scoring else _SAMPLER).items():
        if not hasattr(thing, method):
            raise ConfigError(
                f"{key}: {name} has no method `{method}`; a sampler has complete(requests, params), status() and"
                " close()"
            )
        self = ("self",) if is_class else ()
        check_callable(getattr(thing, method), (*self, *parameters), kind=f"sampler's `{method}`", key=key)
