"""Rows that lie in shards already: found by their key, and read in any order.

Input: Parquet files whose rows have a key, which says all that decided the row. Output: the place of the row that
serves a key, and rows in the order of their places. Invariant: memory holds a few row groups and the keys, whatever
the size of the files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dasd_lite.errors import DataError

_OPEN_GROUPS = 4
ORDER = pa.schema([("shard", pa.int32()), ("row", pa.int32())])
"""First columns of an order file; columns of the table follow, with values in place of those in the shards."""


class Place(NamedTuple):
    """Where a row is: the number of its file, and of the row in it."""

    shard: int
    row: int


Limit: TypeAlias = int | Mapping[str, int] | None
"""Maximum tokens that an answer may have now: of all, or by its task; None where rows have no such limit."""


def index_by_key(files: Iterable[tuple[int, Path]], key: str, limit: Limit) -> dict[str, Place]:
    """Return for each key the place of the newest row that serves it.

    An answer that ended by itself serves any limit that it fits. One that was cut off serves the limit that cut it
    off, and an answer that was left out after errors serves none.

    Args:
        files: Each file and its number, the oldest first.
        key: Name of the column with the keys.
        limit: Maximum tokens that an answer may have now.
    """
    places: dict[str, Place] = {}
    for number, path in files:
        columns = read_columns(path, (key, "finish_reason", "num_tokens", "max_tokens", "task"))
        keys = columns[key].to_pylist()
        places.update((keys[row], Place(number, row)) for row in np.flatnonzero(serves(columns, limit)).tolist())
    return places


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Read those of some columns that a file has."""
    with _damage(path), pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
        return file.read(columns=[name for name in names if name in file.schema_arrow.names])


def read_names(path: Path) -> list[str]:
    """Read the names of a file's columns."""
    with _damage(path):
        return list(pq.read_schema(path).names)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Name a file that cannot be read."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: damaged ({reason}); restore it from a copy, or remove it to make its rows again"
        ) from None


def serves(columns: pa.Table, limit: Limit) -> npt.NDArray[np.bool_]:
    """Mark the rows that serve their key under this limit; see `index_by_key`."""
    if "finish_reason" not in columns.column_names:
        return np.ones(columns.num_rows, bool)
    usable = pc.not_equal(columns["finish_reason"], "error")
    if limit is not None:
        asked, most = columns["max_tokens"], limit
        if isinstance(limit, Mapping):
            most = pa.array([limit.get(task) for task in columns["task"].to_pylist()], pa.int64())
        fits = pc.less_equal(pc.coalesce(columns["num_tokens"], asked), most)
        cut_off = pc.equal(columns["finish_reason"], "length")
        usable = pc.and_(usable, pc.if_else(cut_off, pc.equal(asked, most), fits))
    return np.asarray(pc.fill_null(usable, False).to_numpy(), bool)


class ShardRows:
    """Reads rows of several files by their places; fast where consecutive places are in one row group."""

    def __init__(self, files: Sequence[Path] | dict[int, Path], columns: Sequence[str] | None = None) -> None:
        """Read these columns, or all. Files are opened when they are needed."""
        self._files, self._columns = files, None if columns is None else list(columns)
        self._starts: dict[int, npt.NDArray[np.int64]] = {}
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def read(self, places: Sequence[Place]) -> pa.Table:
        """Return the rows at these places, in their order; each row group is read once."""
        if (order := sorted(range(len(places)), key=places.__getitem__)) != list(range(len(places))):
            return self.read([places[index] for index in order]).take(np.argsort(order))
        parts: list[pa.Table] = []
        first = 0
        while first < len(places):
            shard, row = places[first]
            group, start, end = self._group_of(shard, row)
            last = first + 1  # the run of rows that follow one another in this row group
            while last < len(places) and places[last] == (shard, row + last - first) and places[last].row < end:
                last += 1
            parts.append(self._group(shard, group).slice(row - start, last - first))
            first = last
        return pa.concat_tables(parts).combine_chunks()

    def _group_of(self, shard: int, row: int) -> tuple[int, int, int]:
        if shard not in self._starts:
            metadata = pq.read_metadata(self._files[shard])
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._starts[shard] = np.concatenate([[0], np.cumsum(sizes)])
        starts = self._starts[shard]
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return group, int(starts[group]), int(starts[group + 1])

    def _group(self, shard: int, group: int) -> pa.Table:
        if (table := self._groups.pop((shard, group), None)) is None:
            with pq.ParquetFile(self._files[shard], memory_map=True, pre_buffer=False) as file:
                table = file.read_row_group(group, columns=self._columns)
        self._groups[shard, group] = table
        if len(self._groups) > _OPEN_GROUPS:
            self._groups.popitem(last=False)
        return table


def ordered_batches(
    files: Sequence[Path], order: Path, columns: Sequence[str] | None, batch_size: int
) -> Iterator[pa.RecordBatch]:
    """Stream a table in the order of its order file, in batches of `batch_size` rows."""
    rows = ShardRows(files, columns)
    with pq.ParquetFile(order, memory_map=True, pre_buffer=False) as file:
        for part in file.iter_batches(batch_size=batch_size):
            yield replace_columns(rows.read(_places(part)), dict(zip(part.schema.names, part.columns, strict=True)))


def _places(order: pa.RecordBatch) -> list[Place]:
    return list(map(Place, order["shard"].to_pylist(), order["row"].to_pylist()))


def replace_columns(table: pa.Table, values: Mapping[str, Any]) -> pa.RecordBatch:
    """Return a table as one batch, with other values in some of its columns."""
    for number, field in enumerate(table.schema):
        if field.name in values:
            column = values[field.name]
            array = column.cast(field.type) if isinstance(column, pa.Array) else pa.array(column, field.type)
            table = table.set_column(number, field, array)
    batches: list[pa.RecordBatch] = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
