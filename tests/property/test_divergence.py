"""Sentence statistics and classes against the plain-Python reference; what bad columns get."""

import math
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dasd_lite import divergence
from dasd_lite.divergence import SentenceClass
from dasd_lite.errors import DataError
from dasd_lite.text import sentence_ends

LOGPROBS = st.floats(-30, 0, width=32)
PROBABILITIES = st.one_of(st.floats(0, 1, width=32), st.just(math.nan))


@st.composite
def responses(draw: st.DrawFn) -> tuple[list[float], list[int], list[int]]:
    """Log-probabilities and byte lengths of tokens, and sentence ends over the same bytes."""
    token_bytes = draw(st.lists(st.integers(0, 5), max_size=25))
    logprobs = draw(st.lists(LOGPROBS, min_size=len(token_bytes), max_size=len(token_bytes)))
    length = sum(token_bytes)
    ends = sorted({*draw(st.lists(st.integers(1, length), max_size=10)), length}) if length else []
    return logprobs, token_bytes, ends


def flat(rows: list[Any], dtype: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    return np.array([value for row in rows for value in row], dtype), np.cumsum([0, *map(len, rows)])


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(responses(), max_size=4), dtype=st.sampled_from([np.int32, np.uint16]))
def test_means_of_the_reference(rows: list[tuple[list[float], list[int], list[int]]], dtype: Any) -> None:
    logprobs, token_offsets = flat([row[0] for row in rows], np.float32)
    token_bytes, _ = flat([row[1] for row in rows], dtype)
    ends, end_offsets = flat([row[2] for row in rows], np.int64)
    mean, num_tokens = divergence.sentence_logprobs(logprobs, token_bytes, token_offsets, ends, end_offsets)
    assert [mean.dtype.name, num_tokens.dtype.name] == ["float32", "int32"]
    inside = [tokens for row in rows for tokens in reference.sentence_logprobs(*row)]
    assert num_tokens.tolist() == [len(tokens) for tokens in inside]
    expected = [math.fsum(tokens) / len(tokens) if tokens else math.nan for tokens in inside]
    np.testing.assert_allclose(mean, np.array(expected, np.float64), rtol=2e-7, atol=1e-30)


def test_tokens_that_cut_characters() -> None:
    text = "Ja 🎉! 好。ok"
    data = text.encode()
    ends = sentence_ends(text)
    token_bytes = np.ones(len(data), np.uint16)  # a token per byte: most begin inside a character
    found = divergence.sentence_logprobs(
        np.full(len(data), -1, np.float32), token_bytes, np.array([0, len(data)]), ends, np.array([0, len(ends)])
    )
    assert found.num_tokens.tolist() == np.diff(ends, prepend=0).tolist()
    assert found.mean.tolist() == [-1.0] * len(ends)


@given(pairs=st.lists(st.tuples(PROBABILITIES, PROBABILITIES), max_size=30), beta=st.floats(0, 1))
def test_classes_of_the_reference(pairs: list[tuple[float, float]], beta: float) -> None:
    p_teacher, p_student = (np.array([pair[side] for pair in pairs], np.float32) for side in (0, 1))
    classes = divergence.classify_sentences(p_teacher, p_student, beta)
    assert classes.dtype == np.int8
    assert classes.tolist() == [reference.classify(*pair, beta) for pair in pairs]


def test_a_difference_of_beta_is_shared() -> None:
    p_teacher, p_student = np.array([0.75, 0.25, 0.5, np.nan], np.float32), np.array([0.5, 0.5, 0.5, 0.5], np.float32)
    classes = divergence.classify_sentences(p_teacher, p_student, 0.25)
    assert classes.tolist() == [SentenceClass.SHARED] * 3 + [SentenceClass.NONE]
    classes = divergence.classify_sentences(p_teacher, p_student, 0.24)
    assert classes.tolist() == [SentenceClass.TEACHER, SentenceClass.STUDENT, SentenceClass.SHARED, SentenceClass.NONE]


@given(rows=st.lists(st.lists(st.sampled_from(SentenceClass), max_size=10), max_size=5))
def test_counts_of_classes(rows: list[list[SentenceClass]]) -> None:
    classes, offsets = flat(rows, np.int8)
    counts = divergence.class_counts(classes, offsets)
    assert counts.shape == (len(rows), 3)
    assert counts.tolist() == [[row.count(SentenceClass(kind)) for kind in range(3)] for row in rows]


@given(logprobs=st.lists(LOGPROBS, max_size=50), num_bins=st.integers(1, 30))
def test_histogram(logprobs: list[float], num_bins: int) -> None:
    column = np.array(logprobs, np.float32)
    counts, edges = divergence.logprob_histogram(column, num_bins=num_bins, low=-16.0)
    assert counts.sum() == len(logprobs)
    assert (len(counts), len(edges), edges[0], edges[-1]) == (num_bins, num_bins + 1, -16.0, 0.0)
    if math.log2(num_bins).is_integer():  # edges without rounding: the same bins as numpy's
        assert counts.tolist() == np.histogram(np.maximum(column, -16), edges)[0].tolist()


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), q=st.lists(st.floats(0, 1), max_size=5)
)
def test_quantiles_of_numpy(values: list[float], q: list[float]) -> None:
    column = np.array(values, np.float32)
    expected = np.quantile(column.astype(np.float64), np.array(q, np.float64))
    np.testing.assert_allclose(divergence.quantiles(column, q), expected, rtol=1e-9, atol=1e-9)


