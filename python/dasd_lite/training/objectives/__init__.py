"""What training minimises: one small module for each objective, found by its name.

An objective is two functions:

    terms(logits_CV, target_ids_C, at) -> [C] or [C, …]    what it wants to know of each target token
    loss(terms_N, targets) -> (loss, metrics)              a scalar with its gradient, and sums to report

`terms` sees the logits of one chunk of positions, for those of all never exist at once, and is computed
again in the backward pass; `at` says which of the micro-batch's targets these are. `loss` sees the terms of all
targets of a micro-batch together with the documents they are in, so objectives of whole answers
(pairs, ratios of sequences) need no more. Invariant: a loss is a sum over targets divided by `num_step`, so it adds up
over micro-batches and ranks to the mean over the step; metrics are sums, and are divided by it once at the end.
The first metric is the one that is shown and watched: "loss".
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from dasd_lite.model.logprobs import target_positions
from dasd_lite.model.row import Row


@dataclass(frozen=True)
class Targets:
    """The target tokens of one micro-batch, N tokens in D documents.

    Attributes:
        positions: Where in the row they are; int64 numpy [N].
        document: Which document each is in; int64 tensor [N].
        weights: Weight of each document, mean 1 over the targets of the data; float32 tensor [D].
        num_step: Target tokens of the whole optimiser step, over all micro-batches and ranks.
    """

    positions: npt.NDArray[np.int64]
    document: Any
    weights: Any
    num_step: int

    @classmethod
    def of(cls, row: Row, num_step: int, device: Any) -> Targets:
        """Find the targets of a micro-batch."""
        import torch

        positions = target_positions(row.loss_mask, row.doc_lengths)
        document = np.searchsorted(np.cumsum(row.doc_lengths), positions, side="right")
        return cls(
            positions,
            torch.from_numpy(document).to(device),
            torch.from_numpy(row.weights.astype(np.float32)).to(device),
            num_step,
        )


class Objective(Protocol):
    """See the module."""

    def terms(self, logits_CV: Any, target_ids_C: Any, at: slice) -> Any:
        """Return what the objective wants to know of each token of a chunk."""
        ...

    def loss(self, terms_N: Any, targets: Targets) -> tuple[Any, dict[str, Any]]:
        """Return the loss of a micro-batch, and sums over its tokens to report."""
        ...


def load(name: str) -> Objective:
    """Return the objective of this name."""
    return cast(Objective, importlib.import_module(f"{__name__}.{name}"))
