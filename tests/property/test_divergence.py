"""Sentence statistics and classes against the plain-Python reference; what bad columns get."""

import itertools
import math
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dasd_lite import _rust
from dasd_lite.errors import DataError
from dasd_lite.method import divergence
from dasd_lite.method.divergence import SentenceClass
from dasd_lite.method.sentences import sentence_ends

LOGPROBS = st.floats(-30, 0, width=32)
PROBABILITIES = st.one_of(st.floats(0, 1, width=32), st.just(math.nan))


Response: TypeAlias = tuple[bytes, list[float], list[int], list[int]]


@st.composite
def responses(draw: st.DrawFn) -> Response:
    """A text with white space, log-probabilities and byte lengths of tokens, and sentence ends over the same bytes."""
    token_bytes = draw(st.lists(st.integers(0, 5), max_size=25).filter(lambda lengths: not lengths or sum(lengths)))
    logprobs = draw(st.lists(LOGPROBS, min_size=len(token_bytes), max_size=len(token_bytes)))
    length = sum(token_bytes)
    raw = "".join(draw(st.lists(st.sampled_from(" \n\u3000\u2003a.é🎉"), min_size=length, max_size=length))).encode()
    ends = sorted({*draw(st.lists(st.integers(1, length), max_size=10)), length}) if length else []
    return raw[:length], logprobs, token_bytes, ends


