"""Which answers are not to be learnt from, and why: the paper's filters (section 6.3) over columns of answers.

Input: Arrow columns of texts and finish reasons, and numbers per answer. Output: per filter, which answers
fail it, and the number behind that. Invariants: no loop over texts in Python; an answer's reason is the
first filter that it fails, in the order in which they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Texts = Any  # a LargeStringArray or StringArray, which mypy does not know
Flags = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float64]

_WHITE = "".join(c for c in map(chr, range(0x3001)) if c.isspace())  # RE2's \s knows fewer
_BLANK = "".join(rf"\x{{{ord(c):x}}}" for c in _WHITE)
_CALLS = r"<tool_call>|<\|call\|>|<\|tool▁calls▁begin\|>|<function="
_FINISHED = ("stop", "unknown")  # "unknown": ingested text that does not say
_ENDINGS = {
    "function call": ("tool_calls",),
    "malformed channels": ("malformed",),
    "refused": ("refusal", "content_filter"),
    "truncated": ("length",),
}


class Filter(NamedTuple):
    """One reason not to learn from an answer."""

    name: str
    fails: Flags
    """[N]."""
    value: Values
    """[N]: the number behind it."""


def endings(finish_reasons: pa.StringArray, num_tokens: npt.NDArray[np.integer[Any]]) -> list[Filter]:
    """Return the filters by why an answer ended; the value is its length in tokens."""
    value = num_tokens.astype(np.float64)
    found = [Filter(name, _is_in(finish_reasons, names), value) for name, names in _ENDINGS.items()]
    known = [*_FINISHED, *(name for names in _ENDINGS.values() for name in names)]
    return [*found, Filter("unfinished", ~_is_in(finish_reasons, known), value)]


def structure(texts: Texts) -> list[Filter]:
    """Return the filters of a thinking part and a final answer behind it.

    "no thinking": neither tag is there, or nothing between them. "no answer": the thought is not closed, or nothing is
    behind it. "structure": the text does not begin with `<think>`, or a tag is there more than once. The value is the
    number of `</think>`.
    """
    opened = _count(texts, "<think>")
    closed = _count(texts, "</think>")
    value = closed.astype(np.float64)
    begun = _matches(texts, rf"\A[{_BLANK}]*<think>")
    empty = _matches(texts, rf"\A[{_BLANK}]*<think>[{_BLANK}]*</think>")
    ends = _matches(texts, rf"</think>[{_BLANK}]*\z")
    nested = np.zeros(len(closed), dtype=bool)
    several = np.flatnonzero(opened > 1)  # few: the slow pattern is for these alone
    if len(several):
        nested[several] = _matches(texts.take(pa.array(several)), r"(?s)<think>.*<think>.*</think>")
    return [
        Filter("no thinking", ((opened == 0) & (closed == 0)) | empty, value),
        Filter("no answer", (closed == 0) | ends, value),
        Filter("structure", ~begun | (closed > 1) | nested, value),
    ]


def function_calls(texts: Texts) -> Filter:
    """Return the filter of calls written as text; the value is their number."""
    number = _numbers(pc.count_substring_regex(texts, _CALLS))
    return Filter("function call", number > 0, number.astype(np.float64))


def over(name: str, value: npt.NDArray[Any], limit: float) -> Filter:
    """Return the filter of a number that must not be over a limit."""
    return Filter(name, value > limit, value.astype(np.float64))


def first_failed(filters: Sequence[Filter], number: int) -> tuple[list[str], list[float]]:
    """Return per answer the name of the first filter that it fails, "" for none, and the value there."""
    names, values = np.full(number, "", dtype=object), np.zeros(number, dtype=np.float64)
    for name, fails, value in reversed(filters):
        names[fails], values[fails] = name, value[fails]
    return names.tolist(), values.tolist()


def _is_in(column: pa.StringArray, names: Sequence[str]) -> Flags:
    return np.asarray(pc.is_in(column, value_set=pa.array(names)).to_numpy(zero_copy_only=False), dtype=bool)


def _matches(texts: Texts, pattern: str) -> Flags:
    return np.asarray(pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False), dtype=bool)


def _count(texts: Texts, part: str) -> npt.NDArray[np.int64]:
    return _numbers(pc.count_substring_regex(texts, part))  # RE2 finds a plain text faster than count_substring


def _numbers(column: Any) -> npt.NDArray[np.int64]:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.int64)
