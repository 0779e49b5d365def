"""The method's formulas: probability and class of sentences, counts of classes, mean log-probability of answers.

Input and output: flat numpy columns, with int64 offsets where rows are of unequal length. Nothing is changed in place,
and the same input gives the same output. Invariant: the probability of a sentence is exp(mean log-probability of its
tokens), each model on its own tokens; a sentence without tokens has probability NaN, no class, and is not counted.

The loops over tokens and sentences are in Rust (`rust/core/src/stats.rs`) and run without the GIL; Ctrl-C stops them.
Log-probabilities are natural logarithms; token lengths and sentence ends are in bytes of the UTF-8 text.
"""

import math
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dasd_lite import _rust
from dasd_lite.errors import DataError
from dasd_lite.method.ragged import check_array
from dasd_lite.method.sentences import TextColumn, sentence_ends, text_column

TOLERANCE = 1e-4
"""Nats by which rounding may lift a log-probability above 0."""


class SentenceClass(IntEnum):
    """Which model finds a sentence more probable; int8 columns hold the values."""

    NONE = -1
    """One of the models has no token in it."""
    SHARED = 0
    """The two probabilities differ by at most β."""
    TEACHER = 1
    """p_T - p_S > β."""
    STUDENT = 2
    """p_S - p_T > β."""


class SentenceStats(NamedTuple):
    """Probability of each sentence under both models, and its class.

    Attributes:
        p_teacher: exp(mean log-probability) under the teacher, NaN without tokens; float32 `[num_sentences]`.
        p_student: The same under the student.
        classes: Values of `SentenceClass`; int8 `[num_sentences]`.
        counts: Sentences of each class in each response, as `class_counts` returns them; int64 `[num_responses, 3]`.
    """

    p_teacher: NDArray[np.float32]
    p_student: NDArray[np.float32]
    classes: NDArray[np.int8]
    counts: NDArray[np.int64]


