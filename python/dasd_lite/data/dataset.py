"""Reading the Parquet shards of a finished dataset folder.

Input: a folder that has a manifest.json. Output: its tables, in batches or whole. Invariant: a finished folder never
changes, and a shard whose size differs from the manifest's is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dasd_lite.data.manifest import read_manifest
from dasd_lite.errors import DataError


def shards(folder: Path, table: str) -> list[Path]:
    """Return the shard files of a table, in order.

    Raises:
        DataError: The folder is unfinished or has no such table, or a shard is missing or truncated.
    """
    tables = read_manifest(folder)["tables"]
    if table not in tables:
        raise DataError(f"{folder}: has {', '.join(tables) or 'no tables'}, not {table!r}")
    for shard in tables[table]:
        path = folder / shard["file"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes"
            raise DataError(
                f"{path}: {what}; the manifest says {shard['bytes']} bytes; remove {folder} and run its stage again"
            )
    return [folder / shard["file"] for shard in tables[table]]


def num_rows(folder: Path, table: str) -> int:
    """Return the number of rows of a table; 0 if there is no such table."""
    return sum(shard["rows"] for shard in read_manifest(folder)["tables"].get(table, []))


def batches(
    folder: Path, table: str, columns: Sequence[str] | None = None, batch_size: int = 128
) -> Iterator[pa.RecordBatch]:
    """Stream a table in batches of exactly `batch_size` rows; the last may be smaller.

    Memory stays at a few row groups, whatever the size of the table. The batches of two tables of the same length
    cover the same rows.

    Raises:
        DataError: A column that the table does not have, or what `shards` raises.
    """
    pending: list[pa.RecordBatch] = []
    for path in shards(folder, table):
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            _check_columns(path, file.schema_arrow, columns)
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
    parts = []
    for path in shards(folder, table):
        _check_columns(path, pq.read_schema(path), columns)
        parts.append(pq.read_table(path, columns=list(columns) if columns else None))
    if not parts:
        raise DataError(f"{folder}: table {table!r} is empty")
    return pa.concat_tables(parts)


def _check_columns(path: Path, schema: pa.Schema, columns: Sequence[str] | None) -> None:
    if unknown := [name for name in columns or () if name not in schema.names]:
        raise DataError(f"{path}: has no column {', '.join(map(repr, unknown))}; it has {', '.join(schema.names)}")
