"""Balanced orders and gathered rows against plain Python; and what the two refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from dasd_lite.errors import DataError
from dasd_lite.method.packing import Batch, Plan, balance_rows, gather_rows, pack_rows
from dasd_lite.method.ragged import offsets_of

COST = (24_576.0, 1.0)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**64 - 1))
def test_every_row_is_dealt_once(lengths: list[int], num_ranks: int, micro_steps: int, window: int, seed: int) -> None:
    plan = pack_rows(lengths, 60)
    options: Any = {"num_ranks": num_ranks, "micro_steps": micro_steps, "cost": COST, "seed": seed, "window": window}
    order = balance_rows(plan, lengths, **options)
    assert order.rows.shape[1] == num_ranks and order.rows.shape[0] % micro_steps == 0
    assert sorted([*order.rows.ravel(), *order.left_over]) == list(range(plan.num_rows))
    assert len(order.left_over) < num_ranks * micro_steps
    assert balance_rows(plan, np.array(lengths, np.uint8), **options).rows.tobytes() == order.rows.tobytes()


@given(LENGTHS, st.integers(1, 4), st.integers(1, 2**32))
def test_windows_are_sorted_as_in_the_reference(lengths: list[int], num_ranks: int, seed: int) -> None:
    plan = pack_rows(lengths, 60, method="in_order")
    order = balance_rows(plan, lengths, num_ranks=num_ranks, micro_steps=1, cost=COST, seed=seed, window=10**6)
    # With one window for all, the micro-steps are the sorted rows cut into pieces.
    costs = [reference.row_cost([lengths[item] for item in plan.row(row)], COST) for row in range(plan.num_rows)]
    dealt = [costs[row] for row in order.rows.ravel()]
    steps = sorted(sorted(dealt[at : at + num_ranks]) for at in range(0, len(dealt), num_ranks))
    assert [cost for step in steps for cost in step] == sorted(dealt)


@given(LENGTHS, st.integers(1, 5), st.sampled_from([np.int32, np.uint32]), st.data())
def test_gathered_rows_are_those_of_the_reference(
    lengths: list[int], alignment: int, dtype: Any, data: st.DataObject
) -> None:
    plan = pack_rows(lengths, 60 * alignment, alignment=alignment)
    rows = data.draw(st.lists(st.integers(0, plan.num_rows - 1), max_size=8))
    rng = np.random.default_rng(len(lengths))
    offsets = offsets_of(lengths)
    tokens = rng.integers(0, 2**31, offsets[-1]).astype(dtype)
    mask = rng.random(len(tokens)) < 0.5
    batch = gather_rows(tokens, offsets, plan, rows, loss_mask=mask, pad_id=-7)
    documents = [item for row in rows for item in plan.row(row)]
    expected = reference.gather(tokens.tolist(), offsets.tolist(), mask.tolist(), documents, alignment, -7)
    assert batch.position_ids is not None and batch.labels is not None
    gathered = zip(batch.ids.tolist(), batch.position_ids.tolist(), batch.labels.tolist(), strict=True)
    assert list(gathered) == expected
    widths = [-(-lengths[item] // alignment) * alignment for item in documents]
    assert np.diff(batch.cu_seqlens).tolist() == widths
    assert batch.row_offsets.tolist() == [0, *np.cumsum([plan_width(plan, row, lengths) for row in rows])]
    bare = gather_rows(tokens, offsets, plan, rows, position_ids=False, pad_id=-7)
    assert bare.position_ids is None and bare.labels is None
    assert bare.ids.tobytes() == batch.ids.tobytes()


def plan_width(plan: Plan, row: int, lengths: list[int]) -> int:
    return sum(-(-lengths[item] // plan.alignment) * plan.alignment for item in plan.row(row))


def small() -> tuple[Plan, Any, Any]:
    """Sequences of 3, 2 and 1 tokens in rows of 4: [0, 2] and [1]."""
    return pack_rows([3, 2, 1], 4), np.arange(6, dtype=np.int32), offsets_of([3, 2, 1])


def out(**changes: Any) -> Batch:
    """A batch of nine tokens to write to, with something wrong."""
    columns: dict[str, Any] = {name: np.empty(9, np.int32) for name in ("ids", "position_ids", "labels")}
    return Batch(**columns | changes, cu_seqlens=np.zeros(1, np.int32), row_offsets=np.zeros(1, np.int64))


def test_a_mapped_column_and_a_batch_that_is_used_again(tmp_path: Path) -> None:
    plan, tokens, offsets = small()
    np.save(tmp_path / "tokens.npy", tokens)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    first = gather_rows(mapped, offsets, plan, [0, 1], loss_mask=np.ones(6, np.bool_))
    assert first.ids.tolist() == [0, 1, 2, 5, 3, 4]
    assert first.labels is not None and first.labels.tolist() == [-100, 1, 2, -100, -100, 4]
    second = gather_rows(mapped, offsets, plan, [1], out=first)
    assert np.shares_memory(second.ids, first.ids)
    assert second.ids.tolist() == [3, 4] and second.labels is None


def test_what_counts_as_a_target() -> None:
    plan, tokens, offsets = small()
    mask = np.array([0, 2, 255, 1, 0, 0], np.uint8).view(np.bool_)  # a mapped file may hold any byte
    batch = gather_rows(tokens, offsets, plan, np.array([0, 1]), loss_mask=mask)
    assert batch.labels is not None and batch.labels.tolist() == [-100, 1, 2, -100, -100, -100]


def test_one_row_and_the_longest_document() -> None:
    plan, tokens, offsets = small()
    batch = gather_rows(tokens, offsets, plan, 0)
    assert (batch.ids.tolist(), batch.max_seqlen) == ([0, 1, 2, 5], 3)


def test_out_in_the_memory_of_the_tokens() -> None:
    plan, _, offsets = small()
    memory = bytearray(48)  # two arrays whose common owner numpy does not know
    tokens, ids = np.frombuffer(memory, np.int32)[:6], np.frombuffer(memory, np.int32)[3:]
    with pytest.raises(ValueError, match=r"out\.ids shares memory with tokens; each array needs its own"):
        gather_rows(tokens, offsets, plan, [0, 1], out=out(ids=ids))


def test_a_batch_without_rows() -> None:
    plan, tokens, offsets = small()
    batch = gather_rows(tokens, offsets, plan, [])
    assert (len(batch.ids), batch.cu_seqlens.tolist(), batch.row_offsets.tolist()) == (0, [0], [0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": [2]}, DataError, r"rows\[0\] is 2; it must be from 0 and below 2"),
        ({"rows": [1.5]}, TypeError, "rows have dtype float64; they must be integers"),
        ({"rows": np.array([2**63 + 5], np.uint64)}, DataError, r"rows\[0\] is 9223372036854775807; it must be"),
        (
            {"offsets": offsets_of([3, 3])},
            DataError,
            "the plan has 3 sequences, offsets 2; both must describe",
        ),
        ({"offsets": offsets_of([5, 0, 1])}, DataError, "sequence 0 has 5 tokens, more than seq_len 4; is the plan"),
        ({"offsets": offsets_of([3, 2, 2])}, DataError, "row 0 has 5 tokens, more than seq_len 4; is the plan made of"),
        ({"offsets": np.array([0, 3, 2, 3])}, DataError, r"offsets\[2\] is 2, less than the 3 before it"),
        ({"tokens": np.arange(5, dtype=np.int32)}, DataError, r"offsets\[3\] is 6, but there are 5 values"),
        ({"tokens": np.arange(6)}, TypeError, "tokens has dtype int64; it must be int32 or uint32"),
        ({"tokens": np.full(6, 2**31, np.uint32)}, DataError, r"tokens\[0\] is 2147483648; it must be an id below"),
        ({"loss_mask": np.ones(5, np.bool_)}, DataError, "loss_mask has 5 elements and tokens 6"),
        ({"loss_mask": np.ones(6)}, TypeError, "loss_mask has dtype float64; it must be bool"),
        ({"out": Batch(*[np.empty(2, np.int32)] * 4, offsets_of([2]))}, ValueError, "out.ids has 2 tokens; this"),
        ({"out": out(position_ids=None)}, ValueError, "out.position_ids is missing; this batch needs 6 tokens"),
        ({"out": out(ids=np.empty(9))}, TypeError, "out.ids is float64; it must be a numpy array of int32"),
        ({"out": out(ids=[1, 2, 3])}, TypeError, "out.ids is list; it must be a numpy array of int32"),
        ({"out": out(ids=np.empty((9, 9), np.int32))}, ValueError, r"out.ids has shape \[9, 9\] and strides"),
        (
            {"out": out(ids=np.empty(18, np.int32)[::2])},
            ValueError,
            r"out.ids has shape \[9\] and strides \(8,\); it",
        ),
        ({"out": out(ids=np.frombuffer(bytes(36), np.int32))}, ValueError, "out.ids is read-only; it must be"),
        (
            {"out": Batch(*[np.empty(9, np.int32)] * 4, offsets_of([9]))},
            ValueError,
            "out.position_ids shares memory with",
        ),
        ({"pad_id": 2**31}, ValueError, "pad_id is 2147483648; it must be from -2147483648 to 2147483647"),
    ],
)
def test_what_gather_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    plan, tokens, offsets = small()
    with pytest.raises(error, match=message):
        gather_rows(**({"tokens": tokens, "offsets": offsets, "plan": plan, "rows": [0, 1]} | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_ranks": 0}, ValueError, "num_ranks is 0; it must be from 1 to 4294967295"),
        ({"micro_steps": -1}, ValueError, "micro_steps is -1; it must be from 1 to"),
        ({"seed": -1}, ValueError, "seed is -1; it must be from 0 to 18446744073709551615"),
        ({"cost": (1.0, -1.0)}, ValueError, "the quadratic cost is -1; it must be from 0 to 1e15"),
        ({"cost": 1.0}, TypeError, "cost is 1.0; it must be two numbers"),
        ({"lengths": [3, 2]}, DataError, "the plan has 3 sequences, lengths 2; both must describe the same"),
        ({"lengths": [3, 2, -1]}, DataError, r"lengths\[2\] is -1; a length is at least 0"),
        ({"lengths": [3.0]}, TypeError, "lengths have dtype float64; they must be integers"),
    ],
)
def test_what_balance_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    plan, _, _ = small()
    options = {"lengths": [3, 2, 1], "num_ranks": 1, "micro_steps": 1, "cost": COST, "seed": 0} | change
    with pytest.raises(error, match=message):
        balance_rows(plan, **options)
