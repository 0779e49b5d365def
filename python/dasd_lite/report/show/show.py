"""Look into a folder: sentences coloured by class, trained and masked tokens, reasons, the steps of a training.

Input: a finished folder of any stage, and a uid or none. Output: text on the terminal, by show_print.py. Invariant:
without a uid only so much is shown as one can look over, and what is left out is counted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import ValidationError

from dasd_lite import console
from dasd_lite.config.stages import RecipeConfig, SelectConfig
from dasd_lite.data.dataset import batches, shards
from dasd_lite.data.manifest import read_manifest
from dasd_lite.data.metrics import read_metrics
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.method.sentences import sentence_ends
from dasd_lite.report.show.pieces import abridge, sentence_pieces, token_pieces
from dasd_lite.report.show.render import Shown, print_legend, print_metrics, print_view, safe

if TYPE_CHECKING:
    from dasd_lite.chat.chat import Chat


@dataclass
class _Place:
    """A folder and what stands around it: scores, recipe, tokenizer."""

    folder: Path
    tables: list[str]
    beta: float = SelectConfig().beta
    chat: Chat | None = None
    notes: list[str] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Of a training."""

    @property
    def scores(self) -> Path | None:
        """The scores of the same phase, where there are any."""
        folder = self.folder if self.folder.name == "score" else self.folder.parent / "score"
        return folder if (folder / "manifest.json").exists() else None


def show(folder: Path, uid: str | None, *, rejected: bool, limit: int = 3) -> None:
    """Print the rollout `uid` (or all of a prompt's) of a folder, or its first `limit`.

    Raises DataError when there is nothing to show in the folder, or no such rollout.
    """
    place = _open(folder, rejected=rejected)
    terminal = console.out()
    if uid is None and place.metrics:
        print_metrics(terminal, place.metrics)
    for note in place.notes:
        terminal.print(safe(note), style="dim", markup=False, soft_wrap=True)  # a path is one to copy
    if not place.tables:
        if uid is not None:
            raise DataError(f"{folder}: no rollout {uid!r}: the rows that were trained on are not beside it")
        return
    found = _find(place, uid, limit, rejected=rejected)
    if not found:
        terminal.print("No rollout was rejected." if rejected else "There is no rollout in it.")
        return
    shown = [view for table, position in found for view in _views(place, table, position, uid, limit)]
    for view in shown:
        if uid is None:
            view.pieces = abridge(view.pieces)
        print_view(terminal, view)
    print_legend(terminal, shown, place.beta)


# --- finding ----------------------------------------------------------------------------------------


def _open(folder: Path, *, rejected: bool) -> _Place:
    """Find the tables to show, and what stands around the folder."""
    notes, metrics = [], []
    if (folder / "metrics.jsonl").exists() or folder.name == "train":
        metrics = list(read_metrics(folder / "metrics.jsonl"))
        notes += [f"Every step: {folder / 'metrics.jsonl'}"] if metrics else []
        rows = folder.parent / "pack"
        if (rows / "manifest.json").exists():
            notes += _what_train_reads(folder, rows)
            folder = rows
        elif metrics:
            notes.append("The rows it was trained on are not beside it.")
            return _Place(folder, [], notes=notes, metrics=metrics)
    if not (folder / "manifest.json").exists() and not (folder / "unfinished.json").exists():
        raise DataError(f"{folder}: {_what_can_be_shown(folder)}")
    manifest = read_manifest(folder)
    tables = list(manifest["tables"])
    if tables == ["scores"]:
        source = _source(folder.parent)
        notes.append(f"The scores of {source}")
        folder, tables = source, ["rollouts"]
    known = [name for name in ("rollouts", "kept", "rejected", "rows", "graded") if name in tables]
    if not known:
        raise DataError(f"{folder}: {_what_can_be_shown(folder.parent)}")
    if rejected and "rejected" not in known:
        raise DataError(f"{folder}: only a select folder knows what was rejected; this one holds {', '.join(known)}")
    if known == ["rows"]:
        notes += _trained_of_all(manifest["counts"])
    place = _Place(folder, known, notes=notes, metrics=metrics)
    _surroundings(place)
    return place