def flat(rows: list[Any], dtype: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    return np.array([value for row in rows for value in row], dtype), np.cumsum([0, *map(len, rows)])


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(responses(), max_size=4), beta=st.floats(0, 0.5))
def test_stats_of_the_reference(rows: list[Response], beta: float) -> None:
    text, text_offsets = flat([row[0] for row in rows], np.uint8)
    logprobs, token_offsets = flat([row[1] for row in rows], np.float32)
    token_bytes, _ = flat([row[2] for row in rows], np.int32)
    ends, end_offsets = flat([row[3] for row in rows], np.int64)
    spans = _rust.sentence_spans(text, text_offsets, token_bytes, token_offsets, ends, end_offsets, None)
    inside = [
        [values[token] for token in tokens]
        for raw, values, lengths, edges in rows
        for tokens in reference.tokens_of_sentences(raw, 0, lengths, edges)
    ]
    assert np.diff(spans).tolist() == [len(tokens) for tokens in inside]
    assert spans[0] == 0 and spans.dtype == np.int64

    # The teacher as drawn; the student finds every token half as likely.
    student = logprobs - np.float32(math.log(2))
    stats = divergence.sentence_stats(logprobs, spans, student, spans, end_offsets, beta)
    assert [column.dtype.name for column in stats] == ["float32", "float32", "int8", "int64"]
    expected = [math.exp(math.fsum(tokens) / len(tokens)) if tokens else math.nan for tokens in inside]
    np.testing.assert_allclose(stats.p_teacher, expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(stats.p_student, np.array(expected) / 2, rtol=0, atol=2e-7)
    pairs = zip(stats.p_teacher.tolist(), stats.p_student.tolist(), strict=True)
    assert stats.classes.tolist() == [reference.classify(*pair, beta) for pair in pairs]
    assert stats.counts.tolist() == divergence.class_counts(stats.classes, end_offsets).tolist()


def test_a_word_belongs_to_its_own_sentence() -> None:
    """Byte-level BPE and SentencePiece write a word with the space before it, which ends the sentence before."""
    text, tokens = "Ok. Wait, no.\n\n  So", ["Ok", ".", " Wait", ",", " no", ".\n\n", " ", " So"]
    ends, token_bytes = sentence_ends(text), np.array([len(token) for token in tokens], np.int32)
    assert ends.tolist() == [4, 17, 19]
    edges = np.array([0, len(tokens)]), np.array([0, len(ends)])
    spans = divergence.sentence_spans(text, token_bytes, edges[0], ends, edges[1])
    assert [tokens[start:end] for start, end in itertools.pairwise(spans)] == [
        ["Ok", "."],
        [" Wait", ",", " no", ".\n\n", " "],  # white space alone is where it begins
        [" So"],
    ]
    logprobs = np.log(np.array([1, 0.81, 0.1, 1, 1, 1, 0.1, 0.5], np.float32))
    stats = divergence.sentence_stats(logprobs, spans, logprobs, spans, edges[1], 0.1)
    np.testing.assert_allclose(stats.p_teacher, [0.9, 0.01**0.2, 0.5], rtol=1e-6)


def test_tokens_that_cut_characters() -> None:
    text = "Ja 🎉! 好。ok"
    data = text.encode()
    ends = sentence_ends(text)
    token_bytes = np.ones(len(data), np.int32)  # a token per byte: most begin inside a character
    spans = divergence.sentence_spans(text, token_bytes, np.array([0, len(data)]), ends, np.array([0, len(ends)]))
    assert spans.tolist() == [0, *ends]


def test_a_text_that_the_template_opened() -> None:
    # "<think>\nA b.\nC." of which the first 8 bytes were written by no token.
    ends, token_bytes = np.array([8, 13, 15]), np.array([2, 3, 2, 0], np.int32)
    edges = np.array([0, 4]), np.array([0, 3])
    spans = divergence.sentence_spans("<think>\nA b.\nC.", token_bytes, edges[0], ends, edges[1], np.array([8]))
    assert spans.tolist() == [0, 0, 2, 4]
    logprobs = np.array([-1, -3, -0.5, -1.5], np.float32)
    stats = divergence.sentence_stats(logprobs, spans, logprobs[::-1], spans, edges[1], 0.1)
    np.testing.assert_allclose(stats.p_teacher, [math.nan, math.exp(-2), math.exp(-1)], rtol=1e-6)
    assert stats.classes.tolist() == [SentenceClass.NONE, SentenceClass.STUDENT, SentenceClass.TEACHER]
    assert stats.counts.tolist() == [[0, 1, 1]]


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


@given(
    rows=st.lists(st.lists(st.tuples(LOGPROBS, st.sampled_from([0, 0, 1, 5])), max_size=30), max_size=6),
    repeat=st.sampled_from([1, 1000]),  # long enough for numpy to sum in pairs
)
def test_mean_log_probability_of_answers(rows: list[list[tuple[float, int]]], repeat: int) -> None:
    rows = [row * repeat for row in rows]
    logprobs, offsets = flat([[logprob for logprob, _ in row] for row in rows], np.float32)
    token_bytes, _ = flat([[length for _, length in row] for row in rows], np.int32)
    means = divergence.mean_logprob(logprobs, token_bytes, offsets)
    assert means.dtype == np.float64
    for mean, row in zip(means, rows, strict=True):
        while row and row[-1][1] == 0:  # the end token is no part of the text
            row = row[:-1]
        spelled = np.array([logprob for logprob, _ in row], np.float32)
        assert math.isnan(mean) if len(spelled) == 0 else mean == np.mean(spelled, dtype=np.float64)


def test_mean_log_probability_at_the_edges() -> None:
    def mean(logprobs: list[float], token_bytes: list[int]) -> float:
        columns = np.array(logprobs, np.float32), np.array(token_bytes, np.int32)
        return float(divergence.mean_logprob(*columns, np.array([0, len(logprobs)]))[0])

    assert mean([-1, -3], [2, 1]) == -2
    assert mean([-1, -3, -9], [2, 1, 0]) == -2, "without the end token"
    assert mean([-1, -3, -9], [2, 0, 1]) == pytest.approx(-13 / 3), "a token without bytes inside the text counts"
    assert math.isnan(mean([], [])) and math.isnan(mean([-1], [0]))
    assert mean([-math.inf, -1], [1, 1]) == -math.inf
    empty = divergence.mean_logprob(np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(1, np.int64))
    assert empty.tolist() == []
    with pytest.raises(
        DataError, match="there are 2 logprobs and 1 token_bytes for 2 tokens; every token needs one of"
    ):
        mean([-1, -1], [1])


SPANS: dict[str, Any] = {  # of two responses of two tokens and two sentences each
    "text": pa.array(["abcde", "ab"]),
    "token_bytes": np.array([2, 3, 1, 1], np.int32),
    "token_offsets": np.array([0, 2, 4]),
    "ends": np.array([2, 5, 1, 2]),
    "end_offsets": np.array([0, 2, 4]),
    "first_bytes": np.array([0, 0]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"token_bytes": [2, 3, 1]},
            r"token_offsets\[2\] is 4, but there are 3 values; the last offset is their number",
        ),
        ({"token_bytes": [2, 3, 1, 7]}, "response 1: its tokens end at byte 8, its text at 2; they must agree"),
        ({"token_bytes": [2, 3, 3, -1]}, "response 1, token 1: its length is -1 bytes; lengths are at least 0"),
        ({"ends": [2, 5, 2, 2]}, "response 1: sentence end 1 is 2, after 2; ends strictly increase from 0"),
        ({"ends": [0, 5, 1, 2]}, "response 0: sentence end 0 is 0, after 0; ends strictly increase from 0"),
        ({"token_offsets": [0, 5, 4]}, r"token_offsets\[2\] is 4, less than the 5 before it; offsets never decrease"),
        ({"token_offsets": [0, 4]}, "token_offsets has 2 elements and end_offsets 3; they must be equally many"),
        ({"ends": [2, 4, 1, 2]}, "response 0: the last sentence ends at byte 4, the text has 5 bytes"),
        ({"end_offsets": [0, 2, 9]}, r"end_offsets\[2\] is 9, but there are 4 values"),
        ({"end_offsets": []}, "end_offsets is empty; offsets of n rows have n . 1 elements, the first 0"),
        ({"first_bytes": [0]}, "first_bytes has 1 elements and responses 2; they must be equally many"),
        ({"first_bytes": [0, -1]}, r"first_bytes\[1\] is -1; it must be at least 0"),
        ({"first_bytes": [1, 0]}, "response 0: its tokens end at byte 6, its text at 5; they must agree"),
    ],
)
def test_bad_spans(changes: dict[str, Any], message: str) -> None:
    divergence.sentence_spans(**SPANS)
    changed = {name: np.array(value, SPANS[name].dtype) for name, value in changes.items()}
    with pytest.raises(DataError, match=message):
        divergence.sentence_spans(**SPANS | changed)