def sentence_spans(
    text: "str | bytes | TextColumn",
    token_bytes: NDArray[np.int32],
    token_offsets: NDArray[np.int64],
    ends: NDArray[np.int64],
    end_offsets: NDArray[np.int64],
    first_bytes: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Return which tokens of one model belong to which sentence.

    A token belongs to the sentence of its first byte that is not white space: most tokenizers write a word with the
    space before it (" Wait"), and that space is the last byte of the sentence before. A token of white space alone
    belongs to the sentence of its first byte. A token without bytes belongs to the sentence of the next byte; one after
    the last byte (an end-of-text token, say) belongs to the last sentence.

    Args:
        text: One text, or a column with one text per response.
        token_bytes: Length of each token in bytes of the text; int32 `[num_tokens]`.
        token_offsets: Response r has tokens `token_offsets[r]` to `token_offsets[r + 1]`; int64 `[num_responses + 1]`.
        ends: Sentence ends in bytes from the response's start, as `sentence_ends` returns them; int64
            `[num_sentences]`.
        end_offsets: Response r has sentences `end_offsets[r]` to `end_offsets[r + 1]`; int64 `[num_responses + 1]`.
        first_bytes: Where the first token of each response begins, for texts with a beginning that no token wrote (the
            `<think>` of a chat template); int64 `[num_responses]`. None: at 0.

    Returns:
        Sentence s has the tokens `spans[s]` to `spans[s + 1]`; int64 `[num_sentences + 1]`.

    Raises:
        DataError: The tokens of a response have more or fewer bytes than its text; ends do not increase to the text's
            length; a response has tokens but no sentence; offsets do not fit. Names response, index and value.
        TypeError: A wrong dtype.
        ValueError: An array is not one-dimensional.

    Source: the DASD report (arXiv 2601.09088, §4) compares sentences, since teacher and student have different
    vocabularies; byte offsets are what two tokenizers have in common.
    """
    return _rust.sentence_spans(
        *text_column(text),
        check_array("token_bytes", token_bytes, np.int32),
        check_array("token_offsets", token_offsets, np.int64),
        check_array("ends", ends, np.int64),
        check_array("end_offsets", end_offsets, np.int64),
        None if first_bytes is None else check_array("first_bytes", first_bytes, np.int64),
    )


def sentence_stats(
    teacher_logprobs: NDArray[np.float32],
    teacher_spans: NDArray[np.int64],
    student_logprobs: NDArray[np.float32],
    student_spans: NDArray[np.int64],
    response_offsets: NDArray[np.int64],
    beta: float,
) -> SentenceStats:
    """Return the probability of each sentence under both models, its class, and the counts of each response.

    The probability is exp(mean log-probability of the tokens of the sentence), each model on its own tokens.
    Sums are kept in float64; a probability is within 1e-7 of the exact one. Every processor and every number of threads
    gives the same bytes.

    Args:
        teacher_logprobs: Log-probability of each of the teacher's tokens given those before it, at most 0 (up to 1e-4
            above is accepted as rounding); float32 `[num_teacher_tokens]`.
        teacher_spans: The tokens of each sentence, as `sentence_spans` returns them; int64 `[num_sentences + 1]`.
        student_logprobs: The same for the student's tokens; float32 `[num_student_tokens]`.
        student_spans: The same for the student's tokens; int64 `[num_sentences + 1]`.
        response_offsets: Response r has sentences `response_offsets[r]` to `response_offsets[r + 1]`; int64
            `[num_responses + 1]`.
        beta: Least difference of the two probabilities of a Teacher or Student sentence; the companion paper uses 0.1.

    Returns:
        Probabilities and classes of all sentences of all responses in order, and counts per response.

    Raises:
        DataError: A log-probability is NaN or positive; spans or offsets do not fit. Names index and value.
        TypeError: A wrong dtype.
        ValueError: `beta` is negative or NaN, or an array is not one-dimensional.

    Source: DASD report (arXiv 2601.09088, §4): the geometric mean of the token probabilities of a sentence.
    """
    return SentenceStats(
        *_rust.sentence_stats(
            check_array("teacher_logprobs", teacher_logprobs, np.float32),
            check_array("teacher_spans", teacher_spans, np.int64),
            check_array("student_logprobs", student_logprobs, np.float32),
            check_array("student_spans", student_spans, np.int64),
            check_array("response_offsets", response_offsets, np.int64),
            beta,
        )
    )


def classify_sentences(p_teacher: NDArray[np.float32], p_student: NDArray[np.float32], beta: float) -> NDArray[np.int8]:
    """Return the class of each sentence.

    Args:
        p_teacher: Probability of each sentence under the teacher, NaN without tokens; float32 `[num_sentences]`.
        p_student: The same under the student.
        beta: Least difference of a Teacher or Student sentence, at least 0; the companion paper uses 0.1.

    Returns:
        Values of `SentenceClass`; int8 `[num_sentences]`. Differences are computed in float64; one of exactly `beta` is
        Shared.

    Raises:
        DataError: The columns are not equally long, or a value is not a probability; names its index.
        TypeError: A wrong dtype.
        ValueError: `beta` is negative or NaN, or an array is not one-dimensional.

    Source: companion paper of the DASD report (arXiv 2512.20908), its tests in their order, without the class Boosted,
    which needs the distilled model.
    """
    return _rust.classify(
        check_array("p_teacher", p_teacher, np.float32), check_array("p_student", p_student, np.float32), beta
    )


def class_counts(classes: NDArray[np.int8], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the sentences of each class in each response.

    Args:
        classes: Values of `SentenceClass`; int8 `[num_sentences]`.
        offsets: Response r has sentences `offsets[r]` to `offsets[r + 1]`; int64 `[num_responses + 1]`.

    Returns:
        int64 `[num_responses, 3]`; column c counts `SentenceClass(c)`: Shared, Teacher, Student. Sentences without a
        class are not counted.

    Raises:
        DataError: A value is not a class, or the offsets do not fit; names index and value.
        TypeError: A wrong dtype.
        ValueError: An array is not one-dimensional.
    """
    return _rust.class_counts(check_array("classes", classes, np.int8), check_array("offsets", offsets, np.int64))