def _what_train_reads(folder: Path, rows: Path) -> list[str]:
    """Name the rows beside a train folder, and say when they are not those it was trained on."""
    notes = [f"What train reads: {rows}"]
    if (folder / "manifest.json").exists():
        read = read_manifest(folder)["inputs"].get("rows")
        if read not in (None, read_manifest(rows)["fingerprint"]):
            notes.append("They were packed anew since: not the rows that this model was trained on.")
    return notes


def _trained_of_all(counts: dict[str, Any]) -> list[str]:
    if not counts.get("tokens"):
        return []
    trained, tokens = counts["target_tokens"], counts["tokens"]
    return [
        f"{counts['rollouts']:,} rollouts in {counts['rows']:,} rows, {counts['fill']:.1%} full;"
        f" {trained:,} of {tokens:,} tokens are trained on ({trained / tokens:.1%})"
    ]


def _what_can_be_shown(folder: Path) -> str:
    found = sorted(path.parent for path in folder.glob("**/manifest.json") if path.parent != folder)
    names = [str(path) for path in found if (path / "metrics.jsonl").exists() or read_manifest(path)["tables"]]
    if not folder.is_dir():
        return "no such folder"
    if not names:
        return "no finished folder of rollouts, scores or rows is in it"
    return f"no rollouts of its own; show can read {', '.join(names)}"


def _source(phase: Path) -> Path:
    for name in ("sample", "ingest", "mix"):
        if (phase / name / "manifest.json").exists():
            return phase / name
    raise DataError(f"{phase}: the rollouts that were scored are not beside the scores")


def _surroundings(place: _Place) -> None:
    """Read β from the recipe above the folder, and the student's tokenizer where tokens are shown."""
    run = next((path for path in place.folder.resolve().parents if (path / "recipe.json").exists()), None)
    wants_tokens = bool({"kept", "rows"} & set(place.tables))
    if run is None:
        if wants_tokens:
            place.notes.append("No recipe.json above this folder, so the student's tokenizer is not known.")
        return
    try:
        recipe = RecipeConfig.model_validate_json((run / "recipe.json").read_text(encoding="utf-8"))
    except ValidationError as error:
        raise DataError(f"{run / 'recipe.json'}: {error.errors()[0]['msg']}; this version did not write it") from error
    names = place.folder.resolve().relative_to(run).parts
    place.beta = next((phase.select.beta for phase in recipe.phase if phase.name == names[0]), place.beta)
    if wants_tokens:
        from dasd_lite.chat.chat import Chat
        from dasd_lite.data.hub import model_folder

        try:
            place.chat = Chat(model_folder(recipe.student.model))
        except ConfigError as error:
            place.notes.append(f"Tokens are not shown: {error}")


def _find(place: _Place, uid: str | None, limit: int, *, rejected: bool) -> list[tuple[str, int]]:
    """Return table and row of what is to be shown."""
    if uid is None:
        name = "rejected" if rejected else place.tables[0]
        rows = sum(pq.ParquetFile(path).metadata.num_rows for path in shards(place.folder, name))
        return [(name, position) for position in range(min(limit, rows))]
    names: dict[str, None] = {}
    found = []
    for table in place.tables:
        position = 0
        columns = ["uids"] if table == "rows" else ["uid", "prompt_uid"]
        for batch in batches(place.folder, table, columns, batch_size=4096):
            for row in zip(*(batch[name].to_pylist() for name in columns), strict=True):
                keys = row[0] if table == "rows" else row
                names.update(dict.fromkeys(keys))
                if uid in keys:
                    found.append((table, position))
                position += 1
    if not found:
        near = difflib.get_close_matches(uid, names, n=1, cutoff=0.0)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise DataError(f"{place.folder}: no rollout or prompt {uid!r} in it{hint}")
    return found


