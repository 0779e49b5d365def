"""Rows for training: which token sequence is in which row, which rank reads which row when, and the rows themselves.

`pack_rows` makes a `Plan` from the lengths of all sequences, `balance_rows` an `Order` in which all ranks take equally
long, `gather_rows` a `Batch` of some rows. Each can be used without the others, and with any trainer.
Invariants: every index is exactly once in `Plan.items` or in `Plan.dropped`, no sequence is cut, and no row holds more
than `seq_len` tokens; every row of a plan is exactly once in `Order.rows` or in `Order.left_over`. The same input gives
the same bytes on every platform, with any number of threads.

The work is done in Rust (`rust/core/src`: `pack.rs`, `balance.rs`, `gather.rs`) without the GIL; Ctrl-C stops it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from dasd_lite import _rust
from dasd_lite.errors import DataError
from dasd_lite.method.ragged import check_array, check_int

Lengths: TypeAlias = NDArray[np.integer[Any]] | Sequence[int]
PackingMethod: TypeAlias = Literal["best_fit", "tight", "in_order"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sequence is in which row.

    Attributes:
        items: Sequence indices, row after row; uint32 `[num_items]`.
        offsets: Row r is `items[offsets[r]:offsets[r + 1]]`; int64 `[num_rows + 1]`, starts at 0.
        dropped: Indices of the sequences longer than a row, increasing; uint32 `[num_dropped]`.
        num_tokens: Sum of the lengths of `items`, in tokens, without the padding of `alignment`.
        seq_len: Tokens that a row can hold.
        alignment: Every sequence takes a multiple of this many tokens of its row.
    """

    items: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    dropped: NDArray[np.uint32]
    num_tokens: int
    seq_len: int
    alignment: int = 1

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that is not padding, 0 to 1; 1 for a plan without rows."""
        return self.num_tokens / (self.num_rows * self.seq_len) if self.num_rows else 1.0

    def row(self, index: int) -> NDArray[np.uint32]:
        """Return the sequence indices of one row (a view); negative indices count from the end, as in a list.

        Raises:
            IndexError: The row does not exist.
        """
        if not -self.num_rows <= index < self.num_rows:
            raise IndexError(f"row {index} of a plan of {self.num_rows} rows")
        index %= self.num_rows
        return self.items[self.offsets[index] : self.offsets[index + 1]]


def pack_rows(
    lengths: Lengths,
    seq_len: int,
    *,
    method: PackingMethod = "best_fit",
    alignment: int = 1,
    overlong: Literal["error", "drop"] = "error",
) -> Plan:
    """Distribute sequences over as few rows as the method finds, without cutting any.

    Args:
        lengths: Tokens of each sequence, at least 1; any integer dtype `[num_sequences]`, read without a copy if it is
            contiguous int32, uint32 or int64.
        seq_len: Tokens that a row can hold, 1 to 16,777,216.
        method: `best_fit`: global best-fit-decreasing (the longest first, each into the fullest row that has room).
            `tight`: often even fewer rows, never more, in three to nine times the time: each row is completed as
            exactly as possible by a search among singles, pairs and triples.
            `in_order`: in the given order, a new row as soon as the next sequence does not fit.
        alignment: Every sequence takes a multiple of this many tokens of its row, as context parallelism needs it
            (twice its size); divides `seq_len`.
        overlong: What to do with a sequence longer than `seq_len`: raise an error, or list it in `Plan.dropped`.

    Returns:
        The plan. With `best_fit` and `tight` the longest sequence of a row, rounded up to the alignment, comes first.

    Raises:
        DataError: A length is below 1, or above `seq_len` with `overlong="error"`; names its index and value.
        TypeError: `lengths` are not integers.
        ValueError: An argument is out of its range, or `lengths` is not one-dimensional.

    Source: Johnson (1973) for best-fit-decreasing; the DASD report (arXiv 2601.09088, §6.4) packs greedily into 65,536.
    """
    seq_len = check_int("seq_len", seq_len, 1, 2**24)
    alignment = check_int("alignment", alignment, 1, 2**24)
    if method not in get_args(PackingMethod):
        raise ValueError(f"method is {method!r}; it must be best_fit, tight or in_order")
    if overlong not in ("error", "drop"):
        raise ValueError(f"overlong is {overlong!r}; it must be error or drop")
    items, offsets, dropped, num_tokens = _rust.pack(
        _as_lengths(lengths),
        seq_len=seq_len,
        alignment=alignment,
        method=method,
        drop_overlong=overlong == "drop",
    )
    return Plan(
        items=items, offsets=offsets, dropped=dropped, num_tokens=num_tokens, seq_len=seq_len, alignment=alignment
    )


@dataclass(frozen=True, eq=False)
class Order:
    """Which rank works on which row when.

    Attributes:
        rows: Row of each rank in each micro-step; uint32 `[num_micro_steps, num_ranks]`.
        left_over: Rows that fill no whole optimizer step, fewer than `num_ranks * micro_steps`, increasing; uint32
            `[num_left_over]`. Which ones depends on the seed, so another epoch leaves out others.
    """

    rows: NDArray[np.uint32]
    left_over: NDArray[np.uint32]


def balance_rows(
    plan: Plan,
    lengths: Lengths,
    *,
    num_ranks: int,
    micro_steps: int,
    cost: tuple[float, float],
    seed: int,
    window: int = 64,
) -> Order:
    """Order the rows so that in each micro-step all ranks take equally long.

    A micro-step takes as long as its most expensive row. Rows are shuffled and sorted by cost within windows; neighbors
    form a micro-step; the micro-steps of a window and the ranks of a micro-step are shuffled again. So cheap and
    expensive rows are spread over all of training and over all ranks.

    Args:
        plan: A plan of `pack_rows`.
        lengths: The lengths that it was made from.
        num_ranks: Ranks that work at the same time, each on one row, at least 1.
        micro_steps: Micro-steps of an optimizer step, at least 1. Rows are dealt out in whole optimizer steps.
        cost: Cost of a token, and of a pair of tokens of one sequence: a row costs `Σ (cost[0] * l + cost[1] * l²)`
            over the lengths l of its sequences. For a transformer of hidden size h the ratio is about 6 h to 1.
        seed: Decides the order, 0 to 2^64 - 1; use another one for each epoch.
        window: Micro-steps whose rows are sorted together. A larger window balances better and shuffles less.

    Returns:
        The order.

    Raises:
        DataError: The plan has an index without a length, or a length is negative; names index and value.
        ValueError: An argument is out of its range.

    Source: balanced micro-batches are ours; the DASD report (arXiv 2601.09088, §6.4) trains 64 rows of 65,536 a step.
    """
    lengths = _as_lengths(lengths)
    _check_plan(plan, "lengths", len(lengths))
    try:
        linear, quadratic = map(float, cost)
    except (TypeError, ValueError):
        raise TypeError(f"cost is {cost!r}; it must be two numbers") from None
    rows, left_over = _rust.balance_rows(
        check_array("plan.items", plan.items, np.uint32),
        check_array("plan.offsets", plan.offsets, np.int64),
        lengths,
        num_ranks=check_int("num_ranks", num_ranks, 1, 2**32 - 1),
        micro_steps=check_int("micro_steps", micro_steps, 1, 2**32 - 1),
        window=check_int("window", window, 1, 2**32 - 1),
        cost=(linear, quadratic),
        seed=check_int("seed", seed, 0, 2**64 - 1),
    )
    return Order(rows, left_over)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows, document after document.

    Attributes:
        ids: Token ids; int32 `[num_tokens]`.
        position_ids: Position of each token in its document, from 0; int32 `[num_tokens]`, or None if not asked for.
        labels: The id where it is a target, else -100, which loss functions ignore; int32 `[num_tokens]`, or None
            without a loss mask. The first token of a document always has -100: nothing predicts it, and a model that
            shifts the labels must not predict it from the document before.
        cu_seqlens: Document d is `ids[cu_seqlens[d]:cu_seqlens[d + 1]]`, padding included, as flash-attention takes
            it; int32 `[num_documents + 1]`, starts at 0.
        row_offsets: The r-th row is `ids[row_offsets[r]:row_offsets[r + 1]]`, which is not padded to seq_len; int64
            `[num_rows + 1]`.
    """

    ids: NDArray[np.int32]
    position_ids: NDArray[np.int32] | None
    labels: NDArray[np.int32] | None
    cu_seqlens: NDArray[np.int32]
    row_offsets: NDArray[np.int64]

    @property
    def max_seqlen(self) -> int:
        """Length of the longest document, padding included, as flash-attention needs it; 0 without documents."""
        return int(np.diff(self.cu_seqlens).max(initial=0))


