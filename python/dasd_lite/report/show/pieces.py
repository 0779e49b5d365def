"""Cut a rollout into pieces to print: sentences with their class, and runs of masked or trained tokens.

Input: text or token ids, sentence ends, probabilities. Output: pieces that together are the text.
Invariant: places are bytes; an example's last token ends the turn, and its completion lies right before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_lite.method.divergence import SentenceClass, classify_sentences
from dasd_lite.method.sentences import sentence_ends

Score = dict[str, Any]
_HEAD, _TAIL = 24, 8  # pieces shown of a text that is too long to look over


@dataclass
class Piece:
    """A stretch of text, where it begins in bytes, and what is known of it."""

    text: str
    start: int
    kind: SentenceClass | None = None
    p_teacher: float = math.nan
    p_student: float = math.nan
    trained: bool | None = None
    author: str = ""
    note: str = ""
    """What is to be said of it behind the text."""


def sentence_pieces(completion: str, prefix_bytes: int, beta: float, score: Score | None) -> list[Piece]:
    """Cut a completion into sentences, and where the student's part ends."""
    ends = sentence_ends(completion).tolist()
    pieces = _cut(completion.encode(), 0, ends, [prefix_bytes], beta, score)
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
    score: Score | None,
) -> list[Piece]:
    """Cut a training example into sentences, and where masked and trained tokens meet.

    `spell` gives the bytes of a token. `ends` may be empty where the completion is not at hand; then they are those
    of the score, or else what is trained is cut anew.
    """
    spelled = [spell(int(i)) for i in ids]
    raw = b"".join(spelled)
    edges = np.cumsum([0, *map(len, spelled)])
    changes = [*edges[1:-1][mask[1:] != mask[:-1]].tolist(), int(edges[-2])]
    if not ends:
        trained = raw[edges[:-1][mask][0] : edges[-2]] if mask.any() else b""
        ends = score["sentence_ends"] if score else _ends_of(trained)
    # Before the end token lies the completion, whose opener may stand in the part that the template writes.
    start = int(edges[-2]) - ends[-1] if ends else len(raw)
    pieces = _cut(raw, start, ends, changes, beta, score)
    for piece in pieces:
        token = int(np.searchsorted(edges, piece.start, side="right")) - 1
        piece.trained = bool(mask[min(token, len(mask) - 1)])
    if pieces and edges[-2] < edges[-1]:
        pieces[-1].note = "the end token, trained" if mask[-1] else "the end token, not trained"
    return pieces


def _ends_of(raw: bytes) -> list[int]:
    """Find the sentence ends of a text in bytes; none where it is cut within a character."""
    try:
        return list(sentence_ends(raw.decode()).tolist())
    except UnicodeDecodeError:
        return []


def abridge(pieces: list[Piece]) -> list[Piece]:
    """Leave out the middle of a long text, and say how much that is."""
    if len(pieces) <= _HEAD + _TAIL + 1:
        return pieces
    left_out = pieces[_HEAD:-_TAIL]
    num_bytes = sum(len(piece.text.encode()) for piece in left_out)
    gap = Piece("", left_out[0].start, note=f"… {len(left_out):,} pieces, {num_bytes:,} bytes; by its uid it is whole")
    return [*pieces[:_HEAD], gap, *pieces[-_TAIL:]]


def _cut(
    raw: bytes, start: int, ends: Sequence[int], more: Sequence[int], beta: float, score: Score | None
) -> list[Piece]:
    """Cut `raw` at `more` and at the sentence ends of the text that begins at `start`."""
    bounds = [start, *(start + end for end in ends)]
    edges = sorted({edge for edge in (0, *bounds, *more, len(raw)) if 0 <= edge <= len(raw)})
    kinds: list[SentenceClass] = []
    if score is not None:
        columns = [np.array(score[name], dtype=np.float32) for name in ("p_teacher", "p_student")]
        kinds = [SentenceClass(int(kind)) for kind in classify_sentences(columns[0], columns[1], beta)]
    pieces = []
    for a, b in pairwise(edges):
        piece = Piece(raw[a:b].decode(errors="replace"), a)
        sentence = int(np.searchsorted(bounds, a, side="right")) - 1
        if score is not None and 0 <= sentence < len(kinds):
            piece.kind = kinds[sentence]
            piece.p_teacher, piece.p_student = score["p_teacher"][sentence], score["p_student"][sentence]
        pieces.append(piece)
    return pieces