def _row(folder: Path, table: str, position: int) -> dict[str, Any]:
    """Read one row; only its row group is decompressed."""
    for path in shards(folder, table):
        with pq.ParquetFile(path, memory_map=True) as file:
            if position >= file.metadata.num_rows:
                position -= file.metadata.num_rows
                continue
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if position < rows:
                    found: dict[str, Any] = file.read_row_group(group).slice(position, 1).to_pylist()[0]
                    return found
                position -= rows
    raise IndexError(position)


def _score(place: _Place, uid: str) -> dict[str, Any] | None:
    if place.scores is None:
        return None
    position = 0
    for batch in batches(place.scores, "scores", ["uid"], batch_size=4096):
        uids = batch["uid"].to_pylist()
        if uid in uids:
            return _row(place.scores, "scores", position + uids.index(uid))
        position += len(uids)
    return None


# --- what is shown of a row ----------------------------------------------------------------------------


def _views(place: _Place, table: str, position: int, uid: str | None, limit: int) -> Iterator[Shown]:
    row = _row(place.folder, table, position)
    if table == "rows":
        yield from _documents(place, row, position, uid, limit)
        return
    score = _score(place, row["uid"])
    facts = [f"prompt {row['prompt_uid']}", row["domain"], f"candidate {row['index']}"]
    facts += [f"answer {row['answer']}"] if row["answer"] is not None else []
    warning = "truncated" if row["finish_reason"] == "length" else ""
    if table == "graded":
        facts += [f"found {row['extracted']}" if row["extracted"] is not None else "no answer found", row["grade"]]
        facts.append(f"{row['num_tokens']:,} tokens")
    if table in ("kept", "rejected"):
        facts += [f"score {row['score']:.4g}"] if row["score"] is not None else []
        facts.append(f"{len(row['ids']) - row['num_context_tokens']:,} tokens")
    if table == "rejected":
        warning = f"rejected: {row['reason']} ({row['value']:.4g})"
    title = f"rollout {row['uid']}"
    if table in ("kept", "rejected") and place.chat is not None:
        mask = np.arange(len(row["ids"])) >= row["num_context_tokens"]
        ends = sentence_ends(row["completion"]).tolist()
        pieces = token_pieces(place.chat.piece, np.array(row["ids"]), mask, ends, place.beta, score)
        yield Shown(title, facts, pieces, warning=warning)
    else:
        pieces = sentence_pieces(row["completion"], row["prefix_bytes"], place.beta, score)
        yield Shown(title, facts, pieces, row["messages"][-1]["content"], warning)


def _documents(place: _Place, row: dict[str, Any], position: int, uid: str | None, limit: int) -> Iterator[Shown]:
    """Cut a row for training into its documents: that of `uid`, or the first `limit`."""
    ids, mask, names = np.array(row["ids"]), np.array(row["loss_mask"]), row["uids"]
    heading = f"row {position}  {len(ids):,} tokens, {mask.sum():,} trained ({mask.mean():.1%})"
    heading += " · 1 document" if len(names) == 1 else f" · {len(names)} documents, none sees another"
    if place.chat is None:
        yield Shown("rollouts", names, [], row=heading)
        return
    weights = row.get("weights") or [None] * len(names)
    chosen = [number for number, name in enumerate(names) if name == uid] if uid else range(min(limit, len(names)))
    ends = np.cumsum(row["doc_lengths"])
    for number in chosen:
        name, length = names[number], row["doc_lengths"][number]
        span = slice(ends[number] - length, ends[number])
        facts = [f"document {number + 1} of {len(names)}", f"{length:,} tokens, {mask[span].sum():,} trained"]
        facts += [f"weight {weights[number]:.3g}"] if weights[number] is not None else []
        pieces = token_pieces(place.chat.piece, ids[span], mask[span], [], place.beta, _score(place, name))
        view = Shown(f"rollout {name}", facts, pieces, row=heading if number == chosen[0] else "")
        if number == chosen[-1] and uid is None and (more := names[number + 1 :]):
            view.after = f"… {len(more)} more of this row: {', '.join(more[:8])}{' …' if len(more) > 8 else ''}"
        yield view
