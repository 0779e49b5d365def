"""A dataset folder: Parquet shards and a manifest, written so that a kill at any instant loses nothing.

A folder with `manifest.json` is finished and never changes again; one without is unfinished. The
manifest is written last. An identity says what a folder holds (stage, its version, the options that
matter, the fingerprints of what it reads); the same identity is not computed twice, another one is
refused by name unless `force` is given.

The two writers of such folders are in journal.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dasd_lite.data.manifest import read_manifest
from dasd_lite.errors import DataError

# --- identity ---------------------------------------------------------------------------------------


# --- reading ----------------------------------------------------------------------------------------


def shards(folder: Path, table: str) -> list[Path]:
    """Return the shard files of one table of a finished folder, in order."""
    tables = read_manifest(folder)["tables"]
    if table not in tables:
        raise DataError(f"{folder}: holds {', '.join(tables) or 'no table'}, not {table!r}")
    for shard in tables[table]:
        path = folder / shard["file"]
        found = path.stat().st_size if path.exists() else None
        if found != shard["bytes"]:
            what = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{path}: {what}, was {shard['bytes']} bytes; remove {folder} and run its stage again")
    return [folder / shard["file"] for shard in tables[table]]


def num_rows(folder: Path, table: str) -> int:
    """Return the number of rows of one table of a finished folder."""
    return sum(shard["rows"] for shard in read_manifest(folder)["tables"].get(table, []))


def batches(
    folder: Path, table: str, columns: Sequence[str] | None = None, batch_size: int = 128
) -> Iterator[pa.RecordBatch]:
    """Stream one table of a finished folder in batches of exactly `batch_size` rows (the last may have fewer).

    Memory stays at a few row groups whatever the table's size; two tables of equally many rows come in step.
    """
    waiting: list[pa.RecordBatch] = []
    for path in shards(folder, table):
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=batch_size, columns=list(columns) if columns else None):
                waiting.append(batch)
                if sum(b.num_rows for b in waiting) >= batch_size:
                    whole = pa.concat_batches(waiting)
                    yield whole.slice(0, batch_size)
                    waiting = [whole.slice(batch_size)] if whole.num_rows > batch_size else []
    if waiting:
        yield pa.concat_batches(waiting)


def read_table(folder: Path, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one table (or some of its columns) of a finished folder into memory."""
    parts = [pq.read_table(path, columns=list(columns) if columns else None) for path in shards(folder, table)]
    if not parts:
        raise DataError(f"{folder}: table {table!r} has no shard")
    return pa.concat_tables(parts)


# --- writing ----------------------------------------------------------------------------------------
