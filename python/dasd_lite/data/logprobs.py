"""Log-probabilities in files of their own, joined to answers by uuid (the published Logprob set).

Input: files with a uuid, token ids and log-probabilities, in any order. Output: the tokens of a given answer.
Invariant: memory does not grow with the length of the rows, and every row is read once. Rows that were passed on the
way to the one asked for wait in a temporary file: none do if the files are in the order of the answers; else the file
takes about 8 bytes per token.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from dasd_lite.data.files import disk_errors
from dasd_lite.data.formats.containers import rows_of
from dasd_lite.data.formats.row import TOKEN_COLUMNS, Fault
from dasd_lite.data.formats.sources import SourceFile
from dasd_lite.errors import DataError

KEYS = ("sample_uuid", "uuid", "uid", "id")
"""Columns that may hold the uuid; the first that a row has counts."""


class Partners:
    """Finds the tokens that belong to an answer.

    Attributes:
        num_read: Rows read so far.
    """

    def __init__(self, files: Iterable[SourceFile], folder: Path) -> None:
        """Take the files, and the folder for the temporary file."""
        self.num_read = 0
        self._rows = (row for file in files for row in read_tokens(file))
        self._passed: dict[str, tuple[int, ...]] = {}
        self._path, self._end = folder / "logprobs.tmp", 0
        self._file: BinaryIO | None = None

    def take(self, uuid: str) -> dict[str, Any] | None:
        """Return what is known about the tokens of an answer; None: nothing. Rows of one uuid are returned in turn."""
        if places := self._passed.pop(uuid, ()):
            if places[1:]:
                self._passed[uuid] = places[1:]
            assert self._file is not None, "they wait in it"
            self._file.seek(places[0])
            tokens: dict[str, Any] = pickle.load(self._file)
            return tokens
        for key, tokens in self._rows:
            self.num_read += 1
            if key == uuid:
                return tokens
            with disk_errors(self._path.parent):
                if self._file is None:
                    self._file = self._path.open("w+b")
                self._file.seek(self._end)
                pickle.dump(tokens, self._file, protocol=5)
                self._passed[key] = (*self._passed.get(key, ()), self._end)
                self._end = self._file.tell()
        return None

    def num_left(self) -> int:
        """Read the rest, and return how many rows belong to no answer that was asked for."""
        unread = sum(1 for _ in self._rows)
        self.num_read += unread
        return unread + sum(map(len, self._passed.values()))

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the temporary file."""
        if self._file is not None:
            with suppress(OSError):  # half a write cannot be finished on a full disk
                self._file.close()
            self._path.unlink(missing_ok=True)


def read_tokens(file: SourceFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield uuid and tokens of each row of a file; lists of numbers become arrays.

    Raises:
        DataError: The file or a row cannot be read, or a row has no uuid; names file and line.
    """
    for where, row in rows_of(
        file.path, file.name, lambda names: [n for n in names if n in KEYS or n in TOKEN_COLUMNS]
    ):
        if isinstance(row, Fault):
            raise DataError(f"{where}: {row}")
        key = next((row[name] for name in KEYS if row.get(name) is not None), None)
        if key is None:
            raise DataError(f"{where}: has {', '.join(row) or 'no keys'}; a row of log-probabilities needs {KEYS[0]!r}")
        yield str(key), {name: _compact(name, row[name]) for name in TOKEN_COLUMNS if row.get(name) is not None}


def _compact(name: str, values: Any) -> Any:
    """Return a list of numbers as an array of half the size or less; anything else as it is."""
    is_real = "logprobs" in name
    try:
        array: npt.NDArray[Any] = np.asarray(values)
    except ValueError:
        return values
    fits = array.ndim == 1 and len(array) > 0 and array.dtype.kind in ("if" if is_real else "i")
    if fits and not is_real:
        fits = int(array.min()) >= -(1 << 31) and int(array.max()) < 1 << 31
    with np.errstate(over="ignore"):  # -1e300 becomes -inf, which is refused as well
        return array.astype(np.float32 if is_real else np.int32) if fits else values