def gather_rows(
    tokens: NDArray[Any],
    offsets: NDArray[np.int64],
    plan: Plan,
    rows: int | Sequence[int] | NDArray[np.integer[Any]],
    *,
    loss_mask: NDArray[np.bool_] | None = None,
    position_ids: bool = True,
    pad_id: int = 0,
    out: Batch | None = None,
) -> Batch:
    """Copy the token ids of some rows from one long column.

    Args:
        tokens: Ids of all sequences, concatenated, below 2^31; int32 or uint32 `[num_all]`, read without a copy, also
            from a memory-mapped file. Other dtypes are refused, since the whole column would have to be converted.
        offsets: Sequence s is `tokens[offsets[s]:offsets[s + 1]]`; int64 `[num_sequences + 1]`.
        plan: Which sequences are in which row. With an alignment each document is padded to a multiple of it; position
            ids continue through the padding, labels are -100 there.
        rows: Which rows, in which order; `[num_rows]`, or a single one. A row may be asked for more than once.
        loss_mask: True where the token is a target; bool `[num_all]`.
        position_ids: Whether to write position ids as well.
        pad_id: The id that documents are padded with.
        out: A batch of at least as many tokens, with the columns that are asked for: its arrays are written to, and
            the returned batch has views of them. Keep the large one for the next call, and one for each thread; after
            an error it is partly written.

    Returns:
        The rows.

    Raises:
        DataError: A row or sequence does not exist; a row is longer than `plan.seq_len`; offsets or loss mask do not
            fit the tokens; an id is 2^31 or more. Names index and value.
        TypeError: A wrong dtype.
        ValueError: An array has another number of dimensions; or a column of `out` is missing, too small, not
            contiguous, read-only, or shares memory with another argument.

    Source: documents that do not attend to each other need their borders (`cu_seqlens`) and position ids from 0; the
    public configs of the DASD report (arXiv 2601.09088) train without either.
    """
    ids = check_array("tokens", tokens, np.int32, np.uint32)
    offsets = check_array("offsets", offsets, np.int64)
    mask = None if loss_mask is None else check_array("loss_mask", loss_mask, np.bool_).view(np.uint8)
    pad_id = check_int("pad_id", pad_id, -(2**31), 2**31 - 1)
    _check_plan(plan, "offsets", max(len(offsets) - 1, 0))
    sequences, cu_seqlens, row_offsets = _rust.gather_layout(
        offsets,
        check_array("plan.items", plan.items, np.uint32),
        check_array("plan.offsets", plan.offsets, np.int64),
        _as_int64("rows", np.atleast_1d(rows)),
        seq_len=plan.seq_len,
        alignment=plan.alignment,
    )
    num_tokens = int(row_offsets[-1])
    batch = Batch(
        _buffer("ids", num_tokens, out),
        _buffer("position_ids", num_tokens, out) if position_ids else None,
        _buffer("labels", num_tokens, out) if loss_mask is not None else None,
        cu_seqlens,
        row_offsets,
    )
    if out is not None:
        _check_apart({"tokens": ids, "loss_mask": mask}, batch)
    _rust.gather_rows(
        ids,
        offsets,
        mask,
        sequences,
        cu_seqlens,
        pad_id=pad_id,
        ids=batch.ids,
        position_ids=batch.position_ids,
        labels=batch.labels,
        reused=out is not None,
    )
    return batch


