"""One answer and what two models say of its tokens → the probability of each sentence under both.

Input: a text, and of each model log-probabilities and byte lengths of its own tokens of that text.
Output: columns of a row of SCORE. Invariant: p of a sentence is exp(mean log-probability of the tokens
that begin in it); the end token belongs to none; where a model has not read the text all its p are NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dasd_lite.errors import DataError
from dasd_lite.method.divergence import sentence_spans, sentence_stats
from dasd_lite.method.sentences import sentence_ends


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
