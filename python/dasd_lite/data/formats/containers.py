"""JSONL, JSON, CSV and Parquet, plain or compressed → rows as dictionaries, each with its location.

Input: a file. Output: pairs of a location and a row, or a `Fault` in place of a row that is damaged. Invariants: no row
is skipped; memory holds one row, or one batch of Parquet (a JSON array is read whole); of a Parquet file only the
columns that are wanted are read.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from dasd_lite.data.dataset import batches, shards
from dasd_lite.data.formats.row import TOKEN_COLUMNS, Fault
from dasd_lite.data.stored import read_names
from dasd_lite.errors import DataError

Located: TypeAlias = tuple[str, "dict[str, Any] | Fault"]
Wanted: TypeAlias = Callable[[Sequence[str]], Sequence[str]]

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **{".csv": "csv", ".tsv": "csv"},
    ".parquet": "parquet",
}
_BATCH_ROWS = 256
_UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, EOFError)


def kind_of(path: Path) -> tuple[str, str | None]:
    """Return what a file is by its name, "" for nothing that is read, and how it is compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = COMPRESSED.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    return KINDS.get(suffixes[-1], "") if suffixes else "", compression


def rows_of(path: Path, name: str, wanted: Wanted) -> Iterator[Located]:
    """Yield the rows of a file, or the rollouts in the folder of a stage.

    Args:
        path: The file or folder.
        name: What errors call it.
        wanted: Returns those of a file's columns that are read.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    if path.is_dir():
        yield from _rollouts(path, name, wanted)
        return
    kind, compression = kind_of(path)
    if kind == "":
        raise DataError(
            f"{name}: ends in {path.suffix or 'nothing'!r}; use .jsonl, .json, .csv or .parquet, also with .gz or .zst"
        )
    try:
        source = pa.OSFile(str(path))
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error}") from error
    with source:
        if kind == "parquet":
            yield from _parquet(source, name, wanted, compression)
            return
        file: BinaryIO = io.BufferedReader(
            pa.CompressedInputStream(source, compression) if compression else source,
            1 << 20,
        )
        rows = _json(file, name) if kind == "json" else _csv(file, name, "\t" if ".tsv" in path.name.lower() else ",")
        try:
            yield from rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{name}: cannot be read: {_first_line(error)}") from error


# --- JSON -------------------------------------------------------------------------------------------------


def _json(file: BinaryIO, name: str) -> Iterator[Located]:
    """Yield the objects of JSON lines, or of one array."""
    decode = msgspec.json.Decoder().decode
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        where = f"{name}:{number}"
        try:
            row = decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            if not line.strip():
                continue
            if line.lstrip()[:1] == b"[":
                yield from _array(line + file.read(), name)
                return
            try:
                row = _slowly(line)
            except Fault as fault:
                yield where, fault
                continue
        if isinstance(row, list):
            yield from _array(line + file.read(), name)
            return
        yield where, row if isinstance(row, dict) else _no_object(row)


def _array(content: bytes, name: str) -> Iterator[Located]:
    """Yield the objects of one JSON array."""
    try:
        rows = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        try:
            rows = _slowly(content)
        except Fault as fault:
            raise DataError(f"{name}: {fault}") from None
    for number, row in enumerate(rows):
        yield f"{name} row {number}", row if isinstance(row, dict) else _no_object(row)


def _no_object(row: Any) -> Fault:
    return Fault(f'{str(row)[:40]!r} is not a JSON object; a row must look like {{"prompt": …}}')


def _slowly(text: bytes) -> Any:
    """Decode JSON with Python's own decoder, which also takes NaN, and says better what is wrong."""
    try:
        row = json.loads(text.decode())
    except UnicodeDecodeError as error:
        column = error.start - text.rfind(b"\n", 0, error.start)
        return _fail(f"not UTF-8: byte 0x{text[error.start]:02x} at column {column}")
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        hint = "; a file of JSON has one object on each line, or one list" if text.strip() == b"{" else ""
        return _fail(f"not JSON: {error.msg} at {at}{hint}")
    except RecursionError:
        return _fail("not readable: brackets are nested more than a thousand deep")
    except ValueError:
        return _fail("not readable: a number has more than 4,300 digits")
    if b"\\ud" in text.lower() and (found := re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))):
        return _fail(f"not UTF-8: \\u{ord(found.group()):04x} is only half of a surrogate pair")
    return row


