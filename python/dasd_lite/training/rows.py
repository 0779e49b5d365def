"""Rows for training, read at random with flat memory.

Input: a finished pack folder, table "rows", and the columns that the objective needs. The rows are checked while they
are copied once to an uncompressed file, which is memory-mapped: the operating system can reclaim that memory, however
many tokens there are.
Invariant: every row that comes out has been checked: its columns fit each other, its ids are in the model's vocabulary,
no document is longer than the model's positions, and every document ends with a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dasd_lite.data.dataset import batches, shards
from dasd_lite.data.files import disk_errors
from dasd_lite.data.records import DOCUMENT, ROW, TOKEN
from dasd_lite.errors import TrainError
from dasd_lite.method.ragged import from_arrow, offsets_of
from dasd_lite.model.row import Row


@dataclass(frozen=True)
class RowStats:
    """What is known about the rows after they have been checked."""

    mean_weight: float | None
    """Over the target tokens; None where the objective needs no weights."""
    end_ids: frozenset[int]
    """The tokens with which documents end."""
    num_targets: npt.NDArray[np.int64]
    """Target tokens of each row."""


class MappedRows:
    """A checked table of rows; `rows[i]` is read from disk when it is asked for."""

    def __init__(self, mapped: Path, stats: RowStats) -> None:
        """Map the file that `copy_rows` wrote; it may be unlinked afterwards."""
        self._table = pa.ipc.open_file(pa.memory_map(str(mapped))).read_all()
        self.stats = stats
        self.num_tokens = np.concatenate([np.diff(from_arrow(chunk).offsets) for chunk in self._table["ids"].chunks])
        """Tokens of each row."""
        documents = [from_arrow(chunk) for chunk in self._table["doc_lengths"].chunks]
        self.doc_lengths = np.concatenate([chunk.values for chunk in documents]).astype(np.int64)
        """Tokens of each document, row after row."""
        self.doc_offsets = offsets_of(np.concatenate([np.diff(chunk.offsets) for chunk in documents]))
        """Row r has the documents from `doc_offsets[r]` to `doc_offsets[r + 1]`."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._table)

    def __getitem__(self, i: int) -> Row:
        """Read one row; its weights have mean 1 over the target tokens of all rows."""
        ids, mask, lengths = (self._table[name][i].values for name in ("ids", "loss_mask", "doc_lengths"))
        columns = {name: _numbers(self._table[name][i].values) for name in self._table.column_names if ":" in name}
        tokens = {name.removeprefix(TOKEN): x for name, x in columns.items() if name.startswith(TOKEN)}
        documents = {name.removeprefix(DOCUMENT): x for name, x in columns.items() if name.startswith(DOCUMENT)}
        if self.stats.mean_weight is not None:
            weights = _row_weights(self._table["weights"][i], len(lengths))
            documents["weight"] = (weights / self.stats.mean_weight).astype(np.float32)
        return Row(
            ids.to_numpy(),
            mask.to_numpy(zero_copy_only=False),
            lengths.to_numpy(),
            tuple(self._table["uids"][i].as_py() or ()),
            tokens,
            documents,
        )


