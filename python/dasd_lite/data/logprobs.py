"""Log-probabilities in files of their own, joined to answers by uuid (the published Logprob set).

Input: JSONL or Parquet files with a uuid, token ids and log-probabilities, in any order. Output: the tokens of a given
answer. Invariant: memory does not grow with the length of the rows, and every row is read once. Rows that were passed
on the way to the one asked for wait in a temporary file: none do if the files are in the order of the answers; else the
file takes at most 8 bytes per token.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dasd_lite.data.files import disk_errors
from dasd_lite.errors import DataError

KEYS = ("sample_uuid", "uuid", "uid", "id")
"""Columns that may hold the uuid; the first that a row has counts."""

TOKEN_FIELDS = {"token_ids": np.int32, "logprobs": np.float32, "token_logprobs": np.float32, "token_bytes": np.int32}
"""Columns that say something about tokens, and what their numbers are kept as."""

_PARQUET_ROWS = 64  # of up to 65K tokens each


class Partners:
    """Finds the tokens that belong to an answer.

    Attributes:
        num_read: Rows read so far.
    """

    def __init__(self, paths: Iterable[Path], folder: Path) -> None:
        """Take the files, and the folder for the temporary file."""
        self.num_read = 0
        self._rows = (row for path in paths for row in read_tokens(path))
        self._passed: dict[str, tuple[int, ...]] = {}
        self._path, self._end = folder / "logprobs.tmp", 0
        with disk_errors(folder):
            self._file = self._path.open("w+b")

    def take(self, uuid: str) -> dict[str, Any] | None:
        """Return what is known about the tokens of an answer; None: nothing. Rows of one uuid are returned in turn."""
        if places := self._passed.pop(uuid, ()):
            if places[1:]:
                self._passed[uuid] = places[1:]
            self._file.seek(places[0])
            tokens: dict[str, Any] = pickle.load(self._file)
            return tokens
        for key, tokens in self._rows:
            self.num_read += 1
            if key == uuid:
                return tokens
            with disk_errors(self._path.parent):
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
        with suppress(OSError) if error else disk_errors(self._path.parent):
            self._file.close()
            self._path.unlink(missing_ok=True)


def read_tokens(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield uuid and tokens of each row of a file; lists of numbers become arrays.

    Raises:
        DataError: The file cannot be read, or a row has no uuid; names file and line.
    """
    if not path.is_file():
        raise DataError(f"{path}: " + ("is a folder; name a file" if path.is_dir() else "no such file"))
    for where, row in _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path):
        key = next((row[name] for name in KEYS if row.get(name) is not None), None)
        if key is None:
            raise DataError(f"{where}: has {', '.join(row) or 'no keys'}; a row of log-probabilities needs {KEYS[0]!r}")
        yield str(key), {name: _compact(name, row[name]) for name in TOKEN_FIELDS if row.get(name) is not None}


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = _decode(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: {str(row)[:40]!r} is not a JSON object")
            yield f"{path}:{number}", row


def _decode(line: bytes) -> Any:
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError:
        return json.loads(line)  # accepts NaN, which makes one row unusable and not the file


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in (*KEYS, *TOKEN_FIELDS) if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=names):
                columns = {name: _cells(batch[name]) for name in names}
                for row in range(batch.num_rows):
                    yield f"{path} row {number}", {name: cells[row] for name, cells in columns.items()}
                    number += 1
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from error


def _cells(column: pa.Array[Any]) -> list[Any]:
    """Return the cells of a column; lists of numbers are views into its memory."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not is_list or column.values.null_count or not _is_number(column.type.value_type):
        return list(column.to_pylist())
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return [values[offsets[i] : offsets[i + 1]] if valid[i] else None for i in range(len(column))]


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _compact(name: str, values: Any) -> Any:
    """Return a list of numbers as an array of half the size or less; anything else as it is."""
    wanted: type[np.generic] = TOKEN_FIELDS[name]
    try:
        array: npt.NDArray[Any] = np.asarray(values)
    except ValueError:
        return values
    fits = array.ndim == 1 and len(array) > 0 and array.dtype.kind in ("if" if wanted is np.float32 else "i")
    if fits and wanted is np.int32:
        fits = int(array.min()) >= -(1 << 31) and int(array.max()) < 1 << 31
    with np.errstate(over="ignore"):  # -1e300 becomes -inf, which is refused as well
        return array.astype(wanted) if fits else values
