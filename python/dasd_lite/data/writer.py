"""The life of a dataset folder: begun, written, published.

Invariant: a folder without manifest.json is unfinished, and `publish` writes that file last. The writer of stages that
take hours is in journal.py.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from dasd_lite.console import note
from dasd_lite.data.files import disk_errors, sync_path, write_atomic
from dasd_lite.data.manifest import Identity, new_state, package_versions, read_state, state_file, to_json
from dasd_lite.errors import CheckpointError, DataError

JOURNAL_FILE = "journal.sqlite"
"""Where journal.py keeps the items of an unfinished folder."""


_QUICK = ("ingest", "select", "pack")
"""Stages that take seconds or minutes: what they wrote from inputs that have changed is deleted, not set aside."""


def is_finished(
    folder: Path, identity: Identity, *, force: bool = False, keep: bool = False, reopen: bool = False
) -> bool:
    """Return whether `folder` already holds the finished result of `identity`, and make room if it does not.

    What the folder holds of another identity depends on what has changed. Only `identity.grows`: its rows stay, and a
    `Journal` adds those that are missing. Only folders that other stages have written again since: the result is
    deleted if its stage is quick, else set aside. Anything else is refused, or set aside by `force`. An unfinished
    folder with nothing to resume is always deleted.

    Args:
        folder: The folder, which need not exist.
        identity: What it should hold.
        force: Set the folder of another identity aside in any case, but never one that no stage wrote.
        keep: Change nothing yet. For a stage that may still fail before it begins, and then asks again.
        reopen: A folder that was closed with rows missing is not finished.

    Raises:
        CheckpointError: The folder is of another identity; names the differences.
        DataError: The folder holds files that no stage wrote, or is one that the stage reads.
    """
    check_place(folder)
    if folder.resolve() in [path.resolve() for path in identity.folders.values()]:
        raise DataError(f"out = {folder}: {identity.stage} reads this folder; choose another one to write")
    file = state_file(folder)
    if file is None:
        if folder.is_dir() and any(p.suffix != ".tmp" for p in folder.iterdir()):
            raise DataError(f"{folder}: has files that dasd-lite did not write; choose another folder or remove it")
        if not keep:
            _delete(folder)
        return False
    state, finished = read_state(file), file.name == "manifest.json"
    is_closed = state.get("closed_from") == identity.fingerprint
    if state["fingerprint"] == identity.fingerprint or (is_closed and not reopen):
        return finished
    if is_closed:
        return False
    changed, has_progress = identity.changed(state), finished or _has_progress(folder)
    follows = {f"inputs.{name}" for name in identity.folders}
    is_same_stage = state["stage"] == identity.stage
    if is_same_stage and has_progress and changed <= identity.grows:
        return False
    may_change = identity.grows | follows if is_same_stage else frozenset()
    if not force and has_progress and not changed <= may_change:
        reason = "; ".join(identity.differences(state, may_change)) if is_same_stage else f"made by {state['stage']}"
        raise CheckpointError(
            f"{folder}: made with another configuration ({reason}); use another out folder or --force"
        )
    if keep:
        return False
    if has_progress and not (changed <= may_change and identity.stage in _QUICK):
        why = "made again, because its input has changed" if not force else "made again"
        note(f"{folder}: {why}; what it held is now in {set_aside(folder).name}")
    else:
        _delete(folder)
    return False


def set_aside(folder: Path) -> Path:
    """Rename a folder to NAME.replaced-1, or the next number that is free; return its new path."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
        number += 1
    folder.rename(target)
    sync_path(folder.parent)
    return target


def _has_progress(folder: Path) -> bool:
    """Return whether an unfinished folder has a journal or checkpoints to resume from."""
    return any(path.is_dir() for path in folder.iterdir()) or _has_items(folder / JOURNAL_FILE)


def _has_items(journal: Path) -> bool:
    """Return whether a journal holds anything, or cannot be read."""
    if not journal.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(journal)) as db:
            tables = ("items", "shards", "usage")
            return any(db.execute(f"SELECT EXISTS (SELECT 1 FROM {table})").fetchone()[0] for table in tables)
    except sqlite3.DatabaseError:
        return True


def check_place(folder: Path) -> None:
    """Raise DataError if `folder` is no folder and cannot become one."""
    there = next((path for path in (folder, *folder.parents) if path.exists() or path.is_symlink()), None)
    if there is not None and not there.is_dir():
        what = "a link to nothing" if there.is_symlink() and not there.exists() else "a file"
        raise DataError(f"{folder}: {there} is {what}; choose another folder")


def _delete(folder: Path) -> None:
    """Delete a folder so that a kill halfway leaves one that is known to be unfinished and ours.

    Raises:
        DataError: It holds a file that no stage wrote.
    """
    if not folder.is_dir():
        return
    refuse_foreign(folder)
    unfinished = folder / "unfinished.json"
    if (folder / "manifest.json").exists():
        (folder / "manifest.json").rename(unfinished)
    for path in folder.glob(f"{JOURNAL_FILE}*"):  # before the shards that it records
        path.unlink()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != unfinished:
            path.unlink()
    unfinished.unlink(missing_ok=True)
    folder.rmdir()


def refuse_foreign(folder: Path) -> None:
    """Raise DataError if a folder holds a file that no stage wrote."""
    if foreign := sorted(path.name for path in folder.iterdir() if not _is_ours(path)):
        raise DataError(f"{folder}: has {foreign[0]}, which dasd-lite did not write; move it to another place")


