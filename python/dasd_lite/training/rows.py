"""Rows for training, read at random with flat memory.

Input: a finished pack folder, table "rows". It is checked while it is copied once to an uncompressed
file, which is memory-mapped: what the operating system can take back, however many tokens there are.
Invariant: every row that comes out has been checked: its columns fit each other, its ids are in the
model's vocabulary, no document is longer than the model's positions, and every document ends with a
target.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dasd_lite.data.dataset import batches
from dasd_lite.data.files import disk_errors
from dasd_lite.data.records import ROW
from dasd_lite.errors import TrainError
from dasd_lite.method.ragged import offsets_of
from dasd_lite.model.row import Row


@dataclass(frozen=True)
class RowStats:
    """What is known of rows after they have been checked."""

    mean_weight: float | None
    """Over the target tokens; None without weights."""
    end_ids: frozenset[int]
    """The tokens with which documents end."""
    num_targets: npt.NDArray[np.int64]
    """Target tokens of each row."""


class Rows:
    """A checked table of rows; `rows[i]` is read from disk when it is asked for."""

    def __init__(self, mapped: Path, facts: RowStats) -> None:
        """Map the file that `copy_rows` wrote; it may lose its name afterwards."""
        self._table = pa.ipc.open_file(pa.memory_map(str(mapped))).read_all()
        self.facts = facts
        self.num_tokens = np.concatenate([_lengths(chunk) for chunk in self._table["ids"].chunks])
        """Tokens of each row."""
        documents = self._table["doc_lengths"].chunks
        self.doc_lengths = np.concatenate([_flat(chunk) for chunk in documents]).astype(np.int64)
        """Tokens of each document, row after row."""
        self.doc_offsets = offsets_of(np.concatenate([_lengths(chunk) for chunk in documents]))
        """Row r has the documents from `doc_offsets[r]` to `doc_offsets[r + 1]`."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._table)

    def __getitem__(self, i: int) -> Row:
        """Read one row; its weights have mean 1 over the target tokens of all rows."""
        ids, mask, lengths = (self._table[name][i].values for name in ("ids", "loss_mask", "doc_lengths"))
        weights, mean = None, self.facts.mean_weight
        if mean is not None:
            given = self._table["weights"][i]
            raw = (
                given.values.fill_null(1.0).to_numpy(zero_copy_only=False) if given.is_valid else np.ones(len(lengths))
            )
            weights = (raw / mean).astype(np.float32)
        return Row(
            ids.to_numpy(),
            mask.to_numpy(zero_copy_only=False),
            lengths.to_numpy(),
            tuple(self._table["uids"][i].as_py() or ()),
            weights,
        )


def open_rows(folder: Path, mapped: Path, *, vocab_size: int, max_positions: int | None) -> Rows:
    """Check the rows of a pack folder and map them into memory by way of the file `mapped`.

    The file loses its name at once and its space when the process ends, however that comes.
    """
    try:
        return Rows(mapped, copy_rows(folder, mapped, vocab_size=vocab_size, max_positions=max_positions))
    finally:
        mapped.unlink(missing_ok=True)


def copy_rows(folder: Path, mapped: Path, *, vocab_size: int, max_positions: int | None) -> RowStats:
    """Check the rows of a pack folder while they are copied to the uncompressed file `mapped`."""
    num_rows, weight, has_weights = 0, 0.0, False
    end_ids: set[int] = set()
    num_targets: list[npt.NDArray[np.int64]] = []
    mapped.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(mapped.parent), pa.ipc.new_file(str(mapped), ROW) as writer:
        for batch in batches(folder, "rows"):
            targets, ends = _check(folder, batch, num_rows, vocab_size, max_positions)
            weight += float(_weights(folder, batch, num_rows) @ targets)
            has_weights |= batch["weights"].null_count < batch.num_rows
            num_targets.append(np.add.reduceat(targets, offsets_of(_lengths(batch["doc_lengths"]))[:-1]))
            end_ids.update(ends.tolist())
            writer.write_batch(batch.cast(ROW))
            num_rows += batch.num_rows
    if num_rows == 0:
        raise TrainError(f"{folder}: no row to train on")
    if weight <= 0:
        raise TrainError(f"{folder}: the weights of all documents are 0; nothing would be learnt")
    of_rows = np.concatenate(num_targets)
    return RowStats(weight / int(of_rows.sum()) if has_weights else None, frozenset(end_ids), of_rows)