def _fail(message: str) -> Any:
    raise Fault(message) from None


# --- CSV --------------------------------------------------------------------------------------------------


def _csv(file: BinaryIO, name: str, delimiter: str) -> Iterator[Located]:
    """Yield the rows of a CSV file with a header; an empty cell is no value."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] = []
    first = 1
    try:
        for cells in reader:
            where, first = f"{name}:{first}", reader.line_num + 1
            if not header:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header) or "" in header:
                    raise DataError(f"{where}: the header has {', '.join(map(repr, cells))}; each needs its own name")
            elif cells:
                yield where, _cells(header, cells)
    except csv.Error as error:
        raise DataError(f"{name}:{first}: not CSV: {error}") from None


def _cells(header: list[str], cells: list[str]) -> dict[str, Any] | Fault:
    if len(cells) != len(header):
        return Fault(f"has {len(cells)} cells, but the header has {len(header)}")
    for column, cell in zip(header, cells, strict=True):
        if not cell.isascii() and (found := re.search("[\udc80-\udcff]", cell)):
            return Fault(f"{column}: not UTF-8: byte 0x{ord(found.group()) - 0xDC00:02x}")
    return {column: cell or None for column, cell in zip(header, cells, strict=True)}


# --- Parquet ----------------------------------------------------------------------------------------------


def _parquet(source: Any, name: str, wanted: Wanted, compression: str | None) -> Iterator[Located]:
    number = 0
    try:
        if compression is not None:  # its footer is needed first
            source = pa.BufferReader(pa.CompressedInputStream(source, compression).read())
        with pq.ParquetFile(source) as file:
            columns = list(wanted(file.schema_arrow.names))
            unread = {column: None for column in file.schema_arrow.names if column not in columns}
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                for row in _rows_of_batch(batch):
                    yield f"{name} row {number}", row if isinstance(row, Fault) else unread | row
                    number += 1
    except _UNREADABLE as error:
        what = "not a Parquet file" if number == 0 else f"damaged behind row {number - 1}"
        raise DataError(f"{name}: {what}: {_first_line(error)}") from error


def _rollouts(folder: Path, name: str, wanted: Wanted) -> Iterator[Located]:
    """Yield the rows of a stage's table, which an order file may make of some of those in its shards."""
    number = 0
    try:
        names = read_names(shards(folder, "rollouts")[0])
        columns = list(wanted(names))
        unread = {column: None for column in names if column not in columns}
        for batch in batches(folder, "rollouts", columns, _BATCH_ROWS):
            for row in _rows_of_batch(batch):
                yield f"{name} row {number}", row if isinstance(row, Fault) else unread | row
                number += 1
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(f"{name}: damaged behind row {number - 1}: {_first_line(error)}") from error


def _rows_of_batch(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Fault]:
    names = batch.schema.names
    try:
        columns = [_values(batch.column(i), name) for i, name in enumerate(names)]
    except (UnicodeDecodeError, pa.ArrowException, ValueError, OverflowError, NotImplementedError):
        if batch.num_rows > 1:
            for i in range(batch.num_rows):
                yield from _rows_of_batch(batch.slice(i, 1))
            return
        yield _damaged(batch)
        return
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _values(column: pa.Array, name: str) -> Sequence[Any]:
    """Return a column's values; numbers for tokens stay arrays."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if (
        name in TOKEN_COLUMNS
        and is_list
        and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))
    ):
        return [None if not value.is_valid else value.values.to_numpy(zero_copy_only=False) for value in column]
    values: Sequence[Any] = column.to_pylist()
    return values


def _damaged(row: pa.RecordBatch) -> Fault:
    """Say which column of a single row cannot be read."""
    for i, name in enumerate(row.schema.names):
        try:
            row.column(i).to_pylist()
        except UnicodeDecodeError as error:
            return Fault(f"not UTF-8: {name}: {error.reason}")
        except Exception as error:  # whatever a type of Arrow raises
            return Fault(f"{name}, of the type {row.column(i).type}, cannot be read: {_first_line(error)}")
    raise AssertionError("a column cannot be read")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
