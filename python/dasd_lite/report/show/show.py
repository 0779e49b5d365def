"""Show what a folder holds: sentences colored by class, trained and masked tokens, reasons, training steps.

Input: a stage folder, and optionally a uid. Output: text in the terminal, printed by render.py. Invariant: without a
uid, only as much is printed as fits on a few screens, and what is left out is counted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dasd_lite import console
from dasd_lite.config.chain import SOURCES
from dasd_lite.config.stages import SelectConfig
from dasd_lite.data.dataset import batches, num_rows, read_row
from dasd_lite.data.journal import stored_rows
from dasd_lite.data.manifest import fingerprint, read_manifest
from dasd_lite.data.metrics import read_metrics
from dasd_lite.data.records import GRADED, KEPT, OWN_TASK, REJECTED, ROLLOUT
from dasd_lite.data.run_folder import RunFolder, StageFolder
from dasd_lite.data.writer import JOURNAL_FILE
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.grading.rollouts import REASONS
from dasd_lite.method.sentences import sentence_ends
from dasd_lite.report.graded import reference_in_words, without_hidden_text
from dasd_lite.report.results import read_recipe
from dasd_lite.report.show.pieces import SentenceProbabilities, abridge, sentence_pieces, token_pieces
from dasd_lite.report.show.render import View, print_legend, print_metrics, print_view, safe

if TYPE_CHECKING:
    from dasd_lite.chat.chat import Chat


@dataclass
class _Opened:
    """A stage folder with what is needed to print it."""

    stage: StageFolder
    tables: list[str]
    beta: float = SelectConfig().beta
    chat: Chat | None = None
    notes: list[str] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Steps of a training run."""

    @property
    def folder(self) -> Path:
        """Where the tables are."""
        return self.stage.path

    @property
    def scores(self) -> Path | None:
        """The scores of the same phase, if it has any."""
        score = self.stage.sibling("score")
        return score.path if score.is_finished else None


_SCHEMAS = {"rollouts": ROLLOUT, "kept": KEPT, "rejected": REJECTED, "graded": GRADED}


def show(folder: Path, uid: str | None, *, rejected: bool, limit: int = 3) -> None:
    """Print rollouts of a folder.

    Args:
        folder: A stage folder.
        uid: A rollout or a prompt, of which all rollouts are printed; None prints the first `limit` rollouts.
        rejected: Show what `select` rejected.
        limit: How many to print without a uid.

    Raises:
        DataError: The folder has nothing to show, or no such rollout.
    """
    terminal, stage = console.out(), StageFolder.at(folder)
    if not stage.is_finished and (stage.path / JOURNAL_FILE).exists():
        _show_unfinished(stage, uid, limit)
        return
    opened = _open(stage, rejected=rejected)
    if uid is None and opened.metrics:
        print_metrics(terminal, opened.metrics)
    for note in opened.notes:
        terminal.print(safe(note), style="dim", markup=False, soft_wrap=True)  # paths are easy to copy when unwrapped
    if not opened.tables:
        if uid is not None:
            raise DataError(f"{folder}: no rollout {uid!r}: the training rows are not in a folder next to it")
        return
    rows = _find(opened, uid, limit, rejected=rejected)
    if not rows:
        terminal.print("No rollout was rejected." if rejected else "The folder has no rollouts.")
        return
    read = ((table, position, read_row(opened.folder, table, position)) for table, position in rows)
    views = [view for found in read for view in _views(opened, *found, uid, limit)]
    _print_views(views, opened.beta, in_full=uid is not None)


def _show_unfinished(stage: StageFolder, uid: str | None, limit: int) -> None:
    """Print answers that a stage under way, or one that was stopped, has so far."""
    table, schema = ("graded", GRADED) if stage.stage == "evaluate" else ("rollouts", ROLLOUT)
    number, chosen = 0, list[dict[str, Any]]()
    for row in stored_rows(stage.path, table, schema):
        number += 1
        if uid in (row["uid"], row["prompt_uid"]) or (uid is None and len(chosen) < limit):
            chosen.append(row)
    console.out().print(safe(f"{stage.path}: unfinished, {number:,} answers so far"), style="dim", soft_wrap=True)
    if uid is not None and not chosen:
        raise DataError(f"{stage.path}: has no rollout or prompt {uid!r} so far")
    opened = _Opened(stage, [table])
    views = [view for row in chosen for view in _views(opened, table, 0, row, uid, limit)]
    _print_views(views, opened.beta, in_full=uid is not None)


def _print_views(views: list[View], beta: float, *, in_full: bool) -> None:
    for view in views:
        if not in_full:
            view.pieces = abridge(view.pieces)
        print_view(console.out(), view)
    print_legend(console.out(), views, beta)


# --- opening ----------------------------------------------------------------------------------------


