"""What an objective is, and what it gets to know about a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from dasd_lite.model.row import Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Metrics: TypeAlias = Mapping[str, Tensor | float]
    """Sums over the target tokens of a micro-batch; "loss" is one of them."""

BUILT_IN_COLUMNS = ("weight", "prompt", "teacher_logprobs")
"""Columns that an objective may need without `pack.columns`."""


@dataclass(frozen=True)
class Targets:
    """The target tokens of one micro-batch: N tokens in D documents.

    Attributes:
        positions: Where they are in the row; int64 numpy [N].
        document: Which document each one is in; int64 tensor [N].
        num_documents: D.
        num_step: Target tokens of the whole optimizer step, over all micro-batches and processes.
        tokens: The needed columns with one value per target token; tensors [N] or [N, M], float32 or int64.
        documents: The needed columns with one value per document; tensors [D], float32 or int64. "weight" has mean 1
            over the target tokens of all rows.
        prompt: Which documents answer the same prompt, counted from 0 in this micro-batch; int64 tensor [D]. None
            unless the objective sets `groups`.
    """

    positions: npt.NDArray[np.int64]
    document: Tensor
    num_documents: int
    num_step: int
    tokens: dict[str, Tensor]
    documents: dict[str, Tensor]
    prompt: Tensor | None

    @classmethod
    def of(cls, row: Row, num_step: int, device: torch.device | str) -> Self:
        """Find the targets of a micro-batch."""
        from dasd_lite.model.attention import to_device
        from dasd_lite.model.logprobs import target_positions

        positions = target_positions(row.loss_mask, row.doc_lengths)
        document = np.searchsorted(np.cumsum(row.doc_lengths), positions, side="right")
        prompt = row.documents.get("prompt")
        return cls(
            positions=positions,
            document=to_device(document, device),
            num_documents=len(row.doc_lengths),
            num_step=num_step,
            # Copies: an array of one row is a part of the mapped file.
            tokens={name: to_device(values.copy(), device) for name, values in row.tokens.items()},
            documents={name: to_device(values.copy(), device) for name, values in row.documents.items()},
            prompt=None if prompt is None else to_device(np.unique(prompt, return_inverse=True)[1], device),
        )


class Objective(Protocol):
    """What a module, object or class must have to be minimized; all arguments come by position.

    It may also have `needs`, the names of the columns that it reads, and `groups = True`, so that all answers of a
    prompt are in one micro-batch.
    """

    def per_token(self, logits_CV: Tensor, target_ids_C: Tensor, tokens: Mapping[str, Tensor], /) -> Tensor:
        """Return what the loss needs to know about each target token of a chunk: [C] or [C, …]."""

    def loss(self, per_token_N: Tensor, targets: Targets, /) -> tuple[Tensor, Metrics]:
        """Return the loss of a micro-batch, and sums over its tokens to report, "loss" among them."""
