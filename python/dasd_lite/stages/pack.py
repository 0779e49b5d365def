"""Pack rollouts into rows of at most seq_len tokens.

Reads what select kept (and, for replay, what the phase before kept); writes rows: ids, loss mask,
document lengths and, where select gave any, weights. No document is cut. The ids are copied through a
flat file on disk, which is mapped, so memory has to hold a few numbers per rollout whatever their
length.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dasd_lite.config.models import result_options
from dasd_lite.config.stages import PackConfig
from dasd_lite.console import progress
from dasd_lite.data.dataset import batches, num_rows
from dasd_lite.data.files import disk_errors
from dasd_lite.data.manifest import fingerprint, identify, read_manifest
from dasd_lite.data.records import ROW
from dasd_lite.data.seeds import derive_seed
from dasd_lite.data.writer import ShardWriter, is_finished
from dasd_lite.errors import DataError
from dasd_lite.method.packing import Plan, gather_rows, pack_rows
from dasd_lite.method.ragged import offsets_of

VERSION = 2  # 1 had no weights
_ID = np.dtype(np.int32)
_BATCH_TOKENS = 4 << 20  # written at once


@dataclass(frozen=True)
class _Documents:
    """A few numbers per rollout, in the order of the data."""

    uids: list[str]
    lengths: npt.NDArray[np.int64]
    contexts: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32] | None
    """1 for those without, None where nothing has one."""


def run(
    selected: Path, config: PackConfig, out: Path, *, seed: int, replay: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Pack the kept rollouts of one folder into `out`; returns its manifest.

    With `config.replay` r, r rollouts of the folder `replay` are drawn for each one of `selected`.
    """
    inputs: dict[str, Path | str] = {"selected": fingerprint(selected)}
    inputs |= {"replay": replay} if replay and config.replay else {}
    tokenizer = read_manifest(selected)["inputs"].get("tokenizer")
    inputs |= {"tokenizer": tokenizer} if tokenizer else {}  # train holds it against the model's
    identity = identify("pack", VERSION, {**result_options(config), "seed": seed}, inputs)
    if is_finished(out, identity, force=force):
        return read_manifest(out)

    own = num_rows(selected, "kept")
    sources = [(selected, np.ones(own, dtype=bool))]
    if config.replay:
        if replay is None:
            raise DataError(f"pack.replay = {config.replay} needs the folder of a phase before to draw from")
        sources.append((replay, _drawn(num_rows(replay, "kept"), round(config.replay * own), seed)))

    out.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(out), tempfile.TemporaryFile(dir=out.parent) as flat:
        documents = _flatten(sources, flat)
        _check(documents, selected)
        lengths = documents.lengths
        plan = pack_rows(lengths, config.seq_len, method=config.method)
        with ShardWriter(out, identity, {"rows": ROW}, config, shard_rows=4096) as writer:
            with progress(f"{out.parent.name}: pack", plan.num_rows, "rows") as bar:
                for batch in _rows(plan, flat, documents):
                    writer.write("rows", batch)
                    bar.advance(batch.num_rows)
            return writer.publish(
                {
                    "rollouts": len(lengths),
                    "replayed": len(lengths) - own,
                    "rows": plan.num_rows,
                    "tokens": plan.num_tokens,
                    "target_tokens": int((lengths - documents.contexts).sum()),
                    "fill": plan.fill,
                }
            )


def _drawn(total: int, wanted: int, seed: int) -> npt.NDArray[np.bool_]:
    """Draw `wanted` of `total`, or all when there are not as many."""
    mask = np.zeros(total, dtype=bool)
    mask[np.random.Generator(np.random.Philox(derive_seed(seed, "replay"))).permutation(total)[:wanted]] = True
    return mask


def _flatten(sources: list[tuple[Path, npt.NDArray[np.bool_]]], flat: BinaryIO) -> _Documents:
    """Write all ids one behind the other into `flat`; return what else is known of each."""
    uids: list[str] = []
    lengths: list[npt.NDArray[np.int64]] = []
    contexts: list[npt.NDArray[np.int64]] = []
    weights: list[npt.NDArray[np.float32]] = []
    for folder, mask in sources:
        first = 0
        for batch in batches(folder, "kept", ("uid", "ids", "num_context_tokens", "weight")):
            if "weight" not in batch.schema.names:
                raise DataError(f"{folder}: selected by an older version, without the column weight; run select again")
            chosen = batch.filter(pa.array(mask[first : first + batch.num_rows]))
            first += batch.num_rows
            ids = chosen["ids"]
            flat.write(ids.flatten().to_numpy().astype(_ID, copy=False).data)
            uids += chosen["uid"].to_pylist()
            lengths.append(ids.value_lengths().to_numpy().astype(np.int64))
            contexts.append(chosen["num_context_tokens"].to_numpy())
            weights.append(chosen["weight"].to_numpy(zero_copy_only=False))  # NaN where there is none
    weight = np.concatenate(weights)
    given = None if np.isnan(weight).all() else np.nan_to_num(weight, nan=1.0)
    return _Documents(uids, np.concatenate(lengths), np.concatenate(contexts), given)


def _check(documents: _Documents, selected: Path) -> None:
    uids, lengths, contexts = documents.uids, documents.lengths, documents.contexts
    empty = np.flatnonzero(contexts >= lengths)
    if len(empty):
        raise DataError(
            f"{selected}: {len(empty)} rollouts have no token to learn, the first is {uids[empty[0]]}:"
            f" {lengths[empty[0]]} tokens, {contexts[empty[0]]} of them its prompt; leave it out of the data"
        )


def _rows(plan: Plan, flat: BinaryIO, rollouts: _Documents) -> Iterator[pa.RecordBatch]:
    flat.flush()
    tokens = np.memmap(flat, dtype=_ID, mode="r")
    lengths, weights = rollouts.lengths, rollouts.weights
    offsets, names = offsets_of(lengths), pa.array(rollouts.uids)
    ends = np.cumsum(lengths[plan.items])[plan.offsets[1:] - 1]  # tokens of all rows up to each
    first = 0
    while first < plan.num_rows:
        before = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, before + _BATCH_TOKENS)) + 1
        rows = np.arange(first, min(last, plan.num_rows))
        batch = gather_rows(tokens, offsets, plan, rows)
        documents = plan.items[plan.offsets[first] : plan.offsets[rows[-1] + 1]]
        edges = plan.offsets[first : rows[-1] + 2] - plan.offsets[first]
        assert batch.position_ids is not None, "they come unless one says no"
        is_target = batch.position_ids >= np.repeat(rollouts.contexts[documents], lengths[documents])
        columns = [
            pa.LargeListArray.from_arrays(batch.row_offsets, batch.ids),
            pa.LargeListArray.from_arrays(batch.row_offsets, is_target),
            pa.LargeListArray.from_arrays(edges, lengths[documents].astype(np.int32)),
            pa.ListArray.from_arrays(edges.astype(np.int32), names.take(pa.array(documents))),
            pa.nulls(len(rows), ROW.field("weights").type)
            if weights is None
            else pa.ListArray.from_arrays(edges.astype(np.int32), weights[documents]),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=ROW)
        first = int(rows[-1]) + 1
