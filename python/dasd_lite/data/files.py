"""Files that survive a kill: locks, atomic writes, full disks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

from dasd_lite.errors import DataError

_SQLITE_NEEDS = 64 << 10  # bytes; with less SQLite often says "disk I/O error" and not that the disk is full


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


def sync(file: IO[str]) -> None:
    """Make what was written to an open file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())
