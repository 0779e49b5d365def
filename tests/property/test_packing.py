"""The packer: every sequence exactly once, no row too long, and never more rows than plain best-fit-decreasing."""

from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_lite.errors import DataError
from dasd_lite.method.packing import PackingMethod, Plan, pack_rows

DTYPES = st.sampled_from([np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])


def rows(plan: Plan) -> list[list[int]]:
    return [plan.row(index).tolist() for index in range(plan.num_rows)]


@given(
    lengths=st.lists(st.integers(1, 120), max_size=150),
    units=st.integers(1, 15),
    alignment=st.integers(1, 8),
    method=st.sampled_from(["best_fit", "tight", "in_order"]),
    dtype=DTYPES,
)
def test_plan_keeps_its_promises(
    lengths: list[int], units: int, alignment: int, method: PackingMethod, dtype: Any
) -> None:
    seq_len = units * alignment
    column = np.array(lengths, dtype)
    plan = pack_rows(column, seq_len, method=method, alignment=alignment, overlong="drop")
    assert [column.dtype.name for column in (plan.items, plan.offsets, plan.dropped)] == ["uint32", "int64", "uint32"]
    assert sorted([*plan.items, *plan.dropped]) == list(range(len(lengths)))
    assert plan.dropped.tolist() == [index for index, length in enumerate(lengths) if length > seq_len]
    assert plan.num_tokens == sum(lengths[item] for item in plan.items)
    assert plan.fill == (plan.num_tokens / (plan.num_rows * seq_len) if plan.num_rows else 1.0)
    for row in rows(plan):
        assert row
        assert sum(-(-lengths[item] // alignment) * alignment for item in row) <= seq_len
    again = pack_rows(column.copy(), seq_len, method=method, alignment=alignment, overlong="drop")
    assert plan.items.tobytes() == again.items.tobytes()
    assert plan.offsets.tobytes() == again.offsets.tobytes()


@given(seq_len=st.integers(1, 40), data=st.data())
def test_rows_of_the_reference(seq_len: int, data: st.DataObject) -> None:
    alignment = data.draw(st.sampled_from([divisor for divisor in range(1, seq_len + 1) if seq_len % divisor == 0]))
    lengths = data.draw(st.lists(st.integers(1, seq_len), max_size=100))
    plan = pack_rows(lengths, seq_len, alignment=alignment)
    expected = reference.best_fit_decreasing(lengths, seq_len, alignment)
    assert plan.num_rows == len(expected)

    def fills(plan_rows: list[list[int]]) -> list[int]:
        return sorted(sum(-(-lengths[item] // alignment) for item in row) for row in plan_rows)

    assert fills(rows(plan)) == fills(expected)
    assert pack_rows(lengths, seq_len, method="tight", alignment=alignment).num_rows <= plan.num_rows
    in_order = pack_rows(lengths, seq_len, method="in_order", alignment=alignment)
    assert rows(in_order) == reference.next_fit(lengths, seq_len, alignment)


@given(seq_len=st.integers(1, 6).map(lambda units: 4 * units), alignment=st.sampled_from([1, 2, 4]), data=st.data())
def test_tight_lies_between_the_fewest_rows_and_those_of_best_fit(
    seq_len: int, alignment: int, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, seq_len), max_size=8))
    tight = pack_rows(lengths, seq_len, method="tight", alignment=alignment)
    best_fit = reference.best_fit_decreasing(lengths, seq_len, alignment)
    assert reference.fewest_rows(lengths, seq_len, alignment) <= tight.num_rows <= len(best_fit)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), sigma=st.floats(0.1, 1.5))
def test_long_tails_need_no_more_rows_than_the_reference(seed: int, sigma: float) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(9000), sigma, 1000), 64, 65536).astype(np.int32)
    plan = pack_rows(lengths, 65536)
    assert plan.num_rows == len(reference.best_fit_decreasing(lengths.tolist(), 65536))
    tight = pack_rows(lengths, 65536, method="tight")
    assert tight.num_rows <= plan.num_rows
    for one in (plan, tight):
        assert np.add.reduceat(lengths[one.items], one.offsets[:-1]).max() <= 65536


def test_a_column_that_is_not_contiguous() -> None:
    lengths = np.arange(1, 41, dtype=np.int32)
    assert rows(pack_rows(lengths[::2], 64)) == rows(pack_rows(lengths[::2].copy(), 64))


def test_nothing_to_pack() -> None:
    plan = pack_rows([], 8)
    assert (plan.num_rows, plan.num_tokens, plan.fill, plan.offsets.tolist()) == (0, 0, 1.0, [0])
    with pytest.raises(IndexError, match="row 0 of a plan of 0 rows"):
        plan.row(0)


def test_numbers_of_numpy_do_not_overflow() -> None:
    plan = pack_rows(np.full(40_000, 65_536), np.int32(65_536))
    assert (plan.fill, type(plan.seq_len)) == (1.0, int)


def test_big_endian_and_misaligned_lengths() -> None:
    assert rows(pack_rows(np.array([2**64 - 1, 2], ">u8"), 4, overlong="drop")) == [[1]]
    odd = np.frombuffer(b"x" + np.array([3, 1], np.int32).tobytes(), np.uint8)[1:].view(np.int32)
    assert rows(pack_rows(odd, 4)) == [[0, 1]]


def test_rows_from_the_end() -> None:
    plan = pack_rows([3, 3, 3], 4)
    assert plan.row(-1).tolist() == plan.row(2).tolist() == [2]
    with pytest.raises(IndexError, match="row 3 of a plan of 3 rows"):
        plan.row(3)


@pytest.mark.parametrize(
    ("lengths", "options", "error", "message"),
    [
        ([5, 0], {}, DataError, r"lengths\[1\] is 0; a sequence has at least 1 token"),
        ([5, -2], {"overlong": "drop"}, DataError, r"lengths\[1\] is -2; a sequence has at least 1 token"),
        ([5, 9], {}, DataError, r"lengths\[1\] is 9, more than seq_len 8"),
        ([1.5], {}, TypeError, "lengths have dtype float64; they must be integers"),
        ([[1], [2]], {}, ValueError, r"lengths has shape \[2, 1\]; it must be one-dimensional"),
        ([1], {"seq_len": 2.0}, TypeError, "seq_len is 2.0; it must be an integer"),
        ([1], {"seq_len": 0}, ValueError, "seq_len is 0; it must be"),
        ([1], {"seq_len": -1}, ValueError, "seq_len is -1; it must be"),
        ([1], {"seq_len": 2**25}, ValueError, "seq_len is 33554432; it must be from 1 to 16777216"),
        ([1], {"alignment": 0}, ValueError, "alignment is 0; it must be"),
        ([1], {"alignment": 3}, ValueError, "alignment is 3; it must be at least 1 and a divisor of seq_len"),
        ([1], {"method": "worst"}, ValueError, "method is 'worst'; it must be best_fit, tight or in_order"),
        ([1], {"overlong": "cut"}, ValueError, "overlong is 'cut'; it must be error or drop"),
        (np.array([2**63 + 1], np.uint64), {}, DataError, r"lengths\[0\] is 9223372036854775807, more than seq_len 8"),
    ],
)
def test_bad_input(lengths: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_rows(lengths, **{"seq_len": 8, **options})