def copy_rows(
    folder: Path,
    mapped: Path,
    *,
    vocab_size: int,
    max_positions: int | None,
    needs: Sequence[str] = (),
    groups: bool = False,
) -> RowStats:
    """Check the rows of a pack folder while copying them to the uncompressed file `mapped`.

    Args:
        folder: A finished pack folder.
        mapped: The file to write.
        vocab_size: Ids of the model's vocabulary.
        max_positions: Longest document that the model can read; None for any length.
        needs: Columns that the objective reads; others are not copied.
        groups: Whether all documents of a prompt must be in one row.

    Raises:
        TrainError: A row that must not be trained on, or a missing column; names the row.
    """
    schema = _schema(folder, needs, groups)
    num_rows, weight, has_weights = 0, 0.0, False
    end_ids: set[int] = set()
    num_targets: list[npt.NDArray[np.int64]] = []
    row_of_prompt: dict[int, int] = {}
    mapped.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(mapped.parent), pa.ipc.new_file(str(mapped), schema) as writer:
        for batch in batches(folder, "rows", schema.names):
            targets, ends = _check(folder, batch, num_rows, vocab_size, max_positions)
            edges = from_arrow(batch["doc_lengths"]).offsets
            num_targets.append(np.add.reduceat(targets, edges[:-1]))
            if "weight" in needs:
                weight += float(_weights(folder, batch, num_rows) @ targets)
                has_weights |= batch["weights"].null_count < batch.num_rows
            _check_columns(folder, batch, num_rows, np.diff(edges), num_targets[-1])
            if groups:
                _check_groups(folder, batch, num_rows, row_of_prompt)
            end_ids.update(ends.tolist())
            writer.write_batch(batch.select(schema.names).cast(schema))
            num_rows += batch.num_rows
    if num_rows == 0:
        raise TrainError(f"{folder}: no row to train on")
    if "weight" in needs and not has_weights:
        raise TrainError(
            f"{folder}: the objective needs the column 'weight', but the rows have no weights; set select.weighting and"
            " run `dasd-lite select` and `dasd-lite pack` again with --force"
        )
    if "weight" in needs and weight <= 0:
        raise TrainError(f"{folder}: the weights of all documents are 0, so nothing would be learned")
    of_rows = np.concatenate(num_targets)
    mean_weight = weight / int(of_rows.sum()) if "weight" in needs else None
    return RowStats(mean_weight, frozenset(end_ids), of_rows)


def _schema(folder: Path, needs: Sequence[str], groups: bool) -> pa.Schema:
    """Return the columns to copy; refuse rows that lack one."""
    files = shards(folder, "rows")
    if not files:
        raise TrainError(f"{folder}: no row to train on")
    there = pq.read_schema(files[0])
    fields = [field for field in ROW if field.name != "weights" or "weight" in needs]
    for name in dict.fromkeys([*needs, *(["prompt"] if groups else [])]):
        column = next((c for c in (f"{DOCUMENT}{name}", f"{TOKEN}{name}") if c in there.names), None)
        if column is not None:
            fields.append(there.field(column))
        elif name == "prompt":
            raise TrainError(
                f"{folder}: the objective needs all answers of a prompt in one row, and these rows were packed without"
                " that; run `dasd-lite pack` again with --force"
            )
        elif name != "weight":
            raise TrainError(
                f"{folder}: the objective needs the column {name!r}, which the rows lack; run `dasd-lite pack` again"
                " with --force"
            )
    return pa.schema(fields)


def _weights(folder: Path, batch: pa.RecordBatch, first: int) -> npt.NDArray[np.float64]:
    """Return the weight of each document of a batch, 1 where it has none."""
    of_rows: list[npt.NDArray[np.float64]] = []
    for i, num_docs in enumerate(batch["doc_lengths"].value_lengths().to_pylist()):
        weights = _row_weights(batch["weights"][i], num_docs).astype(np.float64)
        if len(weights) != num_docs or not (np.isfinite(weights) & (weights >= 0)).all():
            raise TrainError(
                f"{folder}: row {first + i}: weights {weights.tolist()} for {num_docs} documents; each document needs"
                " one finite number of at least 0"
            )
        of_rows.append(weights)
    return np.concatenate(of_rows)


def _row_weights(weights: pa.ListScalar, num_docs: int) -> npt.NDArray[Any]:
    """Return the weights of one row as they were packed, 1 where there is none."""
    if not weights.is_valid:
        return np.ones(num_docs)
    return np.asarray(weights.values.fill_null(1.0).to_numpy(zero_copy_only=False))


def _check_columns(
    folder: Path,
    batch: pa.RecordBatch,
    first: int,
    num_docs: npt.NDArray[np.int64],
    num_targets: npt.NDArray[np.int64],
) -> None:
    """Refuse a batch whose extra columns do not fit its rows, or hold anything but finite numbers."""
    for name in batch.schema.names:
        if not name.startswith((DOCUMENT, TOKEN)):
            continue
        column, what = batch[name], "documents" if name.startswith(DOCUMENT) else "target tokens"
        wanted = num_docs if name.startswith(DOCUMENT) else num_targets
        lengths = column.value_lengths().fill_null(0).to_numpy()
        if len(wrong := np.flatnonzero(lengths != wanted)):
            row = int(wrong[0])
            raise TrainError(
                f"{folder}: row {first + row}: column {name!r} has {lengths[row]} values for {wanted[row]} {what}; they"
                " must be equally many"
            )
        values = _numbers(column.flatten())
        if not (is_finite := np.isfinite(values)).all():
            at = np.unravel_index(int(np.argmin(is_finite)), values.shape)
            row = int(np.searchsorted(np.cumsum(lengths), at[0], side="right"))
            raise TrainError(f"{folder}: row {first + row}: column {name!r} has {values[at]}; it must be finite")


