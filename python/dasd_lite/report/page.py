"""Report a run: tables in the terminal, and one HTML page with the same tables and figures.

Reads whatever a run folder holds, finished or not; writes `report.html`, which needs nothing else: no
script, no file beside it, no network. It is no dataset and is made anew each time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from dasd_lite import console
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.data.files import disk_errors, write_atomic
from dasd_lite.report import figures as plots
from dasd_lite.report import results as data
from dasd_lite.report import tables
from dasd_lite.report.rollouts import DIFFERENCE_EDGES, PhaseRollouts, read_phase
from dasd_lite.report.tables import Cell, TableModel

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text

_TONES = {"good": "green", "bad": "red", "dim": "dim", "strong": "bold", "teacher": "yellow", "student": "cyan"}


@dataclass
class Figure:
    """A drawing and what it shows."""

    svg: str
    caption: str


@dataclass
class Section:
    """A part of the page."""

    title: str
    tables: list[TableModel] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    wide: bool = False  # one figure that deserves the room


@dataclass(frozen=True)
class _Run:
    """All that was measured of a run."""

    folder: Path
    recipe: RecipeConfig
    stages: list[data.Stage]
    evaluations: list[data.Evaluation]
    phases: list[PhaseRollouts]
    curves: list[data.Curve]


def run(run_folder: Path, out: Path, *, quiet: bool = False) -> Path:
    """Report a run into `out`/report.html, whose path is returned, and unless `quiet` in the terminal too."""
    measured = _measure(run_folder)
    parts = sections(measured)
    page = render(measured, parts)
    path = out / "report.html"
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, page)
    if not quiet:
        _print(measured, parts)
    return path


def _measure(run_folder: Path) -> _Run:
    recipe = data.read_recipe(run_folder)
    stages = data.all_stages(run_folder, recipe)
    phases: list[PhaseRollouts] = []
    earlier: Path | None = None  # what the last phase with answers of the teacher kept: a mixed one begins with it
    for phase in recipe.phase:
        found = read_phase(run_folder, phase, earlier)
        phases += [found] if found else []
        earlier = run_folder / phase.name / "select" if phase.source != "mix" else earlier
    curves = [curve for stage in stages if stage.name == "train" and (curve := data.curve(stage))]
    return _Run(run_folder, recipe, stages, data.evaluations(stages), phases, curves)


# --- what the page says -----------------------------------------------------------------------------


def sections(measured: _Run) -> list[Section]:
    """Put tables and figures in order; a part of which nothing is there yet is left out."""
    parts = [
        _accuracy(measured),
        _responses(measured),
        _sentences(measured),
        _selection(measured),
        _mixed(measured),
        _training(measured),
        Section("Time", _some(tables.times(measured.stages))),
    ]
    return [part for part in parts if part.tables]


def _some(*maybe: TableModel | None) -> list[TableModel]:
    return [table for table in maybe if table is not None]


def _accuracy(measured: _Run) -> Section:
    found = measured.evaluations
    part = Section("Accuracy", wide=True)
    if found:
        part.tables = _some(tables.accuracy(found), tables.domains(found))
        own = [evaluation.overall for evaluation in found]
        svg = plots.accuracy([e.name for e in found], [o.mean for o in own], [o.error for o in own])
        part.figures = [Figure(svg, "Accuracy, and one standard error to either side.")]
    return part


def _selection(measured: _Run) -> Section:
    part = Section("Selection")
    selected = [found for found in measured.phases if found.reasons is not None]
    if selected:
        part.tables.append(tables.reasons(selected))
        for found in selected:
            part.tables += tables.preference(found)
    return part


def _sentences(measured: _Run) -> Section:
    part = Section("Sentences")
    scored = [found for found in measured.phases if found.candidates is not None]
    if scored:
        part.tables.append(tables.sentences(scored))
    for found in scored:
        if found.candidates is None or not found.difference.any():
            continue
        kept = found.kept.by_position if found.kept is not None else None
        lines = "all candidates dashed" + (", kept solid" if kept is not None else "")
        part.figures += [
            Figure(
                plots.difference(found.difference, DIFFERENCE_EDGES, found.beta, found.name),
                f"{found.name}: sentences of all candidates by p of the teacher − p of the student.",
            ),
            Figure(
                plots.plane(found.plane, found.beta, found.name),
                f"{found.name}: the same sentences by both probabilities; darker is more, on a log scale.",
            ),
            Figure(
                plots.positions(found.candidates.by_position, kept, found.name),
                f"{found.name}: classes by sentence position, {lines}.",
            ),
        ]
    return part


def _responses(measured: _Run) -> Section:
    part = Section("Rollouts")
    if not measured.phases:
        return part
    part.tables.append(tables.responses(measured.phases))
    geometric = [(_label(found), found.geometric) for found in measured.phases if len(found.geometric)]
    if geometric:
        caption = "Answers by the geometric mean of the teacher's token probabilities."
        if any(found.source == "mix" for found in measured.phases):
            caption += " Of a mixed answer only the teacher's part is counted."
        part.figures.append(Figure(plots.densities(geometric), caption))
    kept = [(found.name, found.tokens["kept"]) for found in measured.phases if len(found.tokens.get("kept", []))]
    if kept:
        part.figures.append(Figure(plots.lengths(kept), "Lengths of the kept answers."))
    return part


def _label(found: PhaseRollouts) -> str:
    return found.name if found.temperature is None else f"{found.name}, T = {found.temperature:g}"


def _mixed(measured: _Run) -> Section:
    part = Section("Mixed policy", _some(tables.mixed(measured.phases)))
    for found in measured.phases:
        if (own := found.mixed) is None:
            continue
        known = own.lengths == own.lengths
        if known.any():
            caption = (
                f"{found.name}: answers of the student that the cap cut off, and one standard error to either side."
            )
            part.figures.append(Figure(plots.cut_off(own.lengths[known], own.cut[known], found.name), caption))
    return part


def _training(measured: _Run) -> Section:
    part = Section("Training")
    part.tables = _some(tables.packing(measured.stages), tables.training(measured.stages, measured.curves))
    if measured.curves:
        loss = [(found.phase, found.steps, found.loss) for found in measured.curves]
        rate = [(found.phase, found.steps, found.learning_rate) for found in measured.curves]
        part.figures = [
            Figure(plots.training(loss, "loss", "loss per target token"), "Training loss of each optimiser step."),
            Figure(plots.training(rate, "rate", "learning rate"), "Learning rate."),
        ]
    return part


# --- the page ---------------------------------------------------------------------------------------


def render(measured: _Run, parts: list[Section]) -> str:
    """Write the page; everything that comes from data is escaped, the figures are ours."""
    from jinja2 import Environment, StrictUndefined

    template = resources.files("dasd_lite").joinpath("report", "page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    recipe = measured.recipe
    return environment.from_string(template).render(
        name=measured.folder.resolve().name,
        headline=_headline(measured),
        facts=_facts(recipe),
        missing=tables.missing(measured.stages),
        sections=parts,
        recipe=json.dumps(recipe.model_dump(mode="json"), indent=2, ensure_ascii=False),
        packages=data.packages(measured.stages),
        fingerprints=tables.fingerprints(measured.stages),
    )


def _headline(measured: _Run) -> list[tuple[str, str, str]]:
    """Return the few numbers that one looks for first: number, unit, what it is."""
    found = measured.evaluations
    cards: list[tuple[str, str, str]] = []
    if found:
        own = found[0].overall
        cards.append((f"{100 * own.mean:.1f}", "%", "right before" if found[0].name == "before" else found[0].name))
    if len(found) > 1:
        last = found[-1]
        change = data.change(found[0].overall, last.overall)
        size = "" if change.in_errors is None else f", {change.in_errors:+.1f} standard errors".replace("-", "−")
        cards.append((f"{100 * last.overall.mean:.1f}", "%", f"right after {last.name}{size}"))
    kept = sum(phase.reasons[""] for phase in measured.phases if phase.reasons is not None)
    if kept:
        cards.append((f"{kept:,}", "", f"rollouts kept of {sum(phase.rollouts for phase in measured.phases):,}"))
    steps = sum(curve.num_steps for curve in measured.curves)
    if steps:
        cards.append(
            (f"{steps:,}", "", f"optimiser steps in {len(measured.curves)} phase{'s'[: len(measured.curves) > 1]}")
        )
    return cards


def _facts(recipe: RecipeConfig) -> list[tuple[str, str]]:
    return [
        ("teacher", recipe.teacher.model if recipe.teacher else "none: the answers existed already"),
        ("student", recipe.student.model),
        ("phases", " → ".join(phase.name for phase in recipe.phase)),
        ("seed", str(recipe.seed)),
    ]


# --- the terminal -----------------------------------------------------------------------------------


def _print(measured: _Run, parts: list[Section]) -> None:
    terminal = console.out()
    missing = tables.missing(measured.stages)
    # Down the chain, and what one looks for first at the end, where the eye is when a run is over.
    shown = [table for part in parts if part.title != "Accuracy" for table in part.tables]
    shown += [table for part in parts if part.title == "Accuracy" for table in reversed(part.tables)]
    for table in shown:
        terminal.print()
        terminal.print(f"[bold]{_escape(table.title)}[/]")
        terminal.print(to_rich(table))
        for note in table.notes:
            terminal.print(f"[dim]{_escape(note)}[/]")
    if missing is not None:
        states = ", ".join(f"{row[0].text}/{row[1].text} ({row[2].text})" for row in missing.rows)
        terminal.print(f"\n[yellow]Not finished:[/] {_escape(states)}")


def to_rich(table: TableModel) -> RichTable:
    """Lay a table out for the terminal."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for i, column in enumerate(table.columns):
        words = [word for text in (column, *(row[i].text for row in table.rows)) for word in text.split()]
        shown.add_column(
            Text(column),
            justify="left" if i < table.left else "right",
            overflow="fold",
            min_width=min(max(map(len, words), default=0), 24),  # a narrow terminal breaks lines between words
        )
    for row in table.rows:
        shown.add_row(*(_text(cell) for cell in row))
    return shown


def _text(cell: Cell) -> Text:
    from rich.text import Text

    return Text(cell.text, style=_TONES.get(cell.tone, ""))


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
