"""Locks, atomic writes, and one-line errors for full disks.

Invariant: whenever the process is killed, a file written here is complete or absent.
"""

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

_SQLITE_NEEDS = 64 << 10  # bytes; with less, SQLite often reports "disk I/O error" instead of a full disk


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Reserve a run folder for this process; a second process gets an error with the pid of the first."""
    make_folder(folder)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(
                f"{folder}: in use by process {file.read().strip() or '?'}; wait for it to end, or stop it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def make_folder(folder: Path) -> None:
    """Create the folder of a run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"out = {folder}: cannot create this folder ({error.strerror}); choose another") from None


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into one line; what was committed before stays."""
    try:
        yield
    except (OSError, sqlite3.OperationalError, pa.ArrowException) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = full or "is full" in str(error) or "No space left" in str(error)
        if full or (isinstance(error, sqlite3.OperationalError) and free_bytes(folder) < _SQLITE_NEEDS):
            raise DataError(
                f"{folder}: no space left on the device; finished work is kept;"
                " free some space and run the same command to resume"
            ) from error
        if isinstance(error, OSError) and error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DataError(f"{error.filename}: {error.strerror}; finished work is kept") from error
        raise


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def write_atomic(path: Path, text: str) -> None:
    """Write a small file completely or not at all, even if the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        sync_open_file(file)
    temporary.rename(path)
    sync_path(path.parent)


def sync_open_file(file: IO[str]) -> None:
    """Make what was written to an open file survive a power failure."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Make a closed file, or the renames within a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
