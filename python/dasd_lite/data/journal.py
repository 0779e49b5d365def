"""The writer of stages that take hours or days: every finished item is committed at once.

Input: items in any order of completion. Output: shards of consecutive positions, so the finished files do not depend
on that order. Invariant: whenever the process is killed, no finished item is lost or duplicated.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from dasd_lite.data.files import disk_errors, sync_path
from dasd_lite.data.manifest import Identity
from dasd_lite.data.writer import JOURNAL_FILE, FolderWriter
from dasd_lite.errors import DataError


def read_counts(folder: Path) -> dict[str, float]:
    """Read what the journal of an unfinished folder has counted so far; empty if there is no journal."""
    path = folder / JOURNAL_FILE
    if not path.exists():
        return {}
    with contextlib.closing(sqlite3.connect(path)) as db, contextlib.suppress(sqlite3.OperationalError):
        return dict(db.execute("SELECT name, amount FROM usage").fetchall())
    return {}


class Journal(FolderWriter):
    """Commits the items of a long stage to SQLite and moves them into shards as these fill up.

    An item is one row at a position of the stage's plan, which has `total` positions. Shard i holds the positions
    i × shard_items to (i + 1) × shard_items - 1. When the last of them is committed, the shard is written to a
    temporary name, synced, and renamed; the transaction that records its name deletes its rows from SQLite. So every
    item is either in SQLite or in a recorded shard, never in both.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        schema: pa.Schema,
        total: int,
        *,
        table: str = "rollouts",
        config: BaseModel | None = None,
        shard_items: int = 1000,
    ) -> None:
        """Open `folder`, or create it, for `total` items of `schema`."""
        super().__init__(folder, identity, config)
        self.total, self._schema, self._table, self._shard_items = total, schema, table, shard_items
        with disk_errors(folder):
            self._db = sqlite3.connect(folder / JOURNAL_FILE, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            # A commit survives a kill, a shard survives a power failure too.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS items (position INTEGER PRIMARY KEY, row BLOB)")
            self._db.execute("CREATE TABLE IF NOT EXISTS shards (number INTEGER PRIMARY KEY, file TEXT, rows INTEGER)")
            self._db.execute("CREATE TABLE IF NOT EXISTS usage (name TEXT PRIMARY KEY, amount INTEGER)")
        for number, file in self._db.execute("SELECT number, file FROM shards").fetchall():
            if not (folder / file).exists():  # removed by hand: make its items again
                self._db.execute("DELETE FROM shards WHERE number = ?", (number,))
        self._recorded = {number for (number,) in self._db.execute("SELECT number FROM shards")}
        self._num_committed = [0] * (-(-total // shard_items))  # items of each shard that are still in SQLite
        for (position,) in self._db.execute("SELECT position FROM items"):
            self._num_committed[position // shard_items] += 1
        # Killed between writing a shard and recording it: its rows are still in SQLite.
        for path in folder.glob(f"{table}-*"):
            if path.suffix == ".tmp" or int(path.stem.rsplit("-", 1)[1]) not in self._recorded:
                path.unlink()
        with disk_errors(folder):
            self._seal(range(len(self._num_committed)))

    def done(self) -> set[int]:
        """Return the positions of all committed items."""
        finished = {position for (position,) in self._db.execute("SELECT position FROM items")}
        for number in self._recorded:
            finished.update(range(*self._span(number)))
        return finished

    def counts(self) -> dict[str, int]:
        """Return what `commit` has counted, over all runs that worked on this folder."""
        return dict(self._db.execute("SELECT name, amount FROM usage").fetchall())

    def commit(self, rows: Mapping[int, Mapping[str, Any]], counts: Mapping[str, int] | None = None) -> None:
        """Commit finished items (position → row) and add to the counts, in one transaction."""
        with disk_errors(self.folder):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for position, row in rows.items():
                    batch = pa.RecordBatch.from_pylist([dict(row)], schema=self._schema)
                    payload = batch.serialize().to_pybytes()
                    self._db.execute("INSERT INTO items VALUES (?, ?)", (position, payload))
                for name, amount in (counts or {}).items():
                    self._db.execute("INSERT OR IGNORE INTO usage VALUES (?, 0)", (name,))
                    self._db.execute("UPDATE usage SET amount = amount + ? WHERE name = ?", (amount, name))
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            touched = [position // self._shard_items for position in rows]
            for number in touched:
                self._num_committed[number] += 1
            self._seal(sorted(set(touched)))

    def _span(self, number: int) -> tuple[int, int]:
        return number * self._shard_items, min((number + 1) * self._shard_items, self.total)

    def _seal(self, numbers: Iterable[int]) -> None:
        """Write those of these shards whose items are all committed."""
        for number in numbers:
            first, end = self._span(number)
            if self._num_committed[number] < end - first or number in self._recorded:
                continue
            name = f"{self._table}-{number:05d}.parquet"
            temporary = self.folder / f"{name}.tmp"
            self._write_shard(temporary, first, end)
            temporary.rename(self.folder / name)
            sync_path(self.folder)
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("INSERT INTO shards VALUES (?, ?, ?)", (number, name, end - first))
            self._db.execute("DELETE FROM items WHERE position >= ? AND position < ?", (first, end))
            self._db.execute("COMMIT")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._recorded.add(number)
            self._num_committed[number] = 0

    def _write_shard(self, path: Path, first: int, end: int, group: int = 64) -> None:
        with pq.ParquetWriter(path, self._schema, compression="zstd") as writer:
            for start in range(first, end, group):
                stored = self._db.execute(
                    "SELECT row FROM items WHERE position >= ? AND position < ? ORDER BY position",
                    (start, min(start + group, end)),
                )
                rows = [pa.ipc.read_record_batch(pa.py_buffer(row), self._schema) for (row,) in stored]
                writer.write_table(pa.Table.from_batches(rows).combine_chunks())
        sync_path(path)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Stream the shards in the order of the plan, once all items are committed."""
        for (file,) in self._db.execute("SELECT file FROM shards ORDER BY number").fetchall():
            with pq.ParquetFile(self.folder / file) as shard:
                yield from shard.iter_batches(columns=list(columns))

    def publish(self, counts: Mapping[str, Any], **timing: float) -> dict[str, Any]:
        """Write the manifest. Every item must be committed."""
        missing = self.total - sum(b - a for a, b in map(self._span, self._recorded))
        if missing:
            raise DataError(
                f"{self.folder}: {missing} of {self.total} items are not done; run the same command to resume"
            )
        rows = self._db.execute("SELECT file, rows FROM shards ORDER BY number").fetchall()
        self._tables = {self._table: [{"file": file, "rows": count} for file, count in rows]}
        return super().publish(counts, **timing)

    def close(self) -> None:
        """Close SQLite."""
        self._db.close()
