"""Cut a rollout into pieces to print: sentences with their class, and spans of masked or trained tokens.

Input: text or token ids, sentence ends, probabilities. Output: pieces that add up to the text. Invariant: positions are
in bytes; the last token of a training example ends the turn, and the completion comes right before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dasd_lite.method.divergence import SentenceClass, classify_sentences
from dasd_lite.method.sentences import sentence_ends

_HEAD, _TAIL = 24, 8  # pieces shown of a long text


@dataclass(frozen=True)
class SentenceProbabilities:
    """The scored sentences of a rollout."""

    ends: list[int]
    """Where each ends, in bytes of the completion."""
    p_teacher: npt.NDArray[np.float32]
    p_student: npt.NDArray[np.float32]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """Take them from a row of the scores table."""
        p_teacher, p_student = (np.array(row[name], dtype=np.float32) for name in ("p_teacher", "p_student"))
        return cls(row["sentence_ends"], p_teacher, p_student)


@dataclass
class Piece:
    """A span of text, where it begins in bytes, and what is known about it."""

    text: str
    start: int
    kind: SentenceClass | None = None
    p_teacher: float = math.nan
    p_student: float = math.nan
    trained: bool | None = None
    author: str = ""
    note: str = ""
    """Printed after the text."""


def sentence_pieces(
    completion: str, prefix_bytes: int, beta: float, probabilities: SentenceProbabilities | None
) -> list[Piece]:
    """Cut a completion at its sentence ends and at the end of the student's part."""
    ends = sentence_ends(completion).tolist()
    pieces = _cut(completion.encode(), 0, ends, [prefix_bytes], beta, probabilities)
    if prefix_bytes:
        for piece in pieces:
            piece.author = "student" if piece.start < prefix_bytes else "teacher"
    return pieces


def token_pieces(
    spell: Callable[[int], bytes],
    ids: npt.NDArray[np.int32],
    mask: npt.NDArray[np.bool_],
    ends: Sequence[int],
    beta: float,
    probabilities: SentenceProbabilities | None,
) -> list[Piece]:
    """Cut a training example at its sentence ends and where masked and trained tokens meet.

    Args:
        spell: Returns the bytes of a token.
        ids: The tokens; int32 `[num_tokens]`.
        mask: Whether each is trained on; bool `[num_tokens]`.
        ends: Sentence ends of the completion in bytes. If empty, those of `probabilities` are used, or else the
            trained text is split into sentences.
        beta: Margin of the sentence classes.
        probabilities: The scored sentences, if there are any.
    """
    spelled = [spell(int(i)) for i in ids]
    raw = b"".join(spelled)
    edges = np.cumsum([0, *map(len, spelled)])
    changes = [*edges[1:-1][mask[1:] != mask[:-1]].tolist(), int(edges[-2])]
    if not ends:
        trained = raw[edges[:-1][mask][0] : edges[-2]] if mask.any() else b""
        ends = probabilities.ends if probabilities else _ends_of(trained)
    # The completion ends right before the end token; its beginning may be masked: a <think> that the template writes.
    start = int(edges[-2]) - ends[-1] if ends else len(raw)
    pieces = _cut(raw, start, ends, changes, beta, probabilities)
    for piece in pieces:
        token = int(np.searchsorted(edges, piece.start, side="right")) - 1
        piece.trained = bool(mask[min(token, len(mask) - 1)])
    if pieces and edges[-2] < edges[-1]:
        pieces[-1].note = "the end token, trained" if mask[-1] else "the end token, not trained"
    return pieces


def _ends_of(raw: bytes) -> list[int]:
    """Return the sentence ends of a text in bytes; none if it begins or ends within a character."""
    try:
        return list(sentence_ends(raw.decode()).tolist())
    except UnicodeDecodeError:
        return []


def abridge(pieces: list[Piece]) -> list[Piece]:
    """Leave out the middle of a long text, and say how much was left out."""
    if len(pieces) <= _HEAD + _TAIL + 1:
        return pieces
    middle = pieces[_HEAD:-_TAIL]
    num_bytes = sum(len(piece.text.encode()) for piece in middle)
    note = f"… {len(middle):,} pieces, {num_bytes:,} bytes left out; pass its uid to see it in full"
    gap = Piece("", middle[0].start, note=note)
    return [*pieces[:_HEAD], gap, *pieces[-_TAIL:]]


def _cut(
    raw: bytes,
    start: int,
    ends: Sequence[int],
    more: Sequence[int],
    beta: float,
    probabilities: SentenceProbabilities | None,
) -> list[Piece]:
    """Cut `raw` at `more` and at the sentence ends of the text that begins at `start`."""
    bounds = [start, *(start + end for end in ends)]
    edges = sorted({edge for edge in (0, *bounds, *more, len(raw)) if 0 <= edge <= len(raw)})
    classes: list[int] = []
    if probabilities is not None:
        classes = classify_sentences(probabilities.p_teacher, probabilities.p_student, beta).tolist()
    pieces = []
    for first, end in pairwise(edges):
        piece = Piece(raw[first:end].decode(errors="replace"), first)
        sentence = int(np.searchsorted(bounds, first, side="right")) - 1
        if probabilities is not None and 0 <= sentence < len(classes):
            piece.kind = SentenceClass(classes[sentence])
            piece.p_teacher = float(probabilities.p_teacher[sentence])
            piece.p_student = float(probabilities.p_student[sentence])
        pieces.append(piece)
    return pieces
