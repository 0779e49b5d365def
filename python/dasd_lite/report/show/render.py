"""Print pieces, rows, and metrics for the show command.

Input: pieces with what is known about them. Invariant: letters and marks in the margin say everything that colors say,
and text from a model cannot control the terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dasd_lite.method.divergence import SentenceClass
from dasd_lite.report.show.pieces import Piece

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_MARGIN = {  # letter, style, meaning
    SentenceClass.SHARED: ("=", "", "shared"),
    SentenceClass.TEACHER: ("T", "yellow", "teacher: p_T − p_S > β"),
    SentenceClass.STUDENT: ("S", "cyan", "student: p_S − p_T > β"),
    SentenceClass.NONE: ("·", "dim", "no token"),
}
_TRAINED, _MASKED = ("█", "green"), ("░", "bright_black")
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_WIDTHS = {"mask": 1, "class": 1, "p_T": 4, "p_S": 4, "author": 7}
_NUM_STEPS = 8  # printed of a training run, from the first to the last


@dataclass
class View:
    """One rollout or document, ready to print."""

    title: str
    facts: list[str]
    pieces: list[Piece]
    question: str = ""
    warning: str = ""
    row: str = ""
    """Heading of the row that begins with this document."""
    after: str = ""
    """Printed below it: what is left out."""


def print_view(terminal: Console, view: View) -> None:
    """Print one rollout or document, below the heading of the row that it begins."""
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    terminal.print()
    if view.row:
        terminal.print(Rule(Text(safe(view.row), style="bold"), align="left", style="bold", characters="━"))
    heading = Text(safe(view.title), style="bold")
    if view.warning:
        heading.append(f"  {safe(view.warning)}", style="bold red")
    heading.append("  " + " · ".join(map(safe, view.facts)), style="not bold dim")
    terminal.print(heading)
    if view.question:
        terminal.print(Text(safe(view.question), style="italic"))
    grid = Table.grid(padding=(0, 1, 0, 0))
    columns = _columns(view)
    for name in columns:
        grid.add_column(justify="right" if name in ("p_T", "p_S") else "left", overflow="fold")
    if "p_T" in columns:
        grid.add_row(*(Text(name if name in ("p_T", "p_S") else "", style="dim") for name in columns))
    room = max(terminal.width - sum(_WIDTHS[name] + 1 for name in columns[:-1]), 1)
    for piece in view.pieces:
        # Wrapped here and not by rich, so that each line has its mark of trained or masked.
        _add(grid, piece, columns, lambda text: Text("\n").join(text.wrap(terminal, room, overflow="fold")))
    terminal.print(grid)
    if view.after:
        terminal.print(Text(safe(view.after), style="dim"))


def _columns(view: View) -> list[str]:
    """Return the columns that this rollout has values for."""
    columns = ["mask"] if any(piece.trained is not None for piece in view.pieces) else []
    columns += ["class", "p_T", "p_S"] if any(piece.kind is not None for piece in view.pieces) else []
    columns += ["author"] if any(piece.author for piece in view.pieces) else []
    return [*columns, "text"]


def _add(grid: Table, piece: Piece, columns: list[str], wrap: Callable[[Text], Text]) -> None:
    from rich.text import Text

    letter, style, _ = _MARGIN[piece.kind] if piece.kind is not None else ("", "", "")
    if piece.author:
        style = "cyan" if piece.author == "student" else "yellow"
    mark, color = _TRAINED if piece.trained else _MASKED
    if piece.trained is False:
        style = "dim"
    elif piece.trained and not style and piece.kind is None:
        style = "green"
    text = wrap(_body(piece, style))
    lines = 0 if piece.trained is None else text.plain.count("\n") + 1
    cells = {
        "mask": Text("\n".join([mark] * lines), style=color),
        "class": Text(letter, style=style),
        "p_T": Text(_probability(piece, piece.p_teacher), style="dim"),
        "p_S": Text(_probability(piece, piece.p_student), style="dim"),
        "author": Text(piece.author, style=style),
        "text": text,
    }
    grid.add_row(*(cells[name] for name in columns))


def _body(piece: Piece, style: str) -> Text:
    """Return the text of a piece with trailing line ends as ↵, and its note."""
    from rich.text import Text

    body = piece.text.rstrip("\n")
    text = Text(safe(body), style=style)
    text.append("↵" * min(len(piece.text) - len(body), 2), style="dim")
    if piece.note:
        text.append(("  " if text else "") + safe(piece.note), style="not bold dim italic")
    return text


def _probability(piece: Piece, value: float) -> str:
    if piece.kind is None:
        return ""
    return "–" if math.isnan(value) else f"{value:.2f}"


def print_legend(terminal: Console, views: list[View], beta: float) -> None:
    """Explain the marks that the views use."""
    from rich.text import Text

    pieces = [piece for view in views for piece in view.pieces]
    lines: list[list[tuple[str, str, str]]] = []
    if any(piece.trained is not None for piece in pieces):
        lines.append([(*_TRAINED, "trained: in the loss"), (*_MASKED, "masked: read, not in the loss")])
    if any(piece.kind is not None for piece in pieces):
        lines.append(list(_MARGIN.values()))
    if any(piece.author for piece in pieces):
        lines.append([("student", "cyan", "wrote the beginning"), ("teacher", "yellow", "wrote the rest")])
    for i, entries in enumerate(lines):
        legend = Text("" if i else "\n")
        for mark, style, meaning in entries:
            legend.append(mark, style=style or "bold")
            legend.append(f" {meaning}   ".replace("β", f"{beta:g}"), style="dim")
        terminal.print(legend)


def print_metrics(terminal: Console, metrics: Sequence[dict[str, Any]]) -> None:
    """Print a few evenly spaced steps of a training run, including the first and the last."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "loss", "learning rate", "gradient", "trained tokens", "tokens/s"):
        table.add_column(name, justify="right")
    num = min(_NUM_STEPS, len(metrics))
    for i in range(num):
        line = metrics[round(i * (len(metrics) - 1) / max(num - 1, 1))]
        formats = {"step": ",", "loss": ".4f", "learning_rate": ".2e", "grad_norm": ".3g", "target_tokens": ","}
        cells = [format(line[name], spec) if line.get(name) is not None else "–" for name, spec in formats.items()]
        table.add_row(*cells, f"{line['tokens'] / line['seconds']:,.0f}" if line.get("seconds") else "–")
    terminal.print(table)


def safe(text: str) -> str:
    """Replace control characters, which could move the cursor or worse, with visible symbols."""
    return text.translate(_CONTROL)
