"""A dataset folder: Parquet shards and a manifest, written so that a kill at any instant loses nothing.

A folder with `manifest.json` is finished and never changes again; one without is unfinished. The
manifest is written last. An identity says what a folder holds (stage, its version, the options that
matter, the fingerprints of what it reads); the same identity is not computed twice, another one is
refused by name unless `force` is given.

The two writers of such folders are in journal.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from dasd_lite.config.models import semantic
from dasd_lite.data.records import digest
from dasd_lite.errors import CheckpointError, DataError

SCHEMA_VERSION = 1
PACKAGES = ("dasd-lite", "numpy", "pyarrow", "tokenizers", "torch", "transformers", "peft", "bitsandbytes", "vllm")
_SQLITE_NEEDS = 64 << 10  # bytes; with less SQLite often says "disk I/O error" and not that the disk is full


# --- identity ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What a folder holds: equal identities hold equal data."""

    stage: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Hash over all of it."""
        return digest(self.stage, self.version, self.config, self.inputs)

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """Name what `found` (a manifest) has otherwise, one phrase each."""
        old, new = _flat(found), _flat({"version": self.version, "config": self.config, "inputs": self.inputs})
        return [
            f"{key.removeprefix('config.')}: {old.get(key, 'not set')} there, {new.get(key, 'not set')} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key.split(".")[0] in ("version", "config", "inputs")
        ]


def identify(
    stage: str, version: int, config: BaseModel | Mapping[str, Any], inputs: Mapping[str, Path | str]
) -> Identity:
    """Build the identity of a stage's result; an input is a path, or a fingerprint as a string."""
    options = semantic(config) if isinstance(config, BaseModel) else dict(config)
    return Identity(
        stage, version, options, {k: v if isinstance(v, str) else fingerprint(v) for k, v in inputs.items()}
    )


def fingerprint(path: Path) -> str:
    """Hash what lies at `path`: a dataset by its manifest, a model folder or a file by its content."""
    if (path / "manifest.json").exists():
        return str(read_manifest(path)["fingerprint"])
    if path.name == "model" and (path.parent / "manifest.json").exists():  # what train wrote beside its manifest
        return digest("model", fingerprint(path.parent))
    if path.is_file():
        return _hash_file(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; if a stage writes it, run its stage first")
    names = [p for p in sorted(path.iterdir()) if p.suffix in (".json", ".jinja", ".safetensors", ".model", ".txt")]
    return digest([(p.name, _hash_file(p)) for p in names if p.name != "README.txt"])


def _hash_file(path: Path) -> str:
    state = path.stat()
    return _hash_content(path.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)  # weights of many GB are read once in a run, not once a step
def _hash_content(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {k: v for key in value for k, v in _flat(value[key], f"{prefix}.{key}" if prefix else key).items()}


# --- reading ----------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a finished folder."""
    path = folder / "manifest.json"
    if not path.exists():
        what = "is unfinished: run its stage again" if folder.is_dir() else "does not exist: run its stage first"
        raise DataError(f"{folder}: the folder {what}")
    manifest = _read_state(path)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version {manifest.get('schema_version')}, this version reads {SCHEMA_VERSION}")
    return manifest


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); remove {path.parent} and run its stage again") from None
    if not isinstance(state, dict) or not {"stage", "fingerprint", "inputs", "config"} <= state.keys():
        raise DataError(f"{path}: damaged (no manifest of ours); remove {path.parent} and run its stage again")
    return state


def parse_metrics(path: Path, number: int, line: str) -> dict[str, Any]:
    """Read a line of a training's metrics.jsonl."""
    try:
        found: dict[str, Any] = json.loads(line)
        found["step"], found["loss"], found["learning_rate"], found["grad_norm"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}:{number}: damaged ({error}); take the line out, or train again") from None
    return found


def read_timing(folder: Path) -> dict[str, float]:
    """Read what a finished folder's stage took; nothing where it was not kept."""
    path = folder / "timing.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


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


def read(folder: Path, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one table (or some of its columns) of a finished folder into memory."""
    parts = [pq.read_table(path, columns=list(columns) if columns else None) for path in shards(folder, table)]
    if not parts:
        raise DataError(f"{folder}: table {table!r} has no shard")
    return pa.concat_tables(parts)


# --- writing ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; a second process is refused with the first one's pid."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"out = {folder}: cannot be a folder ({error.strerror}); name another") from None
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(
                f"{folder}: in use by process {file.read().strip() or '?'}; wait for it or stop it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into one line; everything committed before stays."""
    try:
        yield
    except (OSError, sqlite3.OperationalError, pa.ArrowException) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = full or "is full" in str(error) or "No space left" in str(error)
        if full or (isinstance(error, sqlite3.OperationalError) and free_bytes(folder) < _SQLITE_NEEDS):
            raise DataError(
                f"{folder}: no space left on the device; what is committed stays; free some and run the same again"
            ) from error
        if isinstance(error, OSError) and error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DataError(f"{error.filename}: {error.strerror}; what is committed stays") from error
        raise


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free where `folder` is or is to be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


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
    found = _read_state(state)
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


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames within `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make what was written to `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin(folder: Path, identity: Identity, config: BaseModel | None = None) -> None:
    """Mark `folder` as begun for `identity`; a folder begun before keeps what it has."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "unfinished.json").exists():
        write_atomic(folder / "unfinished.json", _to_json(_state(identity, config)))


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
        write_atomic(folder / "timing.json", _to_json(timing))
    sized = {
        name: [{**shard, "bytes": (folder / shard["file"]).stat().st_size} for shard in files]
        for name, files in tables.items()
    }
    manifest = {**_state(identity, config), "tables": sized, "counts": counts, "packages": _versions()}
    write_atomic(folder / "manifest.json", _to_json(manifest))
    for name in ("unfinished.json", "journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    return manifest


def _state(identity: Identity, config: BaseModel | None) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": identity.stage,
        "version": identity.version,
        "fingerprint": identity.fingerprint,
        "config": identity.config,
        "resolved": config.model_dump(mode="json") if config else identity.config,
        "inputs": identity.inputs,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