def mean_logprob(
    logprobs: NDArray[np.float32], token_bytes: NDArray[np.int32], offsets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the mean log-probability of the tokens that spell each answer, summed in float64.

    Tokens after the text (the end token) are left out: they have no bytes of it.

    Args:
        logprobs: Log-probability of each token; float32 `[num_tokens]`.
        token_bytes: Length of each token in bytes of the text; int32 `[num_tokens]`.
        offsets: Answer a has tokens `offsets[a]` to `offsets[a + 1]`; int64 `[num_answers + 1]`.

    Returns:
        In nats per token, NaN for an answer without tokens; float64 `[num_answers]`.

    Raises:
        DataError: The columns are not equally long, or the offsets do not end with them.

    Source: the geometric mean of the token probabilities, DASD report (arXiv 2601.09088, figure 3a).
    """
    if not len(logprobs) == len(token_bytes) == offsets[-1]:
        raise DataError(
            f"there are {len(logprobs)} logprobs and {len(token_bytes)} token_bytes for {offsets[-1]} tokens; every"
            " token needs one of each"
        )
    spelling = np.append(np.flatnonzero(token_bytes), -1)
    before = np.searchsorted(spelling[:-1], offsets)
    ends = np.where(np.diff(before) > 0, spelling[before[1:] - 1] + 1, offsets[:-1])
    pieces = (logprobs[start:end] for start, end in zip(offsets[:-1], ends, strict=True))
    # Row by row, since np.add.reduceat rounds differently than the mean of a single answer.
    return np.array([np.mean(piece, dtype=np.float64) if len(piece) else math.nan for piece in pieces], np.float64)


class Tokens(NamedTuple):
    """The tokens of a text and what one model says about them, in order.

    Attributes:
        logprobs: Log-probability of each token; float32 `[num_tokens]`.
        token_bytes: Length of each token in bytes of the text, 0 for an end token; int32 `[num_tokens]`.
    """

    logprobs: NDArray[np.float32]
    token_bytes: NDArray[np.int32]


def sentence_scores(text: str, teacher: Tokens | None, student: Tokens | None) -> dict[str, Any]:
    """Return the sentence ends of a text and, for both models, the p of each sentence and the mean log-probability.

    Args:
        text: One answer.
        teacher: The teacher's tokens; None if it did not score the text.
        student: The same for the student.

    Returns:
        Columns of a row of the scores; the numbers of a model that is None are NaN per sentence, and None per answer.

    Raises:
        DataError: The tokens do not spell the text, apart from a `<think>` that the chat template wrote before them.
    """
    ends = sentence_ends(text)
    (teacher_logprobs, teacher_spans), (student_logprobs, student_spans) = (
        _spans(text, model, ends) for model in (teacher, student)
    )
    one_answer = np.array([0, len(ends)], dtype=np.int64)
    stats = sentence_stats(teacher_logprobs, teacher_spans, student_logprobs, student_spans, one_answer, 0.0)
    return {
        "sentence_ends": ends,
        "p_teacher": stats.p_teacher,
        "p_student": stats.p_student,
        "teacher_mean_logprob": _mean(teacher),
        "student_mean_logprob": _mean(student),
        "num_teacher_tokens": None if teacher is None else len(teacher_logprobs),
    }


def _mean(tokens: Tokens | None) -> float | None:
    if tokens is None:
        return None
    return float(mean_logprob(*tokens, np.array([0, len(tokens.logprobs)], dtype=np.int64))[0])


def _spans(text: str, tokens: Tokens | None, ends: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the log-probabilities of the tokens that spell a text, and which of them belong to which sentence.

    A `<think>` that the chat template wrote comes before all tokens, so it has no tokens.
    """
    if tokens is None:
        return np.empty(0, dtype=np.float32), np.zeros(len(ends) + 1, dtype=np.int64)
    raw = text.encode()
    num_bytes = int(tokens.token_bytes.sum())
    opened = len(raw) - num_bytes
    if opened < 0 or raw[:opened].strip() not in (b"", b"<think>"):
        raise DataError(f"its tokens have {num_bytes} bytes, its text {len(raw)}; the tokens must spell the text")
    num_tokens = np.flatnonzero(tokens.token_bytes).max(initial=-1) + 1  # without the end token
    logprobs, token_bytes = tokens.logprobs[:num_tokens], tokens.token_bytes[:num_tokens]
    token_edges, sentence_edges = (np.array([0, len(rows)], dtype=np.int64) for rows in (token_bytes, ends))
    first = np.array([opened], dtype=np.int64)
    return logprobs, sentence_spans(raw, token_bytes, token_edges, ends, sentence_edges, first)