def _open(stage: StageFolder, *, rejected: bool) -> _Opened:
    """Choose the tables to show: of scores, the rollouts that were scored; of a training run, its rows."""
    notes: list[str] = []
    metrics = list(read_metrics(stage.path / "metrics.jsonl"))
    if metrics or stage.stage == "train":
        notes += [f"Every step: {stage.path / 'metrics.jsonl'}"] if metrics else []
        rows = stage.sibling("pack")
        if rows.is_finished:
            notes += _training_rows(stage, rows)
            stage = rows
        elif metrics:
            notes.append("The rows it was trained on are not in a folder next to it.")
            return _Opened(stage, [], notes=notes, metrics=metrics)
    if not stage.is_finished and not (stage.path / "unfinished.json").exists():
        raise DataError(f"{stage.path}: {_suggestion(stage.path)}")
    manifest = read_manifest(stage.path)
    tables = list(manifest["tables"])
    if tables == ["scores"]:
        stage = _scored(stage)
        notes.append(f"The scores of {stage.path}")
        tables = ["rollouts"]
    known = [name for name in ("rollouts", "kept", "rejected", "rows", "graded") if name in tables]
    if not known:
        raise DataError(f"{stage.path}: {_suggestion(stage.path.parent)}")
    if rejected and "rejected" not in known:
        raise DataError(f"{stage.path}: only a select folder has rejected rollouts; this one has {', '.join(known)}")
    if known == ["rows"]:
        notes += _row_totals(manifest["counts"])
    opened = _Opened(stage, known, notes=notes, metrics=metrics)
    _read_run(opened)
    return opened


def _training_rows(train: StageFolder, rows: StageFolder) -> list[str]:
    """Name the rows of a training run, and say so if they have been packed again since."""
    notes = [f"Its training rows: {rows.path}"]
    if train.is_finished:
        read = read_manifest(train.path)["inputs"].get("rows")
        if read not in (None, fingerprint(rows.path)):
            notes.append("These rows were packed again later: they are not the rows that this model was trained on.")
    return notes


def _row_totals(counts: Mapping[str, Any]) -> list[str]:
    if not counts.get("tokens"):
        return []
    trained, tokens = counts["target_tokens"], counts["tokens"]
    return [
        f"{counts['rollouts']:,} rollouts in {counts['rows']:,} rows, {counts['fill']:.1%} full;"
        f" {trained:,} of {tokens:,} tokens are trained on ({trained / tokens:.1%})"
    ]


def _suggestion(folder: Path) -> str:
    """Say why nothing can be shown, and what can be shown below `folder`."""
    if not folder.is_dir():
        trial = folder.parents[1] / "trial" / folder.parent.name / folder.name if len(folder.parts) > 2 else folder
        return f"no such folder; the trial has answers in {trial}" if trial.is_dir() else "no such folder"
    below = sorted(path.parent for path in folder.glob("**/manifest.json") if path.parent != folder)
    names = [str(path) for path in below if (path / "metrics.jsonl").exists() or read_manifest(path)["tables"]]
    if not names:
        return "has no finished folder of rollouts, scores, or rows"
    return f"has no rollouts itself; show can read {', '.join(names)}"


def _scored(score: StageFolder) -> StageFolder:
    """Return the rollouts of a scores folder."""
    for source in SOURCES:
        if (rollouts := score.sibling(source)).is_finished:
            return rollouts
    raise DataError(f"{score.path}: the rollouts that were scored are not in a folder next to it")


def _read_run(opened: _Opened) -> None:
    """Read β from the run's recipe, and the student's tokenizer if tokens are shown."""
    shows_tokens = bool({"kept", "rows"} & set(opened.tables))
    run = RunFolder.containing(opened.folder)
    if run is None:
        if shows_tokens:
            opened.notes.append("Tokens are not shown: without a recipe.json above the folder, the student is unknown.")
        return
    recipe = read_recipe(run)
    name = opened.folder.resolve().relative_to(run.path).parts[0]
    opened.beta = next((phase.select.beta for phase in recipe.phase if phase.name == name), opened.beta)
    if shows_tokens:
        from dasd_lite.chat.chat import Chat
        from dasd_lite.data.hub import model_folder

        try:
            opened.chat = Chat(model_folder(recipe.student.model))
        except ConfigError as error:
            opened.notes.append(f"Tokens are not shown: {error}")


# --- finding ----------------------------------------------------------------------------------------


def _find(opened: _Opened, uid: str | None, limit: int, *, rejected: bool) -> list[tuple[str, int]]:
    """Return table and position of each row to show."""
    if uid is None:
        table = "rejected" if rejected else opened.tables[0]
        return [(table, position) for position in range(min(limit, num_rows(opened.folder, table)))]
    names: dict[str, None] = {}
    matches = []
    for table in opened.tables:
        position = 0
        columns = ["uids"] if table == "rows" else ["uid", "prompt_uid"]
        for batch in batches(opened.folder, table, columns, batch_size=4096):
            for row in zip(*(batch[name].to_pylist() for name in columns), strict=True):
                keys = row[0] if table == "rows" else row
                names.update(dict.fromkeys(keys))
                if uid in keys:
                    matches.append((table, position))
                position += 1
    if not matches:
        near = difflib.get_close_matches(uid, names, n=1, cutoff=0.0)
        hint = f"; the closest is {near[0]!r}" if near else ""
        raise DataError(f"{opened.folder}: has no rollout or prompt {uid!r}{hint}")
    return matches


