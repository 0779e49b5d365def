"""Flat values and 64-bit offsets: the form in which rows of unequal length go into the Rust core; argument checks.

Input: an Arrow column of lists. Output: a `Ragged`. Invariant: row i is `values[offsets[i]:offsets[i + 1]]`, the
offsets start at 0, never decrease and end at the number of values.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dasd_lite.errors import DataError


class Ragged(NamedTuple):
    """Rows of unequal length.

    Attributes:
        values: All rows, concatenated; `[offsets[-1]]`.
        offsets: Where rows begin and end; int64 `[num_rows + 1]`.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]


def from_arrow(column: Any) -> Ragged:
    """Return the rows of an Arrow list column, the values without a copy; a missing row (null) becomes an empty one."""
    lengths = column.value_lengths().fill_null(0).to_numpy()
    return Ragged(column.flatten().to_numpy(), offsets_of(lengths))


def join(rows: Sequence[NDArray[Any]]) -> Ragged:
    """Concatenate rows, at least one."""
    return Ragged(np.concatenate(rows), offsets_of([len(row) for row in rows]))


def offsets_of(lengths: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """Return the offsets of rows of these lengths; int64 `[num_rows + 1]`."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def check_array(name: str, values: NDArray[Any], *dtypes: type[np.generic]) -> NDArray[Any]:
    """Return a contiguous one-dimensional array of one of these dtypes.

    It is a copy only if the array is not contiguous, or if int64 is asked for and its integers are narrower.

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
    """Return an integer from `low` to `high`.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be an integer") from None
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}; it must be from {low} to {high}")
    return number


def check_groups(name: str, values: ArrayLike, num_values: int) -> NDArray[np.intp]:
    """Return the group of each value, renumbered from 0 in increasing order.

    Raises:
        DataError: Another number of values.
    """
    groups = np.asarray(values)
    if groups.shape != (num_values,):
        raise DataError(f"{name} has shape {list(groups.shape)}; it must be [{num_values}]")
    return np.unique(groups, return_inverse=True)[1]
