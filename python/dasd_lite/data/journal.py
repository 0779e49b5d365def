"""The writer of stages that take hours or days: every finished item is committed at once.

Input: items in any order of completion. Output: shards of consecutive positions, so the finished files do not depend
on that order. Invariant: whenever the process is killed, no finished item is lost or duplicated.

Rows that have keys outlive their plan. When a folder is opened with another plan (more prompts, more answers for each,
a higher limit), rows whose keys are still asked for are kept, the others are left out but stay on disk, and only what
is missing is open. Then an order file says which rows the table consists of.
"""

from __future__ import annotations

import contextlib
import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from dasd_lite.data.files import disk_errors, sync_path, write_atomic
from dasd_lite.data.manifest import Identity, new_state, read_manifest, read_state, read_timing, to_json
from dasd_lite.data.seeds import digest
from dasd_lite.data.stored import (
    ORDER,
    Limit,
    Place,
    ShardRows,
    index_by_key,
    read_columns,
    read_names,
    replace_columns,
    serves,
)
from dasd_lite.data.writer import JOURNAL_FILE, FolderWriter
from dasd_lite.errors import DataError

Keys = Sequence[str] | Callable[[], Sequence[str]]
_CREATE = (
    "CREATE TABLE IF NOT EXISTS items (position INTEGER PRIMARY KEY, row BLOB)",
    "CREATE TABLE IF NOT EXISTS shards (number INTEGER PRIMARY KEY, file TEXT, rows INTEGER)",
    "CREATE TABLE IF NOT EXISTS usage (name TEXT PRIMARY KEY, amount INTEGER)",
    "CREATE TABLE IF NOT EXISTS base (number INTEGER)",  # shards below it are of earlier plans
)
_COUNTED = ("prompt_tokens", "completion_tokens")
"""What `timing.json` keeps of the usage, which goes on when the folder grows."""
_ROW_GROUP = 64


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

    An item is one row at a position of the stage's plan, which has `total` positions. Those that no shard of an earlier
    plan serves are its open positions; without an earlier plan, all. A shard holds the next `shard_items` of them. When
    the last of these is committed, the shard is written to a temporary name, synced, and renamed; the transaction that
    records its name deletes its rows from SQLite. So every item is either in SQLite or in a recorded shard, never in
    both.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        schema: pa.Schema,
        total: int,
        *,
        keys: Keys | None = None,
        key: str = "uid",
        limit: Limit = None,
        columns: Callable[[int], Mapping[str, Any]] | None = None,
        table: str = "rollouts",
        config: BaseModel | None = None,
        late: bool = False,
        shard_items: int = 1000,
    ) -> None:
        """Open `folder`, or create it, for `total` items of `schema`.

        Args:
            folder: The folder, finished under another plan, unfinished, or not there yet.
            identity: What it will hold.
            schema: Columns of a row.
            total: Positions of the plan.
            keys: The key of each position; a function is called only if rows are looked up by their keys.
            key: The column of `schema` that has them.
            limit: Maximum tokens of an answer, see `stored.index_by_key`.
            columns: Values at a position that its key does not decide, such as the reference answer; they replace those
                of a row that was stored under another plan or in another folder.
            table: Name of the table.
            config: All options of the stage.
            late: `columns` is set anew before `publish`, with values that are known only when every item is there.
            shard_items: Rows of a shard.
        """
        self._table, self._schema, self._shard_items = table, schema, shard_items
        with disk_errors(folder):
            _take_up(folder, identity, config, table, schema)
        super().__init__(folder, identity, config)
        self.total, self.columns = total, columns
        self._key, self._limit, self._keys, self._late = key, limit, keys, late
        with disk_errors(folder):
            self._db = _open(folder)
        recorded = self._db.execute("SELECT number, file FROM shards").fetchall()
        removed = [number for number, file in recorded if not (folder / file).exists()]
        if removed and _base(self._db):  # by hand: other positions are open now, so what is there is found by its keys
            with disk_errors(folder):
                _write_rest(self._db, folder, table, schema)
        for number in removed:  # make its items again
            self._db.execute("DELETE FROM shards WHERE number = ?", (number,))
        self._files = {number: folder / file for number, file in self._db.execute("SELECT number, file FROM shards")}
        self._base = _base(self._db)
        self._served, self._is_closed = self._serve(), False
        self._open: Sequence[int] = range(total)
        if self._served:
            self._open = [position for position in range(total) if position not in self._served]
        self._num_committed = [0] * (-(-len(self._open) // shard_items))  # items of each shard that are still in SQLite
        for (position,) in self._db.execute("SELECT position FROM items"):
            self._num_committed[self._shard_of(position)] += 1
        # Killed between writing a shard and recording it: its rows are still in SQLite.
        for path in folder.glob(f"{table}-*"):
            if path.suffix == ".tmp" or path not in self._files.values():
                path.unlink()
        with disk_errors(folder):
            self._seal(range(len(self._num_committed)))

    @property
    def has_grown(self) -> bool:
        """Whether the folder held rows of an earlier plan, used or not."""
        return self._base > 0

    @property
    def num_kept(self) -> int:
        """How many positions are served by rows of an earlier plan."""
        return len(self._served)

    def _serve(self) -> dict[int, Place]:
        """Find the rows of earlier plans that this one asks for."""
        earlier = sorted((number, path) for number, path in self._files.items() if number < self._base)
        if not earlier or self._keys is None:
            return {}
        places = index_by_key(earlier, self._key, self._limit)
        return {position: places[key] for position, key in enumerate(self._all_keys()) if key in places}

    def _all_keys(self) -> Sequence[str]:
        if callable(self._keys):
            self._keys = self._keys()
        assert self._keys is not None and len(self._keys) == self.total, "every position has a key"
        return self._keys

    def done(self) -> set[int]:
        """Return the positions of all items that are committed, now or under an earlier plan."""
        finished = {position for (position,) in self._db.execute("SELECT position FROM items")}
        for number in self._files:
            if number >= self._base:
                finished.update(self._open[slice(*self._span(number - self._base))])
        return finished.union(self._served)

    def counts(self) -> dict[str, int]:
        """Return what `commit` has counted, over all runs that worked on this folder."""
        return dict(self._db.execute("SELECT name, amount FROM usage").fetchall())

    def commit(
        self, rows: Mapping[int, Mapping[str, Any] | pa.RecordBatch], counts: Mapping[str, int] | None = None
    ) -> None:
        """Commit finished items (position → row) and add to the counts, in one transaction."""
        with disk_errors(self.folder):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for position, row in rows.items():
                    if not isinstance(row, pa.RecordBatch):
                        row = pa.RecordBatch.from_pylist([dict(row)], schema=self._schema)
                    self._db.execute("INSERT INTO items VALUES (?, ?)", (position, row.serialize().to_pybytes()))
                for name, amount in (counts or {}).items():
                    _count(self._db, name, amount)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            touched = [self._shard_of(position) for position in rows]
            for number in touched:
                self._num_committed[number] += 1
            self._seal(sorted(set(touched)))

    def take_over(
        self,
        folders: Iterable[Path],
        *,
        counts: Mapping[str, float] | None = None,
    ) -> int:
        """Commit rows that other folders of the stage have for open positions; return how many.

        Args:
            folders: The folders, finished or not.
            counts: Added to what has been counted, once and only if a row is taken over.
        """
        taken = 0
        for folder in folders:
            if not folder.is_dir():
                raise DataError(f"reuse: {folder}: no such folder; name one that the same stage wrote")
            missing = set(range(self.total)) - self.done()
            if not missing or folder.resolve() == self.folder.resolve():
                continue
            wanted: dict[str, list[int]] = {}  # two answers that are the same share a key, and so their scores
            for at, key in enumerate(self._all_keys()):
                if at in missing:
                    wanted.setdefault(key, []).append(at)
            stored = _stored_rows(folder, self._table, self._schema, self._key, self._limit, wanted)
            while rows := {at: row for key, row in islice(stored, _ROW_GROUP) for at in wanted[key]}:
                newer = {at: self.columns(at) if self.columns else {} for at in rows}
                used = {name: int(amount) for name, amount in (counts or {}).items() if name in _COUNTED}
                self.commit({at: replace_columns(row, _lists(newer[at])) for at, row in rows.items()}, used)
                counts = None
                taken += len(rows)
        return taken

    def _shard_of(self, position: int) -> int:
        """Return the number of the shard that an open position goes to, counted from the first of this plan."""
        return bisect_left(self._open, position) // self._shard_items

    def _span(self, number: int) -> tuple[int, int]:
        return number * self._shard_items, min((number + 1) * self._shard_items, len(self._open))

    def _seal(self, numbers: Iterable[int]) -> None:
        """Write those of these shards whose items are all committed."""
        for number in numbers:
            first, end = self._span(number)
            if self._num_committed[number] < end - first or self._base + number in self._files:
                continue
            positions = self._open[first], self._open[end - 1]
            path = _write_shard(self._db, self.folder, self._table, self._base + number, self._schema, positions)
            self._files[self._base + number] = path
            self._num_committed[number] = 0

    def _places(self) -> dict[int, Place]:
        """Return the place of every finished item, by its position."""
        places = dict(self._served)
        for number in self._files:
            if number >= self._base:
                for row, position in enumerate(self._open[slice(*self._span(number - self._base))]):
                    places[position] = Place(number, row)
        return places

    def batches(self, columns: Sequence[str], batch_size: int = 128) -> Iterator[pa.RecordBatch]:
        """Stream the finished items in the order of the plan."""
        places = [place for _, place in sorted(self._places().items())]
        rows = ShardRows(self._files, columns)
        for first in range(0, len(places), batch_size):
            yield rows.read(places[first : first + batch_size]).to_batches()[0]

    def publish(self, counts: Mapping[str, Any], **timing: float) -> dict[str, Any]:
        """Write the manifest. Every item must be committed, unless `close_as_it_is` was called."""
        places = self._places()
        if len(places) < self.total and not self._is_closed:
            raise DataError(
                f"{self.folder}: {self.total - len(places)} of {self.total} items are not done; run the same command"
                " to resume"
            )
        rows = self._db.execute("SELECT number, file, rows FROM shards ORDER BY number").fetchall()
        self._tables = {self._table: [{"file": file, "rows": count} for _, file, count in rows]}
        if self.has_grown or self._late:
            numbers = {number: index for index, (number, _, _) in enumerate(rows)}
            with disk_errors(self.folder):
                self._write_order(places, numbers)
        missing = [self._all_keys()[position] for position in range(self.total) if position not in places]
        if missing:
            counts = {**counts, "missing": len(missing)}
        if without := [*missing, *self._left_out()]:
            made_from = self.identity.fingerprint
            self.state = {"fingerprint": digest(made_from, "without", without), "closed_from": made_from}
        return super().publish(counts, **timing)

    def _left_out(self) -> list[str]:
        """Return the keys of answers that were given up after errors; a plan that asks again may get them."""
        if not self.counts().get("skipped"):
            return []
        rows = (zip(b[self._key], b["finish_reason"], strict=True) for b in self.batches((self._key, "finish_reason")))
        return [key.as_py() for batch in rows for key, reason in batch if reason.as_py() == "error"]

    def close_as_it_is(self) -> int:
        """Let `publish` accept that items are missing; return how many are there.

        Raises:
            DataError: There is none.
        """
        with disk_errors(self.folder):
            _write_rest(self._db, self.folder, self._table, self._schema)
        self._files = {n: self.folder / file for n, file in self._db.execute("SELECT number, file FROM shards")}
        self._base, self._is_closed = _base(self._db), True
        self._served = self._serve()
        self._open = [position for position in range(self.total) if position not in self._served]
        if not self._served:
            raise DataError(f"{self.folder}: has no answer yet, so there is nothing to finish with")
        return len(self._served)

    def _write_order(self, places: Mapping[int, Place], numbers: Mapping[int, int]) -> None:
        positions = sorted(places)
        values = [self.columns(position) for position in positions] if self.columns else [{}]
        newer = {name: [value[name] for value in values] for name in values[0]}
        arrays: dict[str, Any] = {
            "shard": [numbers[places[position].shard] for position in positions],
            "row": [places[position].row for position in positions],
        }
        schema = pa.schema([*ORDER, *(self._schema.field(name) for name in newer)])
        name = f"{self._table}.order.parquet"
        temporary = self.folder / f"{name}.tmp"
        pq.write_table(pa.table(arrays | newer, schema=schema), temporary, compression="zstd")
        sync_path(temporary)
        temporary.rename(self.folder / name)
        self._orders = {self._table: name}

    def close(self) -> None:
        """Close SQLite."""
        self._db.close()


def _lists(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [value] for name, value in values.items()}


# --- SQLite and shards --------------------------------------------------------------------------------


def _open(folder: Path) -> sqlite3.Connection:
    db = sqlite3.connect(folder / JOURNAL_FILE, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")  # a commit survives a kill, a shard survives a power failure too
    for statement in _CREATE:
        db.execute(statement)
    return db


def _base(db: sqlite3.Connection) -> int:
    """Return the number of the first shard of this plan."""
    return int(db.execute("SELECT coalesce(max(number), 0) FROM base").fetchone()[0])


def _count(db: sqlite3.Connection, name: str, amount: int) -> None:
    db.execute("INSERT OR IGNORE INTO usage VALUES (?, 0)", (name,))
    db.execute("UPDATE usage SET amount = amount + ? WHERE name = ?", (amount, name))


@contextlib.contextmanager
def _lasting(db: sqlite3.Connection) -> Iterator[None]:
    """Run a transaction that survives a power failure."""
    db.execute("PRAGMA synchronous = FULL")
    db.execute("BEGIN IMMEDIATE")
    yield
    db.execute("COMMIT")
    db.execute("PRAGMA synchronous = NORMAL")


def _take_up(folder: Path, identity: Identity, config: BaseModel | None, table: str, schema: pa.Schema) -> None:
    """Make a folder of another plan an unfinished one of this plan; all its rows count as those of earlier plans."""
    finished, unfinished = folder / "manifest.json", folder / "unfinished.json"
    if finished.exists():
        manifest = read_manifest(folder)
        for shard in manifest["tables"].get(table, []):
            read_columns(folder / shard["file"], schema.names[:1])  # raises if it is damaged, before anything changes
        for path in folder.glob(f"{JOURNAL_FILE}*"):  # left by a kill in the middle of this function
            path.unlink()
        with contextlib.closing(_open(folder)) as db, _lasting(db):
            for shard in manifest["tables"].get(table, []):
                number = int(Path(shard["file"]).stem.rpartition("-")[2])
                db.execute("INSERT INTO shards VALUES (?, ?, ?)", (number, shard["file"], shard["rows"]))
            db.execute("INSERT INTO base SELECT coalesce(max(number) + 1, 0) FROM shards")
            for name, amount in read_timing(folder).items():
                if name in _COUNTED:
                    _count(db, name, int(amount))
        write_atomic(unfinished, to_json(new_state(identity, config)))
        finished.unlink()
        sync_path(folder)
    elif unfinished.exists() and read_state(unfinished)["fingerprint"] != identity.fingerprint:
        with contextlib.closing(_open(folder)) as db:
            _write_rest(db, folder, table, schema)
        write_atomic(unfinished, to_json(new_state(identity, config)))


def _write_rest(db: sqlite3.Connection, folder: Path, table: str, schema: pa.Schema) -> None:
    """Move all items from SQLite to a shard, whether they fill one or not, and begin a new plan behind it."""
    number = int(db.execute("SELECT coalesce(max(number) + 1, 0) FROM shards").fetchone()[0])
    number = max(number, _base(db))
    span = db.execute("SELECT min(position), max(position) FROM items").fetchone()
    if span[0] is not None:
        _write_shard(db, folder, table, number, schema, span, ends_plan=True)
        return
    with _lasting(db):
        db.execute("INSERT INTO base VALUES (?)", (number,))


def _write_shard(
    db: sqlite3.Connection,
    folder: Path,
    table: str,
    number: int,
    schema: pa.Schema,
    span: tuple[int, int],
    *,
    ends_plan: bool = False,
) -> Path:
    """Move the items at the positions of `span`, both ends included, from SQLite to a shard.

    With `ends_plan` a new plan begins behind it, in the same transaction: a shard with gaps is none of the old plan's.
    """
    path = folder / f"{table}-{number:05d}.parquet"
    temporary = path.with_name(f"{path.name}.tmp")
    stored = db.execute("SELECT row FROM items WHERE position BETWEEN ? AND ? ORDER BY position", span)
    num_rows = 0
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        while payloads := stored.fetchmany(_ROW_GROUP):
            rows = [pa.ipc.read_record_batch(pa.py_buffer(row), schema) for (row,) in payloads]
            writer.write_table(pa.Table.from_batches(rows).combine_chunks())
            num_rows += len(rows)
    sync_path(temporary)
    temporary.rename(path)
    sync_path(folder)
    with _lasting(db):
        db.execute("INSERT INTO shards VALUES (?, ?, ?)", (number, path.name, num_rows))
        db.execute("DELETE FROM items WHERE position BETWEEN ? AND ?", span)
        if ends_plan:
            db.execute("INSERT INTO base VALUES (?)", (number + 1,))
    return path


# --- rows of other folders ----------------------------------------------------------------------------


def stored_keys(folder: Path, table: str, schema: pa.Schema, limit: Limit, key: str = "uid") -> set[str]:
    """Return the keys of all rows of a folder, finished or not, that serve them under a limit."""
    try:
        files, items = _files_and_items(folder, table, schema)
    except DataError:
        return set()
    keys = set(index_by_key(sorted(files.items()), key, limit))
    return keys | (set(items.filter(pa.array(serves(items, limit)))[key].to_pylist()) if items is not None else set())


def stored_rows(folder: Path, table: str, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """Yield all rows that a folder under way has so far."""
    files, items = _files_and_items(folder, table, schema)
    for _, path in sorted(files.items()):
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_ROW_GROUP):
                yield from batch.to_pylist()
    for batch in items.to_batches() if items is not None else ():  # of one row each
        yield from batch.to_pylist()


def _stored_rows(
    folder: Path, table: str, schema: pa.Schema, key: str, limit: Limit, wanted: Container[str]
) -> Iterator[tuple[str, pa.Table]]:
    """Yield each of the wanted keys that another folder, finished or not, has, and its row."""
    files, items = _files_and_items(folder, table, schema)
    if any(not set(schema.names) <= set(read_names(path)) for path in files.values()):
        return  # written by another version
    places = index_by_key(sorted(files.items()), key, limit)
    found = sorted((place, name) for name, place in places.items() if name in wanted)
    rows = ShardRows(files, schema.names)
    for first in range(0, len(found), _ROW_GROUP):
        part = found[first : first + _ROW_GROUP]
        read = rows.read([place for place, _ in part]).select(schema.names).cast(schema)
        yield from ((name, read.slice(row, 1)) for row, (_, name) in enumerate(part))
    if items is not None:
        names = items[key].to_pylist()
        newest = {names[row]: row for row in np.flatnonzero(serves(items, limit)).tolist()}  # scores may share a key
        for name, row in newest.items():
            if name in wanted and name not in places:
                yield name, items.slice(row, 1)


def _files_and_items(folder: Path, table: str, schema: pa.Schema) -> tuple[dict[int, Path], pa.Table | None]:
    """Return the shards of a folder by their numbers, and what its journal holds beside them.

    Rows of a journal that do not have this schema are left out.
    """
    if (folder / "manifest.json").exists():
        names = [shard["file"] for shard in read_manifest(folder)["tables"].get(table, [])]
        return {number: folder / name for number, name in enumerate(names)}, None
    if not (folder / JOURNAL_FILE).exists():
        return {}, None
    with contextlib.closing(sqlite3.connect(f"file:{folder / JOURNAL_FILE}?mode=ro", uri=True)) as db:
        try:
            files = dict(db.execute("SELECT number, file FROM shards").fetchall())
            payloads = db.execute("SELECT row FROM items ORDER BY position").fetchall()
            rows = [pa.ipc.read_record_batch(pa.py_buffer(row), schema) for (row,) in payloads]
        except (sqlite3.DatabaseError, pa.ArrowException):  # begun this moment, or by another version
            return {}, None
    return {number: folder / name for number, name in files.items()}, pa.Table.from_batches(rows, schema)
