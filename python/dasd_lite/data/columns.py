"""Columns that an objective needs: numbers per document, or per target token of each document.

Input: a Parquet file of the user's with `uid` of the rollout and a column per name; or rollouts, for the teacher's
log-probabilities. Output: a `Column` in the order of the documents. Invariant: every document has its values, all are
finite, and there are as many as it has target tokens. Values per token are kept in a file on disk and mapped, so memory
holds a few numbers per document.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dasd_lite.data.dataset import batches
from dasd_lite.errors import DataError
from dasd_lite.method.ragged import offsets_of

TEACHER_LOGPROBS = "teacher_logprobs"


@dataclass(frozen=True, eq=False)
class Column:
    """Numbers of D documents with N target tokens in all.

    Attributes:
        name: Its name.
        values: [D]; or [N] or [N, M], document after document. float32 or int64; may be mapped from a file.
        offsets: Document d has the values `offsets[d]` to `offsets[d + 1]`; int64 [D + 1]. None: one per document.
    """

    name: str
    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64] | None

    @property
    def type(self) -> pa.DataType:
        """Arrow type of one entry."""
        number = pa.from_numpy_dtype(self.values.dtype)
        return pa.list_(number, self.values.shape[1]) if self.values.ndim == 2 else number

    def take(self, documents: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
        """Return the values of some documents, one after another."""
        if self.offsets is None:
            return np.asarray(self.values[documents])
        edges = self.offsets
        return np.concatenate([self.values[edges[d] : edges[d + 1]] for d in documents])


def read_columns(
    path: Path, names: Sequence[str], uids: Sequence[str], num_targets: npt.NDArray[np.int64], scratch: Path
) -> list[Column]:
    """Read columns of a Parquet file for the documents of these rollouts.

    Args:
        path: The file; rollouts that are not documents may be in it.
        names: Its columns: numbers (a value per document), lists of numbers (a value per target token) or lists of
            lists of equal length (M values per target token).
        uids: The rollout of each document; [D].
        num_targets: Target tokens of each document; [D].
        scratch: Folder for temporary files.

    Raises:
        DataError: A missing column or uid, a uid that occurs twice, a wrong number of values, one that is not finite.
    """
    documents, filled = _index(uids), np.zeros(len(uids), dtype=bool)
    try:
        file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error})") from None
    with file, contextlib.ExitStack() as stack:
        schema = file.schema_arrow
        for name in ("uid", *names):
            if name not in schema.names:
                raise DataError(f"{path}: has no column {name!r}; it has {', '.join(schema.names)}")
        kinds = [_kind(path, schema.field(name)) for name in names]
        files = [stack.enter_context(tempfile.TemporaryFile(dir=scratch)) for _ in names]
        columns = [
            _Collector(path, name, *kind, num_targets, temporary)
            for name, kind, temporary in zip(names, kinds, files, strict=True)
        ]
        for batch in file.iter_batches(batch_size=128, columns=["uid", *names]):
            for row, uid in enumerate(batch["uid"].to_pylist()):
                wanted = documents.get(uid)
                if wanted is None:
                    continue
                if filled[wanted[0]]:
                    raise DataError(f"{path}: uid {uid} occurs twice; each rollout may have one row")
                filled[wanted] = True
                for column in columns:
                    column.add(uid, wanted, batch[column.name][row])
        _check_complete(f"{path}: has no row for", uids, filled)
        return [column.finish() for column in columns]


def read_teacher_logprobs(
    folders: Sequence[Path],
    uids: Sequence[str],
    targets: Callable[[int], npt.NDArray[np.int32]],
    num_targets: npt.NDArray[np.int64],
    scratch: Path,
) -> Column:
    """Return the log-probability of each target token by the teacher that wrote it, column "teacher_logprobs".

    Args:
        folders: Folders of rollouts, each with some of the documents.
        uids: The rollout of each document; [D].
        targets: Returns the target tokens of a document: its answer in the student's vocabulary, end token included.
        num_targets: Target tokens of each document; [D].
        scratch: Folder for temporary files.

    Raises:
        DataError: The teacher's tokens of an answer are not the student's, or have no log-probabilities.
    """
    documents, filled = _index(uids), np.zeros(len(uids), dtype=bool)
    with tempfile.TemporaryFile(dir=scratch) as temporary:
        column = _Collector(folders[0], TEACHER_LOGPROBS, 1, np.dtype(np.float32), num_targets, temporary)
        for folder in folders:
            column.source = folder
            for batch in batches(folder, "rollouts", ("uid", "token_ids", "logprobs")):
                for row, uid in enumerate(batch["uid"].to_pylist()):
                    wanted = documents.get(uid)
                    if wanted is None or filled[wanted[0]]:
                        continue
                    fault = _other_tokens(batch["token_ids"][row], targets(wanted[0]))
                    if fault is not None:
                        raise DataError(
                            f"{folder}: uid {uid}: {TEACHER_LOGPROBS} needs the teacher's tokens to be the student's,"
                            f" but {fault}; use an objective without it, or give another column by pack.columns"
                        )
                    filled[wanted] = True
                    column.add(uid, wanted, batch["logprobs"][row])
        _check_complete(f"{', '.join(map(str, folders))}: no {TEACHER_LOGPROBS} for", uids, filled)
        return column.finish()


def _index(uids: Sequence[str]) -> dict[str, list[int]]:
    """Return the documents of each rollout; a replayed one may be there twice."""
    documents: dict[str, list[int]] = {}
    for document, uid in enumerate(uids):
        documents.setdefault(uid, []).append(document)
    return documents


def _check_complete(what: str, uids: Sequence[str], filled: npt.NDArray[np.bool_]) -> None:
    if not filled.all():
        missing = np.flatnonzero(~filled)
        raise DataError(f"{what} {len(missing)} of {len(uids)} rollouts; the first is uid {uids[missing[0]]}")


def _kind(path: Path, field: pa.Field) -> tuple[int, np.dtype[Any]]:
    """Return how deep the lists of a column are, and the number format of its values."""
    depth, inner = 0, field.type
    while pa.types.is_list(inner) or pa.types.is_large_list(inner) or pa.types.is_fixed_size_list(inner):
        depth, inner = depth + 1, inner.value_type
    is_integer = pa.types.is_integer(inner) and inner != pa.uint64()
    if depth > 2 or not (is_integer or pa.types.is_floating(inner)):
        raise DataError(
            f"{path}: column {field.name!r} is {field.type}; it must be a number per rollout, a list with a number per"
            " target token, or a list of lists of equal length"
        )
    return depth, np.dtype(np.int64 if is_integer else np.float32)


def _other_tokens(token_ids: Any, targets: npt.NDArray[np.int32]) -> str | None:
    """Say how a teacher's tokens differ from the student's; None if they are equal."""
    if not token_ids.is_valid:
        return "its tokens are not known"
    ids = token_ids.values.to_numpy()
    both = min(len(ids), len(targets))
    differs = np.flatnonzero(ids[:both] != targets[:both])
    if len(differs):
        first = int(differs[0])
        return f"its token {first} is {ids[first]}, the student's {targets[first]}"
    if len(ids) != len(targets):
        return f"it has {len(ids)}, the student {len(targets)} with the end token"
    return None


class _Collector:
    """One column while it is read; documents come in any order."""

    def __init__(
        self,
        source: Path,
        name: str,
        depth: int,
        dtype: np.dtype[Any],
        num_targets: npt.NDArray[np.int64],
        file: IO[bytes],
    ) -> None:
        self.name, self.source = name, source
        self._depth, self._dtype, self._num_targets = depth, dtype, num_targets
        self._offsets = offsets_of(num_targets)
        self._width: int | None = None if depth == 2 else 1
        self._values = np.zeros(len(num_targets), dtype)
        self._file = file  # of values per token

    def add(self, uid: str, documents: Sequence[int], entry: Any) -> None:
        """Take the entry of one rollout for its documents."""
        values = self._numbers(uid, entry)
        if not np.isfinite(values).all():  # a null is NaN here
            self._refuse(uid, "has a null or a number that is not finite")
        with np.errstate(over="ignore"):
            values = values.astype(self._dtype)
        if not np.isfinite(values).all():
            self._refuse(uid, "has a number that float32 cannot hold")
        for document in documents:
            if not self._depth:
                self._values[document] = values[0]
                continue
            if len(values) != self._num_targets[document]:
                wanted = f"{self._num_targets[document]} target tokens (its answer and the end token)"
                self._refuse(uid, f"has {len(values)} values, but the rollout has {wanted}")
            self._file.seek(int(self._offsets[document]) * values[0].nbytes)
            self._file.write(values.data)

    def finish(self) -> Column:
        """Return the column; all documents have been added."""
        if not self._depth:
            return Column(self.name, self._values, None)
        self._file.flush()  # mapped, it outlives its name and handle
        mapped = np.memmap(self._file, self._dtype, mode="r")
        return Column(self.name, mapped.reshape(-1, self._width or 1) if self._depth == 2 else mapped, self._offsets)

    def _numbers(self, uid: str, entry: Any) -> npt.NDArray[Any]:
        """Return the numbers of an entry; [1], [n] or [n, M]. Nulls become NaN."""
        if self._depth == 0:
            return np.array([entry.as_py() if entry.is_valid else np.nan])
        if not entry.is_valid:
            return np.empty(0)
        values = entry.values
        if self._depth == 2:
            widths = pc.list_value_length(values).fill_null(0).to_numpy()
            self._width = int(widths[0]) if self._width is None and len(widths) else self._width
            if len(other := widths[(widths != self._width) | (widths == 0)]):
                self._refuse(uid, f"has lists of {self._width} and of {other[0]} values; all must be equally long")
            return np.asarray(values.flatten().to_numpy(zero_copy_only=False)).reshape(len(widths), self._width or 0)
        return np.asarray(values.to_numpy(zero_copy_only=False))

    def _refuse(self, uid: str, what: str) -> None:
        raise DataError(f"{self.source}: uid {uid}: column {self.name!r} {what}")
