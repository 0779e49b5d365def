"""The life of a dataset folder: begun, written, published, cleared."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from dasd_lite.data.files import disk_errors, sync_file, write_atomic
from dasd_lite.data.manifest import Identity, new_state, package_versions, read_state, to_json
from dasd_lite.errors import CheckpointError, DataError


def is_finished(folder: Path, identity: Identity, *, force: bool = False, keep: bool = False) -> bool:
    """Tell whether `folder` already holds `identity`, finished.

    A folder that holds something else is refused with the names of what differs; with `force` it is removed.
    So is without it an unfinished one that holds no work worth going on with. With `keep` nothing is removed yet, for
    a stage that may still be refused: it asks again when it begins.
    """
    state = next((p for p in (folder / "manifest.json", folder / "unfinished.json") if p.exists()), None)
    if state is None:
        if folder.is_dir() and any(p.suffix != ".tmp" for p in folder.iterdir()) and not force:
            raise DataError(
                f"{folder}: the folder is not empty and no stage of ours made it; choose another or remove it"
            )
        if not keep:
            clear(folder)
        return False
    found = read_state(state)
    if found["fingerprint"] == identity.fingerprint:
        return state.name == "manifest.json"
    if not force and (state.name == "manifest.json" or _has_progress(folder)):
        names = "; ".join(identity.differences(found)) or f"it was made by {found['stage']}"
        raise CheckpointError(f"{folder}: made with another configuration ({names}); use another out folder or --force")
    if not keep:
        clear(folder)
    return False


def _has_progress(folder: Path) -> bool:
    """Tell whether an unfinished folder holds a journal or checkpoints; a short stage's starts afresh anyway."""
    return any(path.is_dir() or path.name == "journal.sqlite" for path in folder.iterdir())


def clear(folder: Path) -> None:
    """Remove a folder so that a kill in the middle leaves one that is known to be unfinished and ours."""
    if not folder.is_dir():
        return
    state = folder / "unfinished.json"
    if (folder / "manifest.json").exists():
        (folder / "manifest.json").rename(state)
    for path in folder.glob("journal.sqlite*"):  # before the shards that it speaks of
        path.unlink()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != state:
            path.unlink()
    state.unlink(missing_ok=True)
    folder.rmdir()


def begin(folder: Path, identity: Identity, config: BaseModel | None = None) -> None:
    """Mark `folder` as begun for `identity`; a folder begun before keeps what it has."""
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
) -> dict[str, Any]:
    """Write the manifest: from this instant the folder is finished.

    `timing` goes to a file of its own, so that the same seed gives the same manifest.
    """
    if timing:
        write_atomic(folder / "timing.json", to_json(timing))
    sized = {
        name: [{**shard, "bytes": (folder / shard["file"]).stat().st_size} for shard in files]
        for name, files in tables.items()
    }
    manifest = {**new_state(identity, config), "tables": sized, "counts": counts, "packages": package_versions()}
    write_atomic(folder / "manifest.json", to_json(manifest))
    for name in ("unfinished.json", "journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    return manifest


class FolderWriter:
    """What both writers share: a folder that becomes finished by `publish`, and its shards."""

    def __init__(self, folder: Path, identity: Identity, config: BaseModel | None) -> None:
        """Begin the folder, or go on with it."""
        self.folder, self.identity, self.config = folder, identity, config
        self._tables: dict[str, list[dict[str, Any]]] = {}
        self._started = time.perf_counter()
        with disk_errors(folder):
            begin(folder, identity, config)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of open files; only `publish` finishes the folder."""
        with contextlib.suppress(OSError, pa.ArrowException) if error else contextlib.nullcontext():
            self.close()  # after an error its own is what is told, not one of closing half a shard

    def close(self) -> None:
        """Let go of open files; the folder stays as it is."""

    def publish(self, counts: Mapping[str, Any], **timing: float) -> dict[str, Any]:
        """Finish the folder with what went in and came out."""
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
            )


class ShardWriter(FolderWriter):
    """Writes the tables of a short stage; an unfinished folder starts afresh.

    `schemas` maps a table's name to its columns. Batches are written as they come, a row group each.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        schemas: Mapping[str, pa.Schema],
        config: BaseModel | None = None,
        shard_rows: int = 10_000,
    ) -> None:
        """Begin `folder`, which `is_finished` has cleared."""
        clear(folder)
        super().__init__(folder, identity, config)
        self._schemas, self._shard_rows = schemas, shard_rows
        self._open: dict[str, pq.ParquetWriter] = {}
        self._tables = {name: [] for name in schemas}

    def write(self, table: str, batch: pa.RecordBatch | pa.Table) -> None:
        """Append rows to a table; a shard ends with the batch that fills it."""
        if batch.num_rows == 0:
            return
        with disk_errors(self.folder):
            if table not in self._open:
                name = f"{table}-{len(self._tables[table]):05d}.parquet"
                self._tables[table].append({"file": name, "rows": 0})
                self._open[table] = pq.ParquetWriter(self.folder / name, self._schemas[table], compression="zstd")
            whole = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
            self._open[table].write_table(whole.cast(self._schemas[table]))
            self._tables[table][-1]["rows"] += batch.num_rows
            if self._tables[table][-1]["rows"] >= self._shard_rows:
                self._end_shard(table)

    def _end_shard(self, table: str) -> None:
        self._open.pop(table).close()
        sync_file(self.folder / self._tables[table][-1]["file"])

    def close(self) -> None:
        """End the open shards."""
        with disk_errors(self.folder):
            for table in list(self._open):
                self._end_shard(table)
