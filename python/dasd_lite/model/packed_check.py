"""Check, before a model scores or learns, that packed documents have the same log-probabilities as each one alone.

Input: a model and a few documents of the real data. Invariant: documents that leak into each other are refused, and so
is an architecture whose logits are more than its output head (scaled, capped).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dasd_lite.chat.spelling import TokenIds
from dasd_lite.errors import TrainError
from dasd_lite.model.row import Row

if TYPE_CHECKING:
    import torch

    from dasd_lite.model.logprobs import LanguageModel

_COMPARISON_DOCS, _COMPARISON_TOKENS = 4, 512  # their full logits fit on any machine


def comparison_row(documents: Sequence[TokenIds], num_tokens: int = _COMPARISON_TOKENS) -> Row:
    """Return the first `num_tokens` of each of the first few documents as one row."""
    cut = [document[:num_tokens] for document in documents[:_COMPARISON_DOCS]]
    ids = np.concatenate(cut)
    return Row(ids, np.ones(len(ids), dtype=bool), np.array([len(d) for d in cut], dtype=np.int32), ())


def documents_of(rows: Sequence[Row]) -> list[TokenIds]:
    """Return the documents of some rows."""
    return [document for row in rows for document in np.split(row.ids, np.cumsum(row.doc_lengths)[:-1])]


def check_packing(model: LanguageModel, documents: Sequence[TokenIds], dtype: torch.dtype | None = None) -> None:
    """Compare packed log-probabilities with those of each document alone.

    Args:
        model: With packed attention.
        documents: Token ids.
        dtype: Format of the computation, if it is not that of the weights.

    Raises:
        TrainError: They differ, or are not finite.
    """
    import torch

    from dasd_lite.model import logprobs
    from dasd_lite.model.load import is_float32

    row = comparison_row(documents)
    docs = documents_of([row])
    was_training = model.training
    model.eval()
    packed = logprobs.target_logprobs(model, row.ids, row.doc_lengths)
    alone = np.concatenate([logprobs.plain_logprobs(model, doc) for doc in docs])
    model.train(was_training)
    if np.isfinite(alone).sum() != len(alone) - len(docs):  # all but the first token of each
        raise TrainError(
            "the model's log-probabilities are not finite before the first step; the checkpoint may be corrupt"
        )
    gap = float(np.nanmean(np.abs(packed - alone)))
    exact = is_float32(model) and dtype in (None, torch.float32)
    allowed = 1e-3 if exact else 5e-2  # nats; rounding of 16-bit weights is up to 0.02
    if not gap <= allowed:
        raise TrainError(
            f"log-probabilities of packed documents differ from those of each document alone by {gap:.3g} nats on"
            f" average (allowed {allowed:g}): documents leak into each other, or this architecture computes its logits"
            " with more than an output head; use another student"
        )