def _probabilities(opened: _Opened, uid: str) -> SentenceProbabilities | None:
    """Read the scored sentences of a rollout; None if it was not scored."""
    if opened.scores is None:
        return None
    position = 0
    for batch in batches(opened.scores, "scores", ["uid"], batch_size=4096):
        uids = batch["uid"].to_pylist()
        if uid in uids:
            return SentenceProbabilities.of(read_row(opened.scores, "scores", position + uids.index(uid)))
        position += len(uids)
    return None


# --- views ------------------------------------------------------------------------------------------


def _views(
    opened: _Opened, table: str, position: int, row: dict[str, Any], uid: str | None, limit: int
) -> Iterator[View]:
    if table == "rows":
        yield from _documents(opened, row, position, uid, limit)
        return
    if missing := [name for name in _SCHEMAS[table].names if name not in row]:
        raise DataError(
            f"{opened.folder}: has no column {missing[0]!r}; another version of dasd-lite wrote it: run its stage again"
        )
    row = without_hidden_text(row)
    probabilities = _probabilities(opened, row["uid"])
    facts = [f"prompt {row['prompt_uid']}", row["domain"], f"candidate {row['index']}"]
    facts += [f"answer {reference_in_words(row['answer'])}"] if row["answer"] is not None else []
    warning = "truncated" if row["finish_reason"] == "length" else ""
    if table == "graded":
        if row["grade"] is None:
            facts.append("not graded yet")
        else:
            said = f"extracted {row['extracted']}" if row["extracted"] is not None else "no answer in it"
            facts += [said, row["grade"]]
        facts += [row["reason"]] if row["reason"] else []
        facts += [row["task"]] if row["task"] not in (None, OWN_TASK) else []
        facts.append(f"{row['num_tokens']:,} tokens")
    if table in ("kept", "rejected"):
        facts += [row["grade"]] if row["grade"] is not None else []
        facts += [f"score {row['score']:.4g}"] if row["score"] is not None else []
        facts.append(f"{len(row['ids']) - row['num_context_tokens']:,} tokens")
    if table == "rejected":
        warning = f"rejected: {row['reason']}" + ("" if row["reason"] in REASONS else f" ({row['value']:.4g})")
    title = f"rollout {row['uid']}"
    if table in ("kept", "rejected") and opened.chat is not None:
        mask = np.arange(len(row["ids"])) >= row["num_context_tokens"]
        ends = sentence_ends(row["completion"]).tolist()
        pieces = token_pieces(opened.chat.piece, np.array(row["ids"]), mask, ends, opened.beta, probabilities)
        yield View(title, facts, pieces, warning=warning)
    else:
        pieces = sentence_pieces(row["completion"], row["prefix_bytes"], opened.beta, probabilities)
        yield View(title, facts, pieces, row["messages"][-1]["content"], warning)


def _documents(opened: _Opened, row: dict[str, Any], position: int, uid: str | None, limit: int) -> Iterator[View]:
    """Cut a training row into its documents: that of `uid`, or the first `limit`."""
    ids, mask, names = np.array(row["ids"]), np.array(row["loss_mask"]), row["uids"]
    heading = f"row {position}  {len(ids):,} tokens, {mask.sum():,} trained ({mask.mean():.1%})"
    heading += " · 1 document" if len(names) == 1 else f" · {len(names)} documents, none attends to another"
    if opened.chat is None:
        yield View("rollouts", names, [], row=heading)
        return
    weights = row.get("weights") or [None] * len(names)
    chosen: Sequence[int] = [i for i, name in enumerate(names) if name == uid] if uid else range(len(names))[:limit]
    ends = np.cumsum(row["doc_lengths"])
    for index in chosen:
        name, length = names[index], row["doc_lengths"][index]
        span = slice(ends[index] - length, ends[index])
        facts = [f"document {index + 1} of {len(names)}", f"{length:,} tokens, {mask[span].sum():,} trained"]
        facts += [f"weight {weights[index]:.3g}"] if weights[index] is not None else []
        probabilities = _probabilities(opened, name)
        pieces = token_pieces(opened.chat.piece, ids[span], mask[span], [], opened.beta, probabilities)
        view = View(f"rollout {name}", facts, pieces, row=heading if index == chosen[0] else "")
        if index == chosen[-1] and uid is None and (more := names[index + 1 :]):
            view.after = f"… {len(more)} more in this row: {', '.join(more[:8])}{' …' if len(more) > 8 else ''}"
        yield view