def columns(**changes: Any) -> dict[str, Any]:
    """Two responses of two tokens and two sentences each."""
    good: dict[str, Any] = {
        "logprobs": np.array([-1, -2, -3, -4], np.float32),
        "token_bytes": np.array([2, 3, 1, 1], np.int32),
        "token_offsets": np.array([0, 2, 4]),
        "ends": np.array([2, 5, 1, 2]),
        "end_offsets": np.array([0, 2, 4]),
    }
    return good | {name: np.array(value, good[name].dtype) for name, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": [-1, -2, -3, math.nan]}, "response 1, token 1: log-probability NaN; it must be a number"),
        ({"logprobs": [-1, math.inf, -3, -4]}, "response 0, token 1: log-probability inf; it must be a number"),
        ({"logprobs": [-1, -2, 0.5, -4]}, "response 1, token 0: log-probability 0.5; it must be a number of at most 0"),
        (
            {"logprobs": [-1, -2, -3]},
            r"token_offsets\[2\] is 4, but there are 3 values; the last",
        ),
        ({"token_bytes": [2, 3, 1]}, "logprobs has 4 elements and token_bytes 3; they must be equally many"),
        ({"token_bytes": [2, 3, 1, 7]}, "response 1: its tokens have 8 bytes, its sentences 2; they must agree"),
        ({"token_bytes": [2, 3, 3, -1]}, "response 1, token 1: its length is -1 bytes; lengths are at least 0"),
        ({"ends": [2, 5, 2, 2]}, "response 1: sentence end 1 is 2, after 2; ends strictly increase from 0"),
        ({"ends": [0, 5, 1, 2]}, "response 0: sentence end 0 is 0, after 0; ends strictly increase from 0"),
        ({"token_offsets": [0, 5, 4]}, r"token_offsets\[2\] is 4, less than the 5 before it; offsets never decrease"),
        ({"token_offsets": [0, 4]}, "token_offsets has 2 elements and end_offsets 3; they must be equally many"),
        ({"end_offsets": [0, 2, 9]}, r"end_offsets\[2\] is 9, but there are 4 values"),
        ({"end_offsets": []}, "end_offsets is empty; offsets of n rows have n \\+ 1 elements"),
    ],
)
def test_bad_columns(changes: dict[str, Any], message: str) -> None:
    divergence.sentence_logprobs(**columns())
    with pytest.raises(DataError, match=message):
        divergence.sentence_logprobs(**columns(**changes))


def test_wrong_dtypes_and_shapes() -> None:
    good = columns()
    with pytest.raises(TypeError, match="logprobs has dtype float64; it must be float32"):
        divergence.sentence_logprobs(**good | {"logprobs": good["logprobs"].astype(np.float64)})
    with pytest.raises(TypeError, match="token_bytes has dtype int64; it must be int32 or uint16"):
        divergence.sentence_logprobs(**good | {"token_bytes": good["token_bytes"].astype(np.int64)})
    with pytest.raises(ValueError, match=r"ends has shape \[2, 2\]; it must be one-dimensional"):
        divergence.sentence_logprobs(**good | {"ends": good["ends"].reshape(2, 2)})


def test_other_bad_values() -> None:
    half = np.array([0.5, 0.5], np.float32)
    with pytest.raises(DataError, match=r"p_student\[1\] is 1.5; it must be a probability"):
        divergence.classify_sentences(half, np.array([0.5, 1.5], np.float32), 0.1)
    with pytest.raises(DataError, match="p_teacher has 2 elements and p_student 1; they must be equally many"):
        divergence.classify_sentences(half, half[:1], 0.1)
    with pytest.raises(ValueError, match="beta is NaN; it must be a number of at least 0"):
        divergence.classify_sentences(half, half, math.nan)
    with pytest.raises(DataError, match=r"classes\[1\] is 5; it must be a class, -1 to 2"):
        divergence.class_counts(np.array([0, 5], np.int8), np.array([0, 2]))
    with pytest.raises(DataError, match=r"logprobs\[1\] is 1; it must be a number of at most 0"):
        divergence.logprob_histogram(np.array([-1, 1], np.float32))
    with pytest.raises(ValueError, match="low is 1; it must be a finite number below 0"):
        divergence.logprob_histogram(half, low=1.0)
    with pytest.raises(ValueError, match="num_bins is 0; it must be"):
        divergence.logprob_histogram(half, num_bins=0)
    with pytest.raises(DataError, match=r"values\[0\] is NaN; it must be a number"):
        divergence.quantiles(np.array([np.nan], np.float32), [0.5])
    with pytest.raises(DataError, match=r"q\[0\] is 1.5; it must be from 0 to 1"):
        divergence.quantiles(half, [1.5])
    with pytest.raises(ValueError, match="the number of values is 0; it must be at least 1"):
        divergence.quantiles(half[:0], [0.5])
