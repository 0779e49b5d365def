"""The method's formulas: probability and class of sentences, counts of classes, and how log-probabilities lie.

Input and output: flat numpy columns, with int64 offsets where rows are of unequal length. Nothing is changed in place,
and the same input gives the same output. Invariant: the probability of a sentence is exp(mean log-probability of the
tokens that begin in it), each model on its own tokens; a sentence in which no token begins has probability NaN, no
class, and is not counted.

What walks over tokens or sentences is Rust (`rust/core/src/stats.rs`), without the GIL; Ctrl-C stops it.
Log-probabilities are natural logarithms; lengths of tokens and places of sentence ends are in bytes of the UTF-8 text.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from dasd_lite import _rust
from dasd_lite.errors import DataError
from dasd_lite.method.ragged import check_array
from dasd_lite.method.sentences import sentence_ends


class SentenceClass(IntEnum):
    """What the two probabilities say about a sentence; the values stand in int8 columns."""

    NONE = -1
    """No token of the one or the other begins in it."""
    SHARED = 0
    """The two differ by at most β."""
    TEACHER = 1
    """p_T - p_S > β."""
    STUDENT = 2
    """p_S - p_T > β."""


class SentenceStats(NamedTuple):
    """What both models say about each sentence.

    Attributes:
        p_teacher: exp(mean log-probability) under the teacher, NaN if no token begins in it; float32 `[num_sentences]`.
        p_student: The same under the student.
        classes: Values of `SentenceClass`; int8 `[num_sentences]`.
        counts: Sentences of each class in each response, as `class_counts` has them; int64 `[num_responses, 3]`.
    """

    p_teacher: NDArray[np.float32]
    p_student: NDArray[np.float32]
    classes: NDArray[np.int8]
    counts: NDArray[np.int64]


def sentence_spans(
    token_bytes: NDArray[np.int32] | NDArray[np.uint16],
    token_offsets: NDArray[np.int64],
    ends: NDArray[np.int64],
    end_offsets: NDArray[np.int64],
    first_bytes: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Which tokens of one model begin in which sentence.

    A token belongs to the sentence in which its first byte lies. A token without bytes belongs where it stands: one
    behind the last byte (an end-of-text token, say) to the last sentence.

    Args:
        token_bytes: Length of each token in bytes of the text; int32 or uint16 `[num_tokens]`.
        token_offsets: Response r has tokens `token_offsets[r]` to `token_offsets[r + 1]`; int64 `[num_responses + 1]`.
        ends: Sentence ends in bytes from the response's start, as `text.sentence_ends` gives them; int64
            `[num_sentences]`.
        end_offsets: Response r has sentences `end_offsets[r]` to `end_offsets[r + 1]`; int64 `[num_responses + 1]`.
        first_bytes: Where the first token of each response begins, for texts that begin with something that no token
            wrote (a `<think>` of the template); int64 `[num_responses]`. None: at 0.

    Returns:
        Sentence s has the tokens `spans[s]` to `spans[s + 1]`; int64 `[num_sentences + 1]`.

    Raises:
        DataError: The tokens of a response have more or fewer bytes than its text; ends do not increase; a response has
            tokens, but no sentence; offsets do not fit. Names response, index and value.
        TypeError: A wrong dtype.
        ValueError: An array is not one-dimensional.

    Source: bytes as the ruler that two tokenizers share; the DASD report (arXiv 2601.09088, §4) compares sentences,
    since teacher and student have different vocabularies.
    """
    return _rust.sentence_spans(
        check_array("token_bytes", token_bytes, np.int32, np.uint16),
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
    """Probability of each sentence under both models, its class, and the counts of each response, in one pass.

    The probability is exp(mean log-probability of the tokens that begin in the sentence), each model on its own tokens.
    Sums are kept in float64; a probability is within 1e-7 of the exact one. Every processor and every number of threads
    gives the same bytes.

    Args:
        teacher_logprobs: Log-probability of each of the teacher's tokens given those before it, at most 0 (rounding up
            to 1e-4 above is let through); float32 `[num_teacher_tokens]`.
        teacher_spans: The tokens of each sentence, as `sentence_spans` gives them; int64 `[num_sentences + 1]`.
        student_logprobs: The same of the student's tokens; float32 `[num_student_tokens]`.
        student_spans: The same of the student's tokens; int64 `[num_sentences + 1]`.
        response_offsets: Response r has sentences `response_offsets[r]` to `response_offsets[r + 1]`; int64
            `[num_responses + 1]`.
        beta: How far apart the two probabilities of a Teacher or Student sentence are; the companion paper uses 0.1.

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
    """Class of each sentence.

    Args:
        p_teacher: Probability of each sentence under the teacher, NaN if it has none; float32 `[num_sentences]`.
        p_student: The same under the student.
        beta: How far apart the two must be, at least 0; the companion paper uses 0.1.

    Returns:
        Values of `SentenceClass`; int8 `[num_sentences]`. The difference is taken in float64, and one of exactly `beta`
        is Shared.

    Raises:
        DataError: The columns are not equally long, or a value is no probability; names its index.
        TypeError: A wrong dtype.
        ValueError: `beta` is negative or NaN, or an array is not one-dimensional.

    Source: companion paper of the DASD report (arXiv 2512.20908), its test order without the Boosted class, which
    needs the distilled model.
    """
    return _rust.classify(
        check_array("p_teacher", p_teacher, np.float32), check_array("p_student", p_student, np.float32), beta
    )


def class_counts(classes: NDArray[np.int8], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sentences of each class in each response.

    Args:
        classes: Values of `SentenceClass`; int8 `[num_sentences]`.
        offsets: Response r has sentences `offsets[r]` to `offsets[r + 1]`; int64 `[num_responses + 1]`.

    Returns:
        int64 `[num_responses, 3]`; column c counts `SentenceClass(c)`: Shared, Teacher, Student. Those without a class
        are in none.

    Raises:
        DataError: A value is no class, or the offsets do not fit; names index and value.
        TypeError: A wrong dtype.
        ValueError: An array is not one-dimensional.
    """
    return _rust.class_counts(check_array("classes", classes, np.int8), check_array("offsets", offsets, np.int64))


class Tokens(NamedTuple):
    """What one model says of the tokens of a text, in order."""

    logprobs: npt.NDArray[np.float32]
    token_bytes: npt.NDArray[np.int32]
    """Bytes of the text that each of them spells; 0 for an end token."""


def sentence_scores(text: str, teacher: Tokens | None, student: Tokens | None) -> dict[str, Any]:
    """Return sentence ends, p and mean log-probability of both models; None is a model that has not read the text.

    Raises DataError when tokens do not spell the text, but for a `<think>` that the template wrote before them.
    """
    ends = sentence_ends(text)
    teacher, student = (None if side is None else _without_end(side) for side in (teacher, student))
    teacher_logprobs, teacher_spans = _spans(text, teacher, ends)
    student_logprobs, student_spans = _spans(text, student, ends)
    whole = np.array([0, len(ends)], dtype=np.int64)
    stats = sentence_stats(teacher_logprobs, teacher_spans, student_logprobs, student_spans, whole, 0.0)
    return {
        "sentence_ends": ends,
        "p_teacher": stats.p_teacher,
        "p_student": stats.p_student,
        "teacher_mean_logprob": None if teacher is None else _mean(teacher.logprobs),
        "student_mean_logprob": None if student is None else _mean(student.logprobs),
        "num_teacher_tokens": None if teacher is None else len(teacher.logprobs),
    }


def _without_end(tokens: Tokens) -> Tokens:
    """Leave out the tokens behind the text: the end token has no bytes of it."""
    spelling = np.flatnonzero(tokens.token_bytes)
    length = int(spelling[-1]) + 1 if len(spelling) else 0
    return Tokens(tokens.logprobs[:length], tokens.token_bytes[:length])


def _spans(
    text: str, tokens: Tokens | None, ends: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return log-probabilities, and which of them begin in which sentence.

    A `<think>` that the template wrote stands before all tokens: no token begins in it.
    """
    if tokens is None:
        return np.empty(0, dtype=np.float32), np.zeros(len(ends) + 1, dtype=np.int64)
    raw = text.encode()
    num_bytes = int(tokens.token_bytes.sum())
    opened = len(raw) - num_bytes
    if opened < 0 or raw[:opened].strip() not in (b"", b"<think>"):
        raise DataError(f"its tokens are {num_bytes} bytes of a text of {len(raw)}; they should spell it")
    token_edges, sentence_edges = (np.array([0, len(rows)], dtype=np.int64) for rows in (tokens.token_bytes, ends))
    first = np.array([opened], dtype=np.int64)
    return tokens.logprobs, sentence_spans(tokens.token_bytes, token_edges, ends, sentence_edges, first)


def _mean(logprobs: npt.NDArray[np.float32]) -> float:
    return float(np.mean(logprobs, dtype=np.float64)) if len(logprobs) else float("nan")
