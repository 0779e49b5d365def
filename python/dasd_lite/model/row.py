"""A training row: documents one after the other, with the tokens that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Row:
    """Documents one behind the other; several rows joined are one more."""

    ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    doc_lengths: npt.NDArray[np.int32]
    uids: tuple[str, ...]
    doc_weights: npt.NDArray[np.float32] | None = None
    """None: 1 for each document."""

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on: masked in, and not the first of their document."""
        starts = np.cumsum(self.doc_lengths) - self.doc_lengths
        return int(self.loss_mask.sum()) - int(self.loss_mask[starts].sum())

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """Weight of each document."""
        return np.ones(len(self.doc_lengths), dtype=np.float32) if self.doc_weights is None else self.doc_weights

    @classmethod
    def join(cls, rows: Sequence[Row]) -> Row:
        """Put rows one behind the other: the documents do not see each other anyway."""
        return cls(
            np.concatenate([row.ids for row in rows]),
            np.concatenate([row.loss_mask for row in rows]),
            np.concatenate([row.doc_lengths for row in rows]),
            tuple(uid for row in rows for uid in row.uids),
            np.concatenate([row.weights for row in rows]),
        )
