"""The filters over columns agree with a plain function of each text, white space of all kinds included."""

import re

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_lite.method import filters

CALLS = re.compile(r"<tool_call>|<\|call\|>|<\|tool▁calls▁begin\|>|<function=")
PIECES = [
    "<think>",
    "</think>",
    "a",
    "漢🙂",
    ".",
    "<",
    "think>",
    "\n",
    " ",
    "\t\r\v\f",
    "\x1c\x1f",
    "\x85\xa0",
    "\u2028\u3000",
]
texts = st.lists(st.lists(st.sampled_from(PIECES), max_size=9).map("".join) | st.text(max_size=20), max_size=30)
columns = st.sampled_from([pa.large_string(), pa.string()])


def has_structure(text):
    """One thinking part with text in it, followed by a final answer."""
    parts = text.split("</think>")
    return (
        len(parts) == 2
        and bool(re.fullmatch(r"\s*<think>(?!.*<think>).*\S.*", parts[0], re.DOTALL))
        and bool(parts[1].strip())
    )


def reason(text):
    """Return what is missing, in the order of the filters."""
    if "<think>" not in text and "</think>" not in text:
        return "no thinking"
    before, closing, _ = text.partition("</think>")
    if closing and before.strip().startswith("<think>") and not before.strip().removeprefix("<think>").strip():
        return "no thinking"
    if not closing or not text.rpartition("</think>")[2].strip():
        return "no answer"
    return "" if has_structure(text) else "structure"


@settings(max_examples=300, deadline=None)
@given(rows=texts, kind=columns)
def test_structure(rows, kind):
    failed, values = filters.first_failed(filters.structure(pa.array(rows, kind)), len(rows))
    assert failed == [reason(text) for text in rows]
    assert [not name for name in failed] == [has_structure(text) for text in rows]
    assert all(value == text.count("</think>") for name, value, text in zip(failed, values, rows, strict=True) if name)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from(["<tool_call>", "<|call|>", "<function=", "<|tool▁calls▁begin|>", "x", "<|"]))
    )
)
def test_function_calls(rows):
    joined = ["".join(row) for row in rows]
    calls = filters.function_calls(pa.array(joined, pa.large_string()))
    assert calls.value.tolist() == [len(CALLS.findall(text)) for text in joined]
    assert calls.fails.tolist() == [bool(CALLS.search(text)) for text in joined]


@given(
    rows=st.lists(
        st.sampled_from(["stop", "unknown", "length", "tool_calls", "malformed", "refusal", "content_filter", "?"])
    )
)
def test_endings(rows):
    names = {"stop": "", "unknown": "", "length": "truncated", "tool_calls": "function call"}
    names |= {"malformed": "malformed channels", "refusal": "refused", "content_filter": "refused", "?": "unfinished"}
    lengths = np.arange(len(rows))
    failed, values = filters.first_failed(filters.endings(pa.array(rows, pa.string()), lengths), len(rows))
    assert failed == [names[row] for row in rows]
    assert values == [float(n) if name else 0.0 for n, name in zip(lengths, failed, strict=True)]


def test_the_first_that_fails_is_the_reason():
    one, two = (filters.over(name, np.array([1, 5, 9]), limit) for name, limit in (("one", 6), ("two", 2)))
    assert filters.first_failed([one, two], 3) == (["", "two", "one"], [0.0, 5.0, 9.0])
    assert filters.first_failed([], 2) == (["", ""], [0.0, 0.0])