def _weights(folder: Path, batch: pa.RecordBatch, first: int) -> npt.NDArray[np.float64]:
    """Return the weight of each document of a batch, 1 where it has none."""
    if batch["weights"].null_count == batch.num_rows:
        return np.ones(int(_lengths(batch["doc_lengths"]).sum()))
    found: list[npt.NDArray[np.float64]] = []
    for i, number in enumerate(_lengths(batch["doc_lengths"])):
        given = batch["weights"][i]
        weights = np.ones(number)
        if given.is_valid:
            weights = given.values.fill_null(1.0).to_numpy(zero_copy_only=False).astype(np.float64)
        if len(weights) != number or not (np.isfinite(weights) & (weights >= 0)).all():
            raise TrainError(
                f"{folder}: row {first + i}: weights {weights.tolist()} for {number} documents; right is one finite"
                " number of at least 0 for each"
            )
        found.append(weights)
    return np.concatenate(found)


def _check(
    folder: Path, batch: pa.RecordBatch, first: int, vocab_size: int, max_positions: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Refuse a batch with a row that must not be trained on, naming the first one.

    Returns the number of targets of each document and the token that ends it.
    """
    num_ids, num_masks, num_docs = (_lengths(batch[name]) for name in ("ids", "loss_mask", "doc_lengths"))
    docs = _flat(batch["doc_lengths"]).astype(np.int64)
    row_of_doc = np.repeat(np.arange(batch.num_rows), num_docs)

    def refuse(bad: npt.NDArray[np.bool_], what: str, value: npt.NDArray[Any]) -> None:
        if bad.any():
            doc = int(np.argmax(bad))
            row = int(row_of_doc[doc])
            uids, at = batch["uids"][row].as_py() or (), doc - int(num_docs[:row].sum())
            name = f" ({uids[at]})" if at < len(uids) else ""
            raise TrainError(f"{folder}: row {first + row}, document {at}{name}: {what.format(value[doc])}")

    spans = np.bincount(row_of_doc, weights=docs, minlength=batch.num_rows).astype(np.int64)
    wrong = np.flatnonzero((num_ids != num_masks) | (num_ids != spans) | (num_ids == 0))
    if len(wrong):
        row = int(wrong[0])
        sizes = f"{num_ids[row]} ids, {num_masks[row]} mask entries, documents of {spans[row]} tokens"
        raise TrainError(f"{folder}: row {first + row}: {sizes}; these must be equal and not 0")
    refuse(docs < 2, "{} token; a document needs at least 2, one to predict from and one to predict", docs)
    starts = np.cumsum(docs) - docs
    ids = _flat(batch["ids"])
    highest, lowest = np.maximum.reduceat(ids, starts), np.minimum.reduceat(ids, starts)
    refuse(lowest < 0, "token id {}; an id is at least 0", lowest)
    refuse(
        highest >= vocab_size,
        f"token id {{}}, the model has {vocab_size}; was it packed with another tokenizer?",
        highest,
    )
    if max_positions is not None:
        refuse(
            docs > max_positions, f"{{}} tokens, the model has {max_positions} positions; select shorter answers", docs
        )
    mask = _flat(batch["loss_mask"]).copy()
    mask[starts] = False  # nothing predicts a first token
    refuse(~np.logical_or.reduceat(mask, starts), "none of its {} tokens is a target", docs)
    ends = ids[starts + docs - 1]
    refuse(~mask[starts + docs - 1], "its last token ({}), which ends the turn, is not a target", ends)
    return np.add.reduceat(mask.astype(np.int64), starts), ends


def _lengths(column: Any) -> npt.NDArray[np.int64]:
    return np.asarray(column.value_lengths().fill_null(0), dtype=np.int64)


def _flat(column: Any) -> npt.NDArray[Any]:
    return np.asarray(column.flatten())
