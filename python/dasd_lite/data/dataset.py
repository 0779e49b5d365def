"""Reading the Parquet shards of a finished dataset folder.

Input: a folder that has a manifest.json. Output: its tables, in batches or whole. Invariants: a finished folder never
changes, and a shard whose size differs from the manifest's is an error. A table whose folder has grown has an order
file: which rows of which shards it consists of, in order, and newer values for some of its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dasd_lite.data.manifest import read_manifest
from dasd_lite.data.stored import ordered_batches
from dasd_lite.errors import DataError


def shards(folder: Path, table: str) -> list[Path]:
    """Return the shard files of a table. Without an order file, its rows are theirs, one after another.

    Raises:
        DataError: The folder is unfinished or has no such table, or a shard is missing or truncated.
    """
    manifest = read_manifest(folder)
    if table not in manifest["tables"]:
        raise DataError(f"{folder}: has {', '.join(manifest['tables']) or 'no tables'}, not {table!r}")
    return [_checked(folder, shard) for shard in manifest["tables"][table]]


def num_rows(folder: Path, table: str) -> int:
    """Return the number of rows of a table; 0 if there is no such table."""
    manifest = read_manifest(folder)
    if (order := manifest.get("orders", {}).get(table)) is not None:
        return int(order["rows"])
    return sum(shard["rows"] for shard in manifest["tables"].get(table, []))


def batches(
    folder: Path, table: str, columns: Sequence[str] | None = None, batch_size: int = 128
) -> Iterator[pa.RecordBatch]:
    """Stream a table in batches of exactly `batch_size` rows; the last may be smaller.

    Memory stays at a few row groups, whatever the size of the table. The batches of two tables of the same length
    cover the same rows.

    Raises:
        DataError: A column that the table does not have, or what `shards` raises.
    """
    files = shards(folder, table)
    for path in files:
        _check_columns(path, pq.read_schema(path), columns)
    order = read_manifest(folder).get("orders", {}).get(table)
    if order is not None:
        yield from ordered_batches(files, _checked(folder, order), columns, batch_size)
        return
    pending: list[pa.RecordBatch] = []
    for path in files:
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=batch_size, columns=list(columns) if columns else None):
                pending.append(batch)
                if sum(part.num_rows for part in pending) >= batch_size:
                    joined = pa.concat_batches(pending)
                    yield joined.slice(0, batch_size)
                    pending = [joined.slice(batch_size)] if joined.num_rows > batch_size else []
    if pending:
        yield pa.concat_batches(pending)


def read_table(folder: Path, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table, or some of its columns, into memory."""
    if not (parts := list(batches(folder, table, columns, batch_size=4096))):
        raise DataError(f"{folder}: table {table!r} is empty")
    return pa.Table.from_batches(parts)


def read_row(folder: Path, table: str, position: int) -> dict[str, Any]:
    """Read one row, decompressing only its row group."""
    files, order = shards(folder, table), read_manifest(folder).get("orders", {}).get(table)
    if order is not None:
        newer: dict[str, Any] = pq.read_table(_checked(folder, order)).slice(position, 1).to_pylist()[0]
        return _row(files[newer.pop("shard")], newer.pop("row")) | newer
    for path in files:
        rows = pq.read_metadata(path).num_rows
        if position < rows:
            return _row(path, position)
        position -= rows
    raise IndexError(position)


def _row(path: Path, row: int) -> dict[str, Any]:
    with pq.ParquetFile(path, memory_map=True) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                return dict(file.read_row_group(group).slice(row, 1).to_pylist()[0])
            row -= rows
    raise IndexError(row)


def _checked(folder: Path, shard: dict[str, Any]) -> Path:
    path = folder / str(shard["file"])
    size = path.stat().st_size if path.exists() else None
    if size != shard["bytes"]:
        what = "is missing" if size is None else f"has {size} bytes"
        raise DataError(
            f"{path}: {what}; the manifest says {shard['bytes']} bytes; remove {folder} and run its stage again"
        )
    return path


def _check_columns(path: Path, schema: pa.Schema, columns: Sequence[str] | None) -> None:
    if unknown := [name for name in columns or () if name not in schema.names]:
        raise DataError(
            f"{path}: has no column {', '.join(map(repr, unknown))}; it has"
            f" {', '.join(schema.names)}; if another version of dasd-lite wrote it, run its stage again"
        )