def _is_ours(path: Path) -> bool:
    if path.is_dir():
        return path.stem in ("student", "teacher", "checkpoints", "model", "adapter", "tensorboard")
    return path.suffix in (".parquet", ".json", ".jsonl", ".tmp") or path.name.startswith(JOURNAL_FILE)


def begin(folder: Path, identity: Identity, config: BaseModel | None = None) -> None:
    """Create `folder` and record its identity. A folder that was begun before keeps its content."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "unfinished.json").exists():
        write_atomic(folder / "unfinished.json", to_json(new_state(identity, config)))


def publish(
    folder: Path,
    identity: Identity,
    *,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    counts: Mapping[str, Any],
    config: BaseModel | None = None,
    timing: Mapping[str, float] | None = None,
    orders: Mapping[str, str] | None = None,
    state: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the manifest, which makes the folder finished.

    Args:
        folder: The folder that `begin` created.
        identity: What decided its content.
        tables: Name of each table → its shards, as `{"file": name, "rows": number}`.
        counts: What the stage counted.
        config: All options of the stage, to keep them beside the result.
        timing: Seconds and the like. They have their own file, so that the same seed gives the same manifest.
        orders: Name of a table → its order file.
        state: Fields of the manifest in place of those that follow from `identity`.
    """
    if timing:
        write_atomic(folder / "timing.json", to_json(timing))
    sized = {
        name: [{**shard, "bytes": (folder / shard["file"]).stat().st_size} for shard in files]
        for name, files in tables.items()
    }
    manifest = {**new_state(identity, config), **(state or {}), "tables": sized, "counts": counts}
    if orders:
        manifest["orders"] = {
            name: {
                "file": file,
                "rows": pq.read_metadata(folder / file).num_rows,
                "bytes": (folder / file).stat().st_size,
            }
            for name, file in orders.items()
        }
    manifest["packages"] = package_versions()
    write_atomic(folder / "manifest.json", to_json(manifest))
    for name in ("unfinished.json", JOURNAL_FILE, f"{JOURNAL_FILE}-wal", f"{JOURNAL_FILE}-shm"):
        (folder / name).unlink(missing_ok=True)
    return manifest


class FolderWriter:
    """Base class of both writers: a folder that `publish` finishes."""

    def __init__(self, folder: Path, identity: Identity, config: BaseModel | None) -> None:
        """Create the folder, or resume it."""
        self.folder, self.identity, self.config = folder, identity, config
        self._tables: dict[str, list[dict[str, Any]]] = {}
        self._orders: dict[str, str] = {}
        self.state: dict[str, Any] = {}  # fields of the manifest in place of those that follow from the identity
        self._started = time.perf_counter()
        with disk_errors(folder):
            begin(folder, identity, config)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files. Only `publish` finishes the folder."""
        with contextlib.suppress(OSError, pa.ArrowException) if error else contextlib.nullcontext():
            self.close()  # an error while closing half a shard must not hide the one that came first

    def close(self) -> None:
        """Close the files; the folder stays as it is."""

    def publish(self, counts: Mapping[str, Any], **timing: float) -> dict[str, Any]:
        """Finish the folder, with what the stage counted and how long it took; return the manifest."""
        self.close()
        seconds = time.perf_counter() - self._started
        tables = {name: list(files) for name, files in self._tables.items()}
        with disk_errors(self.folder):
            return publish(
                self.folder,
                self.identity,
                tables=tables,
                counts=counts,
                config=self.config,
                timing={"seconds": seconds, **timing},
                orders=self._orders,
                state=self.state,
            )


class ShardWriter(FolderWriter):
    """Writes the tables of a stage that takes seconds, and starts over after a kill.

    `schemas` maps the name of each table to its columns. Each batch becomes a row group.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        schemas: Mapping[str, pa.Schema],
        config: BaseModel | None = None,
        shard_rows: int = 10_000,
    ) -> None:
        """Create `folder`; whatever an unfinished run left in it is deleted."""
        _delete(folder)
        super().__init__(folder, identity, config)
        self._schemas, self._shard_rows = schemas, shard_rows
        self._open: dict[str, pq.ParquetWriter] = {}
        self._tables = {name: [] for name in schemas}

    def write(self, table: str, batch: pa.RecordBatch | pa.Table) -> None:
        """Append rows to a table; the batch that fills a shard ends it."""
        if batch.num_rows == 0:
            return
        with disk_errors(self.folder):
            if table not in self._open:
                name = f"{table}-{len(self._tables[table]):05d}.parquet"
                self._tables[table].append({"file": name, "rows": 0})
                self._open[table] = pq.ParquetWriter(self.folder / name, self._schemas[table], compression="zstd")
            rows = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
            self._open[table].write_table(rows.cast(self._schemas[table]))
            self._tables[table][-1]["rows"] += batch.num_rows
            if self._tables[table][-1]["rows"] >= self._shard_rows:
                self._end_shard(table)

    def _end_shard(self, table: str) -> None:
        self._open.pop(table).close()
        sync_path(self.folder / self._tables[table][-1]["file"])

    def close(self) -> None:
        """Finish the open shards."""
        with disk_errors(self.folder):
            for table in list(self._open):
                self._end_shard(table)
