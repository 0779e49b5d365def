"""Flat values and 64-bit offsets: how columns of rows of unequal length go into the Rust core.

Input: an Arrow column of lists. Output: a `Ragged`. Invariant: row i is `values[offsets[i]:offsets[i + 1]]`, the
offsets start at 0, never decrease and end at the number of values.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import NDArray


class Ragged(NamedTuple):
    """Rows of unequal length.

    Attributes:
        values: All rows, one behind the other; `[offsets[-1]]`.
        offsets: Where rows begin and end; int64 `[num_rows + 1]`.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]


def from_arrow(column: Any) -> Ragged:
    """Rows of an Arrow list column, the values without a copy; a missing row (null) is an empty one."""
    lengths = column.value_lengths().fill_null(0).to_numpy()
    return Ragged(column.flatten().to_numpy(), offsets_of(lengths))


def join(rows: Sequence[NDArray[Any]]) -> Ragged:
    """Copy at least one row, one behind the other."""
    return Ragged(np.concatenate(rows), offsets_of([len(row) for row in rows]))


def offsets_of(lengths: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """Offsets of rows of these lengths; int64 `[num_rows + 1]`."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def check_array(name: str, values: NDArray[Any], *dtypes: type[np.generic]) -> NDArray[Any]:
    """Hold a one-dimensional array of one of these dtypes against what it should be.

    It is copied only if it does not lie in memory in one piece, or if int64 is asked for and it has narrower integers.

    Raises:
        TypeError: Another dtype.
        ValueError: Another number of dimensions.
    """
    array = np.asarray(values)
    if np.int64 in dtypes and array.dtype.kind in "iu" and np.can_cast(array.dtype, np.int64):
        array = array.astype(np.int64, copy=False)
    if array.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {array.dtype}; it must be {' or '.join(dtype.__name__ for dtype in dtypes)}")
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {list(array.shape)}; it must be one-dimensional")
    return np.require(array, requirements=("C", "A"))


def check_int(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """Hold a number against what it should be: an integer from `low` to `high`.

    Raises:
        TypeError: It is no integer.
        ValueError: It is out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be an integer") from None
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}; it must be from {low} to {high}")
    return number
