"""Pack rollouts into rows of at most seq_len tokens.

Reads what select kept (and, for replay, what the phase before kept); writes rows: ids, loss mask, document lengths,
weights where select gave any, and the columns that the objective needs. No document is cut. The ids are copied through
a flat file on disk, which is mapped, so memory holds a few numbers per rollout, whatever their length.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dasd_lite.config.models import result_options
from dasd_lite.config.options import with_options
from dasd_lite.config.stages import PackConfig
from dasd_lite.console import label, note, progress
from dasd_lite.data.columns import TEACHER_LOGPROBS, Column, read_columns, read_teacher_logprobs
from dasd_lite.data.dataset import batches, num_rows
from dasd_lite.data.files import disk_errors
from dasd_lite.data.handles import Kept, Rollouts, Rows
from dasd_lite.data.manifest import hash_file, identify, read_manifest
from dasd_lite.data.records import DOCUMENT, ROW, TOKEN
from dasd_lite.data.seeds import check_seed, derive_seed, digest
from dasd_lite.data.writer import ShardWriter, is_finished
from dasd_lite.errors import DataError
from dasd_lite.method.packing import Plan, gather_rows, pack_rows
from dasd_lite.method.ragged import offsets_of
from dasd_lite.training.objectives import CheckedObjective, open_objective
from dasd_lite.training.objectives.objective import BUILT_IN_COLUMNS, Objective

VERSION = 2  # 1 had no weights
_ID = np.dtype(np.int32)
_BATCH_TOKENS = 4 << 20  # written at once


@dataclass(frozen=True)
class _Documents:
    """A few numbers per rollout, in the order of the data."""

    uids: list[str]
    prompts: npt.NDArray[np.int64]
    """Number of the prompt that each one answers, counted from 0 in the order of the data."""
    prompt_uids: list[str]
    """Of each number."""
    lengths: npt.NDArray[np.int64]
    contexts: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32] | None
    """1 for those without, None where nothing has one."""

    @property
    def num_targets(self) -> npt.NDArray[np.int64]:
        """Target tokens of each document; nothing predicts a first token."""
        return np.asarray(self.lengths - np.maximum(self.contexts, 1))


def pack(
    kept: Kept | str | PathLike[str] | None,
    config: PackConfig | None = None,
    *,
    out: str | PathLike[str],
    seed: int = 0,
    earlier: Kept | str | PathLike[str] | None = None,
    rollouts: Rollouts | str | PathLike[str] | None = None,
    earlier_rollouts: Rollouts | str | PathLike[str] | None = None,
    objective: str | Objective | type[Objective] = "sft",
    force: bool = False,
    **options: Any,
) -> Rows:
    """Pack the kept rollouts into rows of at most `seq_len` tokens.

    Args:
        kept: What select wrote; None: replayed rollouts alone are packed.
        config: Options of the stage.
        out: Folder to write.
        seed: Seed of the draw of replayed rollouts.
        earlier: What select wrote in an earlier phase. `config.replay` r draws r of them for each one of `kept`,
            `config.replay_answers` draws as many. Without `kept`, the default is all.
        rollouts: The rollouts that `kept` was selected from, for "teacher_logprobs".
        earlier_rollouts: Those that `earlier` was selected from, likewise.
        objective: What the rows will be trained with, as its name or object. The columns it needs are packed too, and
            with `groups` all answers of a prompt share a row.
        force: Replace a folder that was made with other options.
        **options: Fields of PackConfig, in place of those of `config`.

    Returns:
        The rows.

    Raises:
        ConfigError: A wrong option.
        DataError: A rollout with nothing to train on, or without a column that the objective needs; folders that were
            selected for different tokenizers.
        CheckpointError: `out` was made with other options.
    """
    check_seed(seed)
    config, out = with_options(PackConfig, config, options, "pack"), Path(out)
    wanted, sources = open_objective(objective), _sources(kept, earlier, config, seed)
    needs = [name for name in wanted.needs if name != "weight"]  # weights are always packed
    needs += ["prompt"] if wanted.groups and "prompt" not in needs else []
    teachers = [Rollouts.of(source).folder for source in (rollouts, earlier_rollouts) if source is not None]

    inputs: dict[str, Path | str] = {name: folder for name, (folder, _) in sources.items()}
    tokenizer = _tokenizer([folder for folder, _ in sources.values()])
    inputs |= {"tokenizer": tokenizer} if tokenizer else {}  # train compares it with the model's
    asked = {key: value for key, value in result_options(config).items() if key not in ("columns", "replay_from")}
    asked |= {"seed": seed}
    asked |= ({"needs": sorted(needs)} if needs else {}) | ({"groups": True} if wanted.groups else {})
    if config.columns is not None and not set(needs) <= set(BUILT_IN_COLUMNS):
        inputs["columns"] = config.columns
    if TEACHER_LOGPROBS in needs:
        inputs |= {f"rollouts.{i}": folder for i, folder in enumerate(teachers)}
    identity = identify("pack", VERSION, asked, inputs)
    if is_finished(out, identity, force=force):
        return Rows(out)

    out.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(out), tempfile.TemporaryFile(dir=out.parent) as flat:
        documents = _flatten(list(sources.values()), flat)
        _check(documents, next(iter(sources.values()))[0], wanted, config.seq_len)
        flat.flush()
        tokens = np.memmap(flat, dtype=_ID, mode="r")
        plan = _plan(documents, config, wanted.groups)
        columns = _columns(needs, documents, tokens, config.columns, teachers, out.parent)
        schema = pa.schema([*ROW, *(_field(column) for column in columns)])
        with ShardWriter(out, identity, {"rows": schema}, config, shard_rows=4096) as writer:
            with progress(label(out.parent.name, "pack"), plan.num_rows, "rows") as bar:
                for batch in _rows(plan, tokens, documents, columns, schema):
                    writer.write("rows", batch)
                    bar.advance(batch.num_rows)
            writer.close()
            # Other answers, but the same rows: what was trained on them stays. The tokenizer is not in the rows.
            rows = [hash_file(path) for path in sorted(out.glob("rows-*.parquet"))]
            writer.state = {"content": digest("rows", VERSION, rows, tokenizer, wanted.groups)}
            writer.publish(
                {
                    "rollouts": len(documents.uids),
                    "replayed": int(sources["replay"][1].sum()) if "replay" in sources else 0,
                    "rows": plan.num_rows,
                    "tokens": plan.num_tokens,
                    "target_tokens": int((documents.lengths - documents.contexts).sum()),
                    "fill": plan.fill,
                }
            )
    return Rows(out)


def _sources(
    kept: Kept | str | PathLike[str] | None,
    earlier: Kept | str | PathLike[str] | None,
    config: PackConfig,
    seed: int,
) -> dict[str, tuple[Path, npt.NDArray[np.bool_]]]:
    """Return the folders to pack, and which of their rollouts: "selected", "replay", or both."""
    sources: dict[str, tuple[Path, npt.NDArray[np.bool_]]] = {}
    if kept is not None:
        selected = Kept.of(kept).folder
        sources["selected"] = selected, np.ones(num_rows(selected, "kept"), dtype=bool)
    if kept is not None and not config.replays:
        return sources
    if earlier is None:
        option = "replay_answers" if config.replay_answers is not None else "replay"
        raise DataError(
            f"pack.{option} = {getattr(config, option)} adds rollouts of an earlier phase; pass their folder as"
            " `earlier`"
            if config.replays
            else "there is nothing to pack: pass what select wrote as `kept` or `earlier`"
        )
    before = Kept.of(earlier).folder
    total = num_rows(before, "kept")
    number = config.replay_answers
    if number is None:
        number = total if kept is None else round(config.replay * len(sources["selected"][1]))
    elif number > total:
        note(f"pack.replay_answers = {number:,}, but {before} has {total:,} rollouts; all of them are taken")
    sources["replay"] = before, _drawn(total, number, seed)
    return sources


def _tokenizer(folders: Sequence[Path]) -> str | None:
    """Return the fingerprint of the tokenizer that the rollouts were selected for; None if it is not known."""
    known = {folder: read_manifest(folder)["inputs"].get("tokenizer") for folder in folders}
    tokenizers = {tokenizer for tokenizer in known.values() if tokenizer}
    if len(tokenizers) > 1:
        raise DataError(
            f"{' and '.join(map(str, known))}: selected for students with different tokenizers or chat templates;"
            " replay rollouts that were selected for this student"
        )
    return next(iter(tokenizers), None)


def _drawn(total: int, wanted: int, seed: int) -> npt.NDArray[np.bool_]:
    """Draw `wanted` of `total`, or all when there are not as many."""
    mask = np.zeros(total, dtype=bool)
    mask[np.random.Generator(np.random.Philox(derive_seed(seed, "replay"))).permutation(total)[:wanted]] = True
    return mask


def _flatten(sources: list[tuple[Path, npt.NDArray[np.bool_]]], flat: BinaryIO) -> _Documents:
    """Write all ids one after another into `flat`; return what else is known about each rollout."""
    uids: list[str] = []
    prompts: list[int] = []
    number_of: dict[str, int] = {}
    lengths: list[npt.NDArray[np.int64]] = []
    contexts: list[npt.NDArray[np.int64]] = []
    weights: list[npt.NDArray[np.float32]] = []
    for folder, mask in sources:
        first = 0
        for batch in batches(folder, "kept", ("uid", "prompt_uid", "ids", "num_context_tokens", "weight")):
            chosen = batch.filter(pa.array(mask[first : first + batch.num_rows]))
            first += batch.num_rows
            ids = chosen["ids"]
            flat.write(ids.flatten().to_numpy().astype(_ID, copy=False).data)
            uids += chosen["uid"].to_pylist()
            prompts += [number_of.setdefault(uid, len(number_of)) for uid in chosen["prompt_uid"].to_pylist()]
            lengths.append(ids.value_lengths().to_numpy().astype(np.int64))
            contexts.append(chosen["num_context_tokens"].to_numpy())
            weights.append(chosen["weight"].to_numpy(zero_copy_only=False))  # NaN where there is none
    weight = np.concatenate(weights)
    return _Documents(
        uids=uids,
        prompts=np.array(prompts, np.int64),
        prompt_uids=list(number_of),
        lengths=np.concatenate(lengths),
        contexts=np.concatenate(contexts),
        weights=None if np.isnan(weight).all() else np.nan_to_num(weight, nan=1.0),
    )


def _check(documents: _Documents, selected: Path, objective: CheckedObjective, seq_len: int) -> None:
    uids, lengths, contexts = documents.uids, documents.lengths, documents.contexts
    too_long = np.flatnonzero(lengths > seq_len)
    if len(too_long):
        raise DataError(
            f"{selected}: {len(too_long)} rollouts are longer than a row, the first is {uids[too_long[0]]}:"
            f" {lengths[too_long[0]]} tokens, pack.seq_len = {seq_len}; select with seq_len = {seq_len}, which rejects"
            " them with a count, or pack into longer rows"
        )
    empty = np.flatnonzero(contexts >= lengths)
    if len(empty):
        raise DataError(
            f"{selected}: {len(empty)} rollouts have no token to learn, the first is {uids[empty[0]]}:"
            f" {lengths[empty[0]]} tokens, {contexts[empty[0]]} of them its prompt; leave it out of the data"
        )
    if "weight" in objective.needs and documents.weights is None:
        raise DataError(
            f"{selected}: train.objective = {objective.name!r} needs weights, but no rollout has one; set"
            " select.weighting and run select again"
        )


def _plan(documents: _Documents, config: PackConfig, groups: bool) -> Plan:
    """Distribute the documents over rows; with `groups` those of one prompt share a row."""
    if not groups:
        return pack_rows(documents.lengths, config.seq_len, method=config.method)
    sizes = np.bincount(documents.prompts, weights=documents.lengths).astype(np.int64)
    if len(long := np.flatnonzero(sizes > config.seq_len)):
        first = long[0]
        raise DataError(
            f"prompt {documents.prompt_uids[first]}: its {np.sum(documents.prompts == first)} answers have"
            f" {sizes[first]} tokens together, more than pack.seq_len = {config.seq_len}, and the objective needs them"
            " in one row; raise pack.seq_len, or lower select.keep or select.max_tokens"
        )
    plan = pack_rows(sizes, config.seq_len, method=config.method)
    members = np.split(np.argsort(documents.prompts, kind="stable"), np.cumsum(np.bincount(documents.prompts))[:-1])
    rows = [np.concatenate([members[prompt] for prompt in plan.row(row)]) for row in range(plan.num_rows)]
    items = np.concatenate(rows).astype(np.uint32)
    return Plan(items, offsets_of([len(row) for row in rows]), plan.dropped, plan.num_tokens, plan.seq_len)


def _columns(
    needs: Sequence[str],
    documents: _Documents,
    tokens: npt.NDArray[np.int32],
    path: Path | None,
    rollouts: Sequence[Path],
    scratch: Path,
) -> list[Column]:
    """Collect the columns that the objective needs, in its order."""
    uids, num_targets, ends = documents.uids, documents.num_targets, np.cumsum(documents.lengths)
    columns: dict[str, Column] = {"prompt": Column("prompt", documents.prompts, None)}
    if TEACHER_LOGPROBS in needs:
        if not rollouts:
            raise DataError(
                f"the objective needs {TEACHER_LOGPROBS}, which are in the rollouts; pass their folder as `rollouts`"
            )
        columns[TEACHER_LOGPROBS] = read_teacher_logprobs(
            rollouts, uids, lambda d: tokens[ends[d] - num_targets[d] : ends[d]], num_targets, scratch
        )
    if given := [name for name in needs if name not in BUILT_IN_COLUMNS]:
        if path is None:
            raise DataError(
                f"the objective needs the column {given[0]!r}; set pack.columns to a Parquet file with uid and"
                f" {', '.join(given)}"
            )
        columns |= {column.name: column for column in read_columns(path, given, uids, num_targets, scratch)}
    return [columns[name] for name in needs]


def _field(column: Column) -> pa.Field:
    """Return where a column goes in the rows."""
    if column.offsets is None:
        return pa.field(f"{DOCUMENT}{column.name}", pa.list_(column.type))
    return pa.field(f"{TOKEN}{column.name}", pa.large_list(column.type))


def _rows(
    plan: Plan, tokens: npt.NDArray[np.int32], documents: _Documents, extra: Sequence[Column], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    lengths, weights, num_targets = documents.lengths, documents.weights, documents.num_targets
    offsets, names = offsets_of(lengths), pa.array(documents.uids)
    ends = np.cumsum(lengths[plan.items])[plan.offsets[1:] - 1]  # tokens of all rows up to each
    numbers = 1 + sum(column.values[:1].size for column in extra if column.offsets is not None)  # per token
    first = 0
    while first < plan.num_rows:
        before = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, before + _BATCH_TOKENS // numbers)) + 1
        rows = np.arange(first, min(last, plan.num_rows))
        batch = gather_rows(tokens, offsets, plan, rows)
        chosen = plan.items[plan.offsets[first] : plan.offsets[rows[-1] + 1]]
        edges = plan.offsets[first : rows[-1] + 2] - plan.offsets[first]
        assert batch.position_ids is not None, "they are asked for"
        is_target = batch.position_ids >= np.repeat(documents.contexts[chosen], lengths[chosen])
        columns = [
            pa.LargeListArray.from_arrays(batch.row_offsets, batch.ids),
            pa.LargeListArray.from_arrays(batch.row_offsets, is_target),
            pa.LargeListArray.from_arrays(edges, lengths[chosen].astype(np.int32)),
            pa.ListArray.from_arrays(edges.astype(np.int32), names.take(pa.array(chosen))),
            pa.nulls(len(rows), ROW.field("weights").type)
            if weights is None
            else pa.ListArray.from_arrays(edges.astype(np.int32), weights[chosen]),
        ]
        target_edges = offsets_of(num_targets[chosen])[edges]
        for column in extra:
            values = column.take(chosen)
            entries = pa.array(values.ravel())
            if values.ndim == 2:
                entries = pa.FixedSizeListArray.from_arrays(entries, values.shape[1])
            if column.offsets is None:
                columns.append(pa.ListArray.from_arrays(edges.astype(np.int32), entries))
            else:
                columns.append(pa.LargeListArray.from_arrays(target_edges, entries))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
        first = int(rows[-1]) + 1
