"""Print rollouts of a folder: sentences coloured by class, trained and masked tokens, reasons.

Input: a finished folder of any stage, and a uid or none. Output: text on the terminal. Invariant: what
colours say is said without them as well, by letters and marks in the margin; and text from a model cannot
control the terminal.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import ValidationError

from dasd_lite import console
from dasd_lite.config import RecipeConfig, SelectConfig
from dasd_lite.dataset import batches, read_manifest, shards
from dasd_lite.divergence import SentenceClass
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.show_pieces import Piece, sentence_pieces, token_pieces
from dasd_lite.text import sentence_ends

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dasd_lite.chat import Chat

_MARGIN = {  # letter, style, meaning
    SentenceClass.SHARED: ("=", "", "shared"),
    SentenceClass.TEACHER: ("T", "yellow", "teacher: p_T − p_S > β"),
    SentenceClass.STUDENT: ("S", "cyan", "student: p_S − p_T > β"),
    SentenceClass.NONE: ("·", "dim", "no token begins"),
}
_TRAINED, _MASKED = ("█", "green"), ("░", "bright_black")
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


@dataclass
class _Shown:
    """One rollout, ready to print."""

    title: str
    facts: list[str]
    pieces: list[Piece]
    question: str = ""
    warning: str = ""


@dataclass
class _Place:
    """A folder and what stands around it: scores, recipe, tokenizer."""

    folder: Path
    tables: list[str]
    beta: float = SelectConfig().beta
    chat: Chat | None = None
    notes: list[str] = field(default_factory=list)

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
    for note in place.notes:
        terminal.print(f"[dim]{_escape(note)}[/]")
    found = _find(place, uid, limit, rejected=rejected)
    if not found:
        terminal.print("No rollout was rejected." if rejected else "There is no rollout in it.")
        return
    shown = [view for table, position in found for view in _views(place, table, position, uid)]
    for view in shown:
        _print(terminal, view)
    _legend(terminal, shown, place.beta)


# --- finding ----------------------------------------------------------------------------------------


def _open(folder: Path, *, rejected: bool) -> _Place:
    """Find the tables to show, and what stands around the folder."""
    notes: list[str] = []
    if folder.name == "train" and (folder.parent / "pack" / "manifest.json").exists():
        folder = folder.parent / "pack"
        notes.append(f"What train reads: {folder}")
    if not (folder / "manifest.json").exists() and not (folder / "unfinished.json").exists():
        raise DataError(f"{folder}: {_what_can_be_shown(folder)}")
    tables = list(read_manifest(folder)["tables"])
    if tables == ["scores"]:
        source = _source(folder.parent)
        notes.append(f"The scores of {source}")
        folder, tables = source, ["rollouts"]
    known = [name for name in ("rollouts", "kept", "rejected", "rows", "graded") if name in tables]
    if not known:
        raise DataError(f"{folder}: {_what_can_be_shown(folder.parent)}")
    if rejected and "rejected" not in known:
        raise DataError(f"{folder}: only a select folder knows what was rejected; this one holds {', '.join(known)}")
    place = _Place(folder, known, notes=notes)
    _surroundings(place)
    return place


def _what_can_be_shown(folder: Path) -> str:
    found = sorted(path.parent for path in folder.glob("**/manifest.json") if path.parent != folder)
    names = [str(path) for path in found if json.loads((path / "manifest.json").read_text(encoding="utf-8"))["tables"]]
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
        from dasd_lite.chat import Chat, model_folder

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


def _views(place: _Place, table: str, position: int, uid: str | None) -> Iterator[_Shown]:
    row = _row(place.folder, table, position)
    if table == "rows":
        yield from _documents(place, row, position, uid)
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
        yield _Shown(title, facts, pieces, warning=warning)
    else:
        pieces = sentence_pieces(row["completion"], row["prefix_bytes"], place.beta, score)
        yield _Shown(title, facts, pieces, row["messages"][-1]["content"], warning)


def _documents(place: _Place, row: dict[str, Any], position: int, uid: str | None) -> Iterator[_Shown]:
    """Cut a row for training into its documents."""
    if place.chat is None:
        yield _Shown(f"row {position}", [f"{len(row['ids']):,} tokens", *row["uids"]], [])
        return
    ids, mask = np.array(row["ids"]), np.array(row["loss_mask"])
    first = 0
    for number, (length, name) in enumerate(zip(row["doc_lengths"], row["uids"], strict=True), start=1):
        span = slice(first, first + length)
        first += length
        if uid is None or uid == name:
            score = _score(place, name)
            facts = [f"document {number} of {len(row['uids'])}", f"{length:,} tokens, {mask[span].sum():,} trained"]
            pieces = token_pieces(place.chat.piece, ids[span], mask[span], [], place.beta, score)
            yield _Shown(f"row {position}, rollout {name}", facts, pieces)


# --- printing ---------------------------------------------------------------------------------------


def _print(terminal: Console, view: _Shown) -> None:
    from rich.table import Table
    from rich.text import Text

    heading = Text(_safe(view.title), style="bold")
    if view.warning:
        heading.append(f"  {_safe(view.warning)}", style="bold red")
    heading.append("  " + " · ".join(map(_safe, view.facts)), style="not bold dim")
    terminal.print()
    terminal.print(heading)
    if view.question:
        terminal.print(Text(_safe(view.question), style="italic"))
    grid = Table.grid(padding=(0, 1, 0, 0))
    columns = _columns(view)
    for name in columns:
        grid.add_column(justify="right" if name in ("p_T", "p_S") else "left", overflow="fold")
    if "p_T" in columns:
        grid.add_row(*(Text(name if name in ("p_T", "p_S") else "", style="dim") for name in columns))
    for piece in view.pieces:
        _add(grid, piece, columns)
    terminal.print(grid)


def _columns(view: _Shown) -> list[str]:
    """Name the columns that this rollout has something for."""
    columns = ["mask"] if any(piece.trained is not None for piece in view.pieces) else []
    columns += ["class", "p_T", "p_S"] if any(piece.kind is not None for piece in view.pieces) else []
    columns += ["author"] if any(piece.author for piece in view.pieces) else []
    return [*columns, "text"]


def _add(grid: Table, piece: Piece, columns: list[str]) -> None:
    from rich.text import Text

    letter, style, _ = _MARGIN[piece.kind] if piece.kind is not None else ("", "", "")
    if piece.author:
        style = "cyan" if piece.author == "student" else "yellow"
    mark, colour = _TRAINED if piece.trained else _MASKED
    if piece.trained is False:
        style = "dim"
    elif piece.trained and not style and piece.kind is None:
        style = "green"
    body = piece.text.rstrip("\n")
    text = Text(_safe(body), style=style)
    text.append("↵" * min(len(piece.text) - len(body), 2), style="dim")
    lines = max(piece.text.rstrip("\n").count("\n") + 1, 1)
    cells = {
        "mask": Text("\n".join([mark] * lines), style=colour),
        "class": Text(letter, style=style),
        "p_T": Text(_probability(piece, piece.p_teacher), style="dim"),
        "p_S": Text(_probability(piece, piece.p_student), style="dim"),
        "author": Text(piece.author, style=style),
        "text": text,
    }
    grid.add_row(*(cells[name] for name in columns))


def _probability(piece: Piece, value: float) -> str:
    if piece.kind is None:
        return ""
    return "–" if math.isnan(value) else f"{value:.2f}"


def _legend(terminal: Console, shown: list[_Shown], beta: float) -> None:
    """Explain the marks that were used."""
    from rich.text import Text

    pieces = [piece for view in shown for piece in view.pieces]
    lines: list[list[tuple[str, str, str]]] = []
    if any(piece.trained is not None for piece in pieces):
        lines.append([(*_TRAINED, "trained"), (*_MASKED, "masked")])
    if any(piece.kind is not None for piece in pieces):
        lines.append(list(_MARGIN.values()))
    if any(piece.author for piece in pieces):
        lines.append([("student", "cyan", "began"), ("teacher", "yellow", "went on")])
    for i, entries in enumerate(lines):
        legend = Text("" if i else "\n")
        for mark, style, meaning in entries:
            legend.append(mark, style=style or "bold")
            legend.append(f" {meaning}   ".replace("β", f"{beta:g}"), style="dim")
        terminal.print(legend)


def _safe(text: str) -> str:
    """Replace control characters, which could move the cursor or worse, by pictures of them."""
    return text.translate(_CONTROL)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(_safe(text))
