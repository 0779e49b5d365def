"""Samplers from outside of this package: a class that the recipe names, or an object that Python code passes in.

Input: `teacher = { kind = "package.module:Class", options = { … } }`, or an object. Output: a sampler that is known to
have the methods it needs. Invariant: nothing that it returns is used unchecked; `collect` checks completions, `score`
below checks scores.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from dasd_lite.config.extensions import check_callable, code_hash, load_extension, name_of, running
from dasd_lite.data.seeds import digest
from dasd_lite.errors import ConfigError, DasdError, DataError
from dasd_lite.method.divergence import TOLERANCE

if TYPE_CHECKING:
    from dasd_lite.chat.spelling import TokenIds
    from dasd_lite.config.models import CustomTeacher
    from dasd_lite.inference import Completion, Request, Sampler, SamplingParams, Scorer, TokenScores

_KEY = "teacher.kind"
T = TypeVar("T")
_SAMPLER = {"complete": ("requests", "params"), "status": (), "close": ()}
_SCORER = {"score": ("sequences",), "status": (), "close": ()}


class CustomSampler:
    """A sampler from outside of this package."""

    def __init__(self, inner: Any, *, owned: bool) -> None:
        """Wrap the sampler; if it is not `owned`, it stays open after a stage, because whoever made it closes it."""
        self.inner, self._owned = inner, owned
        self.name = name_of(type(inner))

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once."""
        with self._running():
            completions: Iterator[Completion] = self.inner.complete(requests, params)
        return self._each(completions) if isinstance(completions, Iterable) else completions

    def score(self, sequences: Iterable[tuple[int, TokenIds]]) -> Iterator[TokenScores]:
        """Score each sequence once; raises DataError for scores that do not fit the sequences."""
        lengths: dict[int, int] = {}

        def noted() -> Iterator[tuple[int, TokenIds]]:
            for position, ids in sequences:
                lengths[position] = len(ids)
                yield position, ids

        with self._running():
            scores = self.inner.score(noted())
        if not isinstance(scores, Iterable):
            raise DataError(f"{self.name}.score returned {describe(scores)}, not an iterator of scores")
        for item in self._each(scores):
            if not isinstance(item, tuple) or len(item) != 3 or item[0] not in lengths:
                raise DataError(f"{self.name}.score returned {describe(item)}, not (open position, logprobs, ranks)")
            position, logprobs, ranks = item
            if problem := _score_problem(logprobs, ranks, lengths.pop(position)):
                raise DataError(f"{self.name}, scores of sequence {position}: {problem}")
            yield position, logprobs, ranks
        if lengths:
            raise DataError(f"{self.name}.score returned no scores for sequence {min(lengths)}")

    def _each(self, items: Iterable[T]) -> Iterator[T]:
        with self._running():
            yield from items

    def _running(self) -> AbstractContextManager[None]:
        return running(type(self.inner), f"sampler {self.name}")

    def status(self) -> str:
        """Return a few words for the progress line."""
        return str(self.inner.status())

    def close(self) -> None:
        """Close the sampler if it is owned."""
        if self._owned:
            self.inner.close()


def sampler_name(sampler: Sampler) -> str:
    """Return `module:Class` of a sampler, as errors call it."""
    return sampler.name if isinstance(sampler, CustomSampler) else name_of(type(sampler))


def custom_source(model: CustomTeacher | Sampler) -> str:
    """Return the fingerprint of a custom sampler: of its code, and of its options or its state."""
    from dasd_lite.config.models import Table

    if isinstance(model, Table):
        return digest(code_hash(load_custom(model)), model.options)
    _check_instance(model)
    return code_hash(model)


def _check_instance(model: object) -> None:
    """Raise ConfigError for what cannot be a sampler, whatever methods it has."""
    if inspect.isclass(model):
        raise ConfigError(f"teacher: {name_of(model)} is a class; a sampler is an instance of it")
    if isinstance(model, str | os.PathLike):
        raise ConfigError(
            f"teacher = {str(model)!r}: a teacher is a table (Endpoint, Vllm, Transformers, CustomTeacher) or a sampler"
            " of your own"
        )


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
        raise ConfigError(f"{_KEY} = {model.kind!r} is not a class; a sampler is named by its class")
    _check_methods(sampler_class, _KEY, scoring=scoring)
    try:
        inspect.signature(sampler_class).bind(**model.options)
    except TypeError as error:
        raise ConfigError(f"teacher.options: {model.kind} does not accept {model.options}: {error}") from error
    return sampler_class


def open_custom(model: CustomTeacher | Sampler, *, scoring: bool = False) -> CustomSampler:
    """Create the sampler that the recipe names, or wrap the object that was passed in.

    Raises:
        ConfigError: As `load_custom` does, or the class rejects the values of its options (ValueError or
            OSError).
    """
    from dasd_lite.config.models import Table

    if not isinstance(model, Table):
        _check_instance(model)
        _check_methods(model, "teacher", scoring=scoring)
        return CustomSampler(model, owned=False)
    try:
        return CustomSampler(load_custom(model, scoring=scoring)(**model.options), owned=True)
    except DasdError:
        raise
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"teacher.options: {model.kind} does not accept {model.options}: {reason}") from error


def open_custom_scorer(model: CustomTeacher | Sampler) -> tuple[Scorer, str]:
    """Open a custom sampler that also scores; return it and the folder or hub id of its tokenizer."""
    scorer = open_custom(model, scoring=True)
    tokenizer = getattr(scorer.inner, "tokenizer", None)
    if not isinstance(tokenizer, str):
        raise ConfigError(
            f"score.by = 'teacher': {scorer.name} has no `tokenizer`, the folder or hub id of the tokenizer whose ids"
            " it scores"
        )
    return scorer, tokenizer


def describe(value: object) -> str:
    """Return the type and the beginning of a value on one line, for errors."""
    text = " ".join(repr(value).split())
    return f"a {type(value).__name__} ({text[:60]}{'…' if len(text) > 60 else ''})"


def array_problem(name: str, value: object, dtype: npt.DTypeLike) -> str:
    """Return why a value is not a one-dimensional array of `dtype`, or ""."""
    if isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == 1:
        return ""
    actual = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    return f"{name} is {actual}, not a one-dimensional array of {np.dtype(dtype)}"


def logprob_problem(logprobs: npt.NDArray[np.float32], first: int = 0) -> str:
    """Return which log-probability, counted from `first`, is impossible, or ""."""
    wrong = ~np.isfinite(logprobs) | (logprobs > TOLERANCE)
    if not wrong.any():
        return ""
    index = int(wrong.argmax())
    return f"the log-probability of token {first + index} is {logprobs[index]:g}; it must be finite and at most 0"


def _score_problem(logprobs: Any, ranks: Any, length: int) -> str:
    for name, value, dtype in (("logprobs", logprobs, np.float32), ("ranks", ranks, np.int64)):
        if name == "ranks" and value is None:
            continue
        if problem := array_problem(name, value, dtype):
            return problem
        if len(value) != length:
            return f"{len(value)} {name} for {length} tokens"
    if not np.isnan(logprobs[:1]).all():
        return f"the log-probability of the first token is {logprobs[0]:g}; it must be NaN"
    return logprob_problem(logprobs[1:], first=1)


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