def _buffer(name: str, num_tokens: int, out: Batch | None) -> NDArray[np.int32]:
    if out is None:
        return np.empty(num_tokens, np.int32)
    given = getattr(out, name)
    if given is None:
        raise ValueError(f"out.{name} is missing; this batch needs {num_tokens} tokens")
    if not isinstance(given, np.ndarray) or given.dtype != np.int32:
        raise TypeError(
            f"out.{name} is {getattr(given, 'dtype', type(given).__name__)}; it must be a numpy array of int32"
        )
    if given.ndim != 1 or not given.flags.carray:
        layout = (
            "is read-only"
            if not given.flags.writeable
            else f"has shape {list(given.shape)} and strides {given.strides}"
        )
        raise ValueError(f"out.{name} {layout}; it must be one-dimensional, contiguous and writeable")
    if len(given) < num_tokens:
        raise ValueError(f"out.{name} has {len(given)} tokens; this batch needs {num_tokens}")
    return given[:num_tokens]


def _check_apart(inputs: dict[str, NDArray[Any] | None], batch: Batch) -> None:
    """Refuse to write to memory that is also read, or written as another column."""
    columns = [(name, array) for name, array in inputs.items() if array is not None]
    for name in ("ids", "position_ids", "labels"):
        array = getattr(batch, name)
        if array is None:
            continue
        for other, taken in columns:
            if np.may_share_memory(array, taken):
                raise ValueError(f"out.{name} shares memory with {other}; each array needs its own")
        columns.append((f"out.{name}", array))


def _check_plan(plan: Plan, name: str, num_sequences: int) -> None:
    planned = len(plan.items) + len(plan.dropped)
    if planned != num_sequences:
        raise DataError(
            f"the plan has {planned} sequences, {name} {num_sequences}; both must describe the same sequences"
        )


def _as_lengths(lengths: Lengths) -> NDArray[np.int32] | NDArray[np.uint32] | NDArray[np.int64]:
    array = np.asarray(lengths)
    return (
        check_array("lengths", array, array.dtype.type)
        if array.dtype in (np.int32, np.uint32)
        else _as_int64("lengths", array)
    )


def _as_int64(name: str, values: NDArray[Any]) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)  # numpy takes an empty list for floats
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} have dtype {array.dtype}; they must be integers")
    if array.dtype.kind == "u" and array.dtype.itemsize == 8:
        array = np.minimum(array, 2**63 - 1)  # what int64 cannot hold is out of range anyway
    return check_array(name, array.astype(np.int64, copy=False), np.int64)