def _check_groups(folder: Path, batch: pa.RecordBatch, first: int, row_of_prompt: dict[int, int]) -> None:
    """Refuse a prompt whose documents are in several rows; `row_of_prompt` collects the rows seen so far."""
    prompts, edges = from_arrow(batch[f"{DOCUMENT}prompt"])
    for row in range(batch.num_rows):
        for prompt in prompts[edges[row] : edges[row + 1]].tolist():
            other = row_of_prompt.setdefault(prompt, first + row)
            if other != first + row:
                raise TrainError(
                    f"{folder}: the objective needs all answers of a prompt in one row, but prompt {prompt} is in rows"
                    f" {other} and {first + row}; run `dasd-lite pack` again with --force"
                )


def _numbers(values: pa.Array) -> npt.NDArray[Any]:
    """Return the numbers of an Arrow array; [n], or [n, M] where each entry is a list of M."""
    if not pa.types.is_fixed_size_list(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False))
    return _numbers(values.flatten()).reshape(-1, values.type.list_size)


def _check(
    folder: Path, batch: pa.RecordBatch, first: int, vocab_size: int, max_positions: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Refuse a batch with a row that must not be trained on, naming the first one.

    Returns the number of targets of each document and the token that ends it.
    """
    (ids, id_edges), (docs, doc_edges) = from_arrow(batch["ids"]), from_arrow(batch["doc_lengths"])
    docs, num_ids, num_docs = docs.astype(np.int64), np.diff(id_edges), np.diff(doc_edges)
    num_masks = batch["loss_mask"].value_lengths().fill_null(0).to_numpy()
    row_of_doc = np.repeat(np.arange(batch.num_rows), num_docs)

    def refuse(bad: npt.NDArray[np.bool_], what: str, value: npt.NDArray[Any]) -> None:
        if bad.any():
            doc = int(np.argmax(bad))
            row = int(row_of_doc[doc])
            uids, index = batch["uids"][row].as_py() or (), doc - int(doc_edges[row])
            name = f" ({uids[index]})" if index < len(uids) else ""
            raise TrainError(f"{folder}: row {first + row}, document {index}{name}: {what.format(value[doc])}")

    spans = np.bincount(row_of_doc, weights=docs, minlength=batch.num_rows).astype(np.int64)
    wrong = np.flatnonzero((num_ids != num_masks) | (num_ids != spans) | (num_ids == 0))
    if len(wrong):
        row = int(wrong[0])
        sizes = f"{num_ids[row]} ids, {num_masks[row]} mask entries, documents of {spans[row]} tokens"
        raise TrainError(f"{folder}: row {first + row}: {sizes}; these must be equal and not 0")
    refuse(docs < 2, "{} token; a document needs at least 2, one to predict from and one to predict", docs)
    starts = np.cumsum(docs) - docs
    highest, lowest = np.maximum.reduceat(ids, starts), np.minimum.reduceat(ids, starts)
    refuse(lowest < 0, "token id {}; an id is at least 0", lowest)
    refuse(
        highest >= vocab_size,
        f"token id {{}}, but the model has {vocab_size}; was it packed with another tokenizer?",
        highest,
    )
    if max_positions is not None:
        refuse(
            docs > max_positions,
            f"{{}} tokens, but the model has {max_positions} positions; select shorter answers",
            docs,
        )
    mask = batch["loss_mask"].flatten().to_numpy(zero_copy_only=False).copy()
    mask[starts] = False  # nothing predicts a first token
    refuse(~np.logical_or.reduceat(mask, starts), "none of its {} tokens is a target", docs)
    ends = ids[starts + docs - 1]
    refuse(~mask[starts + docs - 1], "its last token ({}), which ends the turn, is not a target", ends)
    return np.add.reduceat(mask.astype(np.int64), starts), ends
