"""Which answers not to train on, and why: the paper's filters (section 6.3) over columns of answers.

Input: Arrow columns of texts and finish reasons, and numbers per answer. Output: for each filter the answers that fail
it, and the number that decided. Invariants: no loop over texts in Python; an answer's reason is the first filter in the
given order that it fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Texts = Any  # a LargeStringArray or StringArray, unknown to mypy
Flags = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float64]

_WHITE = "".join(c for c in map(chr, range(0x3001)) if c.isspace())  # RE2's \s has fewer
_BLANK = "".join(rf"\x{{{ord(c):x}}}" for c in _WHITE)
_CALLS = r"<tool_call>|<\|call\|>|<\|tool▁calls▁begin\|>|<function="
_FINISHED = ("stop", "unknown")  # "unknown": ingested text without a finish reason
_ENDINGS = {
    "function call": ("tool_calls",),
    "malformed channels": ("malformed",),
    "refused": ("refusal", "content_filter"),
    "truncated": ("length",),
}


class Filter(NamedTuple):
    """One reason not to train on an answer.

    Attributes:
        name: The reason.
        fails: True for the answers that fail; `[num_answers]`.
        value: The number that decided; `[num_answers]`.
    """

    name: str
    fails: Flags
    value: Values


def endings(finish_reasons: pa.StringArray, num_tokens: npt.NDArray[np.integer[Any]]) -> list[Filter]:
    """Return the filters by the reason why an answer ended; the value is its length in tokens."""
    value = num_tokens.astype(np.float64)
    by_reason = [Filter(name, _is_in(finish_reasons, reasons), value) for name, reasons in _ENDINGS.items()]
    known = [*_FINISHED, *(reason for reasons in _ENDINGS.values() for reason in reasons)]
    return [*by_reason, Filter("unfinished", ~_is_in(finish_reasons, known), value)]


def structure(texts: Texts) -> list[Filter]:
    """Return the filters for answers that are not one thinking part followed by a final answer.

    "no thinking": neither tag occurs, or nothing is between them. "no answer": the thinking part is not closed, or
    nothing follows it. "structure": the text does not begin with `<think>`, or a tag occurs more than once. The value
    is the number of `</think>`.
    """
    opened = _count(texts, "<think>")
    closed = _count(texts, "</think>")
    value = closed.astype(np.float64)
    begun = _matches(texts, rf"\A[{_BLANK}]*<think>")
    empty = _matches(texts, rf"\A[{_BLANK}]*<think>[{_BLANK}]*</think>")
    ends = _matches(texts, rf"</think>[{_BLANK}]*\z")
    nested = np.zeros(len(closed), dtype=bool)
    several = np.flatnonzero(opened > 1)  # few, so the slow pattern runs rarely
    if len(several):
        nested[several] = _matches(texts.take(pa.array(several)), r"(?s)<think>.*<think>.*</think>")
    return [
        Filter("no thinking", ((opened == 0) & (closed == 0)) | empty, value),
        Filter("no answer", (closed == 0) | ends, value),
        Filter("structure", ~begun | (closed > 1) | nested, value),
    ]


def function_calls(texts: Texts) -> Filter:
    """Return the filter for function calls that are written as text; the value is their number."""
    number = _numbers(pc.count_substring_regex(texts, _CALLS))
    return Filter("function call", number > 0, number.astype(np.float64))


def over(name: str, value: npt.NDArray[Any], limit: float) -> Filter:
    """Return the filter for values above a limit."""
    return Filter(name, value > limit, value.astype(np.float64))


def first_failed(filters: Sequence[Filter], number: int) -> tuple[list[str], list[float]]:
    """Return for each answer the name of the first filter that it fails ("" if it passes) and that filter's value."""
    names, values = np.full(number, "", dtype=object), np.zeros(number, dtype=np.float64)
    for name, fails, value in reversed(filters):
        names[fails], values[fails] = name, value[fails]
    return names.tolist(), values.tolist()


def _is_in(column: pa.StringArray, names: Sequence[str]) -> Flags:
    return np.asarray(pc.is_in(column, value_set=pa.array(names)).to_numpy(zero_copy_only=False), dtype=bool)


def _matches(texts: Texts, pattern: str) -> Flags:
    return np.asarray(pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False), dtype=bool)


def _count(texts: Texts, part: str) -> npt.NDArray[np.int64]:
    return _numbers(pc.count_substring_regex(texts, part))  # RE2 is faster than count_substring


def _numbers(column: Any) -> npt.NDArray[np.int64]:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.int64)
