"""Check, before a model scores or learns, that packed documents have the same log-probabilities as each one alone.

Input: a model and a few documents of the real data. Invariant: documents that leak into each other are refused,
wherever in a document and in whatever number format, and so is an architecture whose attention or logits are not what
we compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dasd_lite.chat.spelling import TokenIds
from dasd_lite.errors import TrainError
from dasd_lite.model.row import Row

if TYPE_CHECKING:
    import torch

    from dasd_lite.model.logprobs import LanguageModel

_COMPARISON_DOCS, _COMPARISON_TOKENS = 4, 512  # their full logits fit on any machine
_BEYOND = 64  # tokens of the longest document behind its window, where an attention that forgets it would show
_BEGINNING = 8  # tokens of a document that a neighbor's convolution or recurrent state would reach first
# Nats. What is computed by the same operations is the same to the bit; rounding in float32 is under 1e-4.
_SAME, _EXACT, _EXACT_WORST = 1e-5, 1e-3, 5e-3
# Rounding of 16-bit weights is up to 0.04 on average, more with experts, whose router may choose another one.
_ROUNDED = 0.15
_REROUTED = 0.2


def comparison_row(documents: Sequence[TokenIds], num_tokens: int = _COMPARISON_TOKENS) -> Row:
    """Return the first `num_tokens` of each of the first few documents as one row."""
    return _row([document[:num_tokens] for document in documents[:_COMPARISON_DOCS]])


def documents_of(rows: Sequence[Row]) -> list[TokenIds]:
    """Return the documents of some rows."""
    return [document for row in rows for document in np.split(row.ids, np.cumsum(row.doc_lengths)[:-1])]


def check_packing(model: LanguageModel, documents: Sequence[TokenIds], dtype: torch.dtype | None = None) -> None:
    """Compare packed log-probabilities with those of each document alone, and look whether they depend on a neighbor.

    Args:
        model: From load_model.
        documents: Token ids. The longest is read beyond the model's window, the first ones at their beginnings.
        dtype: Format of the computation, if it is not that of the weights.

    Raises:
        TrainError: They differ, or are not finite.
    """
    import torch

    from dasd_lite.model import logprobs
    from dasd_lite.model.architecture import architecture_of
    from dasd_lite.model.load import is_float32

    config = logprobs.causal_model(model).config
    architecture = architecture_of(config)
    docs = _examined(documents, architecture.horizon)
    row = _row(docs)
    was_training = model.training
    model.eval()
    packed = logprobs.target_logprobs(model, row.ids, row.doc_lengths)
    alone = np.concatenate([logprobs.plain_logprobs(model, doc) for doc in docs])
    beside_another = logprobs.target_logprobs(model, _other_first(row), row.doc_lengths)
    model.train(was_training)

    in_float16 = dtype == torch.float16 or any(p.dtype == torch.float16 for p in model.parameters())
    for found in (packed, alone):
        if np.isfinite(found).sum() != len(found) - len(docs):  # all but the first token of each
            why = "float16 overflowed; use dtype = 'float32', or 'bfloat16' on a GPU that supports it"
            raise TrainError(
                "the model's log-probabilities are not finite before the first step: "
                + (why if in_float16 else "the checkpoint may be corrupt")
            )
    exact = is_float32(model) and dtype in (None, torch.float32)
    _check_neighbor(packed, beside_another, row, routed=architecture.has_experts, exact=exact)
    _check_alone(packed, alone, row, architecture.kind, exact=exact)


def _row(docs: Sequence[TokenIds]) -> Row:
    ids = np.concatenate(docs)
    return Row(ids, np.ones(len(ids), dtype=bool), np.array([len(d) for d in docs], dtype=np.int32), ())


def _examined(documents: Sequence[TokenIds], horizon: int) -> list[TokenIds]:
    """Return the beginnings of the first documents, and of the longest as much as shows whether the horizon is kept.

    The longest stands last: what it computes can have leaked in from those before it.
    """
    docs = [document[:_COMPARISON_TOKENS] for document in documents[:_COMPARISON_DOCS]]
    longest = max(documents, key=len)
    if horizon + _BEYOND > _COMPARISON_TOKENS and len(longest) > _COMPARISON_TOKENS and horizon < len(longest):
        docs = [*docs[: _COMPARISON_DOCS - 1], longest[: horizon + _BEYOND]]
    return docs


def _other_first(row: Row) -> TokenIds:
    """Return the ids of the row with another first document of the same length, of tokens of the later ones."""
    ids, first = row.ids.copy(), int(row.doc_lengths[0])
    if first < len(ids):
        ids[:first] = np.resize(ids[first:][::-1], first)
    return ids


def _check_neighbor(
    packed: npt.NDArray[np.float32], other: npt.NDArray[np.float32], row: Row, *, routed: bool, exact: bool
) -> None:
    """Refuse a row whose later documents move when the first one changes.

    They are computed by the same operations on the same shapes, so nothing at all may change. Only experts see their
    tokens in other batches then, and in 16 bits a router may choose another expert; a leak still fills the beginnings.
    """
    moved = np.split(np.abs(packed - other), np.cumsum(row.doc_lengths)[:-1])[1:]
    if not moved:
        return
    worst = [float(np.nanmax(document, initial=0.0)) for document in moved]
    beginnings = np.concatenate([document[1 : 1 + _BEGINNING] for document in moved])
    if routed and not exact:
        leaks = len(beginnings) > 0 and float(beginnings.mean()) > _REROUTED
    else:
        leaks = max(worst) > (_EXACT if routed else _SAME)
    if leaks:
        raise TrainError(
            f"documents leak into each other: the log-probabilities of document {int(np.argmax(worst)) + 2} of a row"
            f" move by up to {max(worst):.3g} nats when the first one changes; use another student"
        )


def _check_alone(
    packed: npt.NDArray[np.float32], alone: npt.NDArray[np.float32], row: Row, kind: str, *, exact: bool
) -> None:
    gaps = np.abs(packed - alone)
    mean, worst = float(np.nanmean(gaps)), float(np.nanmax(gaps))
    if mean <= (_EXACT if exact else _ROUNDED) and (not exact or worst <= _EXACT_WORST):
        return
    starts = np.cumsum(row.doc_lengths) - row.doc_lengths
    at = int(np.nanargmax(gaps))
    document = int(np.searchsorted(starts, at, side="right"))
    raise TrainError(
        f"log-probabilities of packed documents differ from those of each document alone by {mean:.3g} nats on average"
        f" and {worst:.3g} at most, at token {at - int(starts[document - 1]) + 1} of document {document}: the attention"
        f" or the logits of {kind} are not what is computed here; use another student"
    )
