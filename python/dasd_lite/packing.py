"""Rows for training: which token sequence lies in which row.

Input: the lengths of all sequences, in tokens. Output: a `Plan`, lists of sequence indices row by row.
Invariant: every index is exactly once in `Plan.items` or in `Plan.dropped`, no sequence is cut, and no row holds more
than `seq_len` tokens; the same lengths give the same bytes on every platform.

The work is done in Rust (`rust/core/src/pack.rs`) without the GIL, and Ctrl-C stops it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dasd_lite import _rust

Lengths: TypeAlias = NDArray[np.integer[Any]] | Sequence[int]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sequence lies in which row.

    Attributes:
        items: Sequence indices, row after row; uint32 `[num_items]`.
        offsets: Row r is `items[offsets[r]:offsets[r + 1]]`; int64 `[num_rows + 1]`, starts at 0.
        dropped: Indices of the sequences longer than a row, increasing; uint32 `[num_dropped]`.
        num_tokens: Sum of the lengths of `items`, in tokens, without what `alignment` adds.
        seq_len: Tokens that a row can hold.
    """

    items: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    dropped: NDArray[np.uint32]
    num_tokens: int
    seq_len: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that is not padding, 0 to 1; 1 for a plan without rows."""
        return self.num_tokens / (self.num_rows * self.seq_len) if self.num_rows else 1.0

    def row(self, index: int) -> NDArray[np.uint32]:
        """Sequence indices of one row (a view); negative indices count from the end, as in a list.

        Raises:
            IndexError: There is no such row.
        """
        if not -self.num_rows <= index < self.num_rows:
            raise IndexError(f"row {index} of a plan of {self.num_rows} rows")
        index %= self.num_rows
        return self.items[self.offsets[index] : self.offsets[index + 1]]


def pack_rows(
    lengths: Lengths,
    seq_len: int,
    *,
    method: Literal["best_fit", "in_order"] = "best_fit",
    alignment: int = 1,
    overlong: Literal["error", "drop"] = "error",
) -> Plan:
    """Distributes sequences over as few rows as the method finds; never cuts one.

    Args:
        lengths: Tokens of each sequence, at least 1; any integer dtype `[num_sequences]`, read without a copy if it is
            contiguous int32, uint32 or int64.
        seq_len: Tokens that a row can hold, 1 to 16,777,216.
        method: `best_fit`: global best-fit-decreasing (the longest first, each into the fullest row that has room).
            `in_order`: in the given order, a new row as soon as the next one does not fit.
        alignment: Every sequence takes a multiple of this many tokens of its row, as context parallelism needs it
            (twice its size); divides `seq_len`.
        overlong: What becomes of a sequence longer than `seq_len`: an error, or listed in `Plan.dropped`.

    Returns:
        The plan. With `best_fit` the sequences of a row come longest first.

    Raises:
        DataError: A length is below 1, or above `seq_len` with `overlong="error"`; names its index and value.
        TypeError: `lengths` are not integers.
        ValueError: An argument is out of its range, or `lengths` is not one-dimensional.

    Source: Johnson (1973) for best-fit-decreasing; the DASD report (arXiv 2601.09088, §6.4) packs greedily into 65,536.
    """
    for name, value in (("seq_len", seq_len), ("alignment", alignment)):
        if not 1 <= value < 2**32:
            raise ValueError(f"{name} is {value}; it must be at least 1 and fit into 32 bits")
    if method not in ("best_fit", "in_order"):
        raise ValueError(f"method is {method!r}; it must be best_fit or in_order")
    if overlong not in ("error", "drop"):
        raise ValueError(f"overlong is {overlong!r}; it must be error or drop")
    items, offsets, dropped, num_tokens = _rust.pack(
        _as_lengths(lengths),
        seq_len=seq_len,
        alignment=alignment,
        best_fit=method == "best_fit",
        drop_overlong=overlong == "drop",
    )
    return Plan(items=items, offsets=offsets, dropped=dropped, num_tokens=num_tokens, seq_len=seq_len)


def _as_lengths(lengths: Lengths) -> NDArray[np.int32] | NDArray[np.uint32] | NDArray[np.int64]:
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"lengths have shape {list(array.shape)}; they must be one-dimensional")
    if array.size == 0 and not isinstance(lengths, np.ndarray):
        return np.empty(0, np.int64)  # an empty list says nothing about its type
    if array.dtype.kind not in "iu":
        raise TypeError(f"lengths have dtype {array.dtype}; they must be integers")
    if array.dtype == np.uint64:
        array = np.minimum(array, np.uint64(2**63 - 1))  # what int64 cannot hold is too long for any row anyway
    if array.dtype not in (np.int32, np.uint32, np.int64):
        array = array.astype(np.int64)
    return np.ascontiguousarray(array)