STATS: dict[str, Any] = {
    "teacher_logprobs": np.array([-1, -2, -3], np.float32),
    "teacher_spans": np.array([0, 1, 3]),
    "student_logprobs": np.array([-1, -2], np.float32),
    "student_spans": np.array([0, 2, 2]),
    "response_offsets": np.array([0, 2]),
    "beta": 0.1,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_logprobs": [-1, -2, math.nan]}, r"teacher_logprobs\[2\] is NaN; it must be a log-probability"),
        ({"student_logprobs": [-1, math.inf]}, r"student_logprobs\[1\] is inf; it must be a log-probability: a number"),
        ({"student_logprobs": [0.5, -2]}, r"student_logprobs\[0\] is 0.5; it must be a log-probability: a number"),
        ({"teacher_spans": [0, 4, 3]}, r"teacher_spans\[2\] is 3, less than the 4 before it; offsets never decrease"),
        ({"teacher_spans": [1, 1, 3]}, r"teacher_spans\[0\] is 1; offsets start at 0"),
        ({"student_spans": [0, 2, 3]}, r"student_spans\[2\] is 3, but there are 2 values"),
        ({"student_spans": [0, 2]}, "teacher_spans has 3 elements and student_spans 2; they must be equally many"),
        ({"response_offsets": [0, 3]}, r"response_offsets\[1\] is 3, but there are 2 values"),
    ],
)
def test_bad_stats(changes: dict[str, Any], message: str) -> None:
    divergence.sentence_stats(**STATS)
    changed = {name: np.array(value, STATS[name].dtype) for name, value in changes.items()}
    with pytest.raises(DataError, match=message):
        divergence.sentence_stats(**STATS | changed)


def test_wrong_dtypes_and_shapes() -> None:
    with pytest.raises(TypeError, match="teacher_logprobs has dtype float64; it must be float32"):
        divergence.sentence_stats(**STATS | {"teacher_logprobs": STATS["teacher_logprobs"].astype(np.float64)})
    with pytest.raises(ValueError, match="beta is -1; it must be a number of at least 0"):
        divergence.sentence_stats(**STATS | {"beta": -1.0})
    with pytest.raises(TypeError, match="token_bytes has dtype int64; it must be int32"):
        divergence.sentence_spans(**SPANS | {"token_bytes": SPANS["token_bytes"].astype(np.int64)})
    with pytest.raises(ValueError, match=r"ends has shape \[2, 2\]; it must be one-dimensional"):
        divergence.sentence_spans(**SPANS | {"ends": SPANS["ends"].reshape(2, 2)})


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
