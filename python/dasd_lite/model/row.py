"""A training row: documents one after another, the tokens that are trained on, and what an objective needs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Row:
    """T tokens in D documents, N of the tokens targets; several rows joined are one more row.

    Attributes:
        ids: int32 [T].
        loss_mask: True where a token is trained on; bool [T].
        doc_lengths: Tokens of each document; int32 [D].
        uids: The rollouts that the documents come from; D names, or none.
        tokens: Columns of the objective with one value per target token; [N] or [N, M].
        documents: Columns of the objective with one value per document; [D].
    """

    ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    doc_lengths: npt.NDArray[np.int32]
    uids: tuple[str, ...]
    tokens: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    documents: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on: masked in, and not the first of their document."""
        starts = np.cumsum(self.doc_lengths) - self.doc_lengths
        return int(self.loss_mask.sum()) - int(self.loss_mask[starts].sum())

    @classmethod
    def join(cls, rows: Sequence[Row]) -> Row:
        """Concatenate rows: their documents do not see each other anyway. All have the same columns."""
        return cls(
            np.concatenate([row.ids for row in rows]),
            np.concatenate([row.loss_mask for row in rows]),
            np.concatenate([row.doc_lengths for row in rows]),
            tuple(uid for row in rows for uid in row.uids),
            {name: np.concatenate([row.tokens[name] for row in rows]) for name in rows[0].tokens},
            {name: np.concatenate([row.documents[name] for row in rows]) for name in rows[0].documents},
        )
