"""Report a run: tables in the terminal, and one HTML page with the same tables and figures.

Input: a run folder, finished or not. Output: `report.html`, a single file without scripts or external resources. It is
no dataset: it has no identity and is written again each time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dasd_lite import console
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.data.files import disk_errors, write_atomic
from dasd_lite.data.records import OWN_TASK
from dasd_lite.data.run_folder import RunFolder, StageFolder
from dasd_lite.grading.statistics import compare_accuracies
from dasd_lite.grading.temperatures import TeacherAt, by_temperature
from dasd_lite.report import accuracy_tables, figures, results, tables
from dasd_lite.report.audit import Audit, read_audit
from dasd_lite.report.rollouts import DIFFERENCE_EDGES, PhaseRollouts, read_phase
from dasd_lite.report.tables import ReportTable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

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
    tables: list[ReportTable] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    wide: bool = False
    """Whether its figure is drawn larger than those of other parts."""


@dataclass(frozen=True)
class _Run:
    """Everything that was measured of a run."""

    folder: Path
    recipe: RecipeConfig
    stages: list[StageFolder]
    figures: list[results.StageResult]
    accuracies: list[results.ModelAccuracy]
    phases: list[PhaseRollouts]
    curves: list[results.Curve]
    audit: Audit | None
    teachers: list[TeacherAt]


def write_report(run: str | PathLike[str], out: str | PathLike[str] | None = None, *, quiet: bool = False) -> Path:
    """Report a run in the terminal and as an HTML page.

    Args:
        run: The run folder, the `out` of a recipe, or what `run_recipe` returned.
        out: Folder for report.html; `report` inside the run folder by default.
        quiet: Print nothing.

    Returns:
        The path of the page.

    Raises:
        DataError: The folder holds no run, or a file in it is damaged.
    """
    run_folder = RunFolder(Path(run))
    folder = run_folder.report if out is None else Path(out)
    measured = _measure(run_folder)
    parts = sections(measured)
    page = render(measured, parts)
    path = folder / "report.html"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, page)
    if not quiet:
        _print(measured, parts)
    return path


def _measure(run: RunFolder) -> _Run:
    recipe = results.read_recipe(run)
    stages = results.planned_stages(run, recipe)
    finished = [results.read_result(stage.path) for stage in stages if stage.is_finished]
    phases: list[PhaseRollouts] = []
    earlier: Path | None = None  # what the last phase without mixing kept: a mixed phase takes its questions from it
    for phase in recipe.phase:
        measured = read_phase(run, phase, earlier)
        phases += [measured] if measured else []
        earlier = run.stage(phase.name, "select") if phase.source not in ("mix", "replay") else earlier
    accuracies = [results.read_accuracy(own.folder) for own in finished if own.stage == "evaluate"]
    curves = [curve for stage in stages if stage.stage == "train" and (curve := results.read_curve(stage.path))]
    evaluations, kept = ([own.folder for own in finished if own.stage == stage] for stage in ("evaluate", "select"))
    audit = read_audit(evaluations, kept)
    sampled = [(phase, run.stage(phase.name, "select")) for phase in recipe.phase if phase.source == "sample"]
    teachers = by_temperature((phase.sample.temperature, select) for phase, select in sampled if select in kept)
    return _Run(run.path, recipe, stages, finished, accuracies, phases, curves, audit, teachers)


# --- sections ---------------------------------------------------------------------------------------


def sections(measured: _Run) -> list[Section]:
    """Put tables and figures in order, without the parts that have no table yet."""
    parts = [
        _accuracy(measured.accuracies, measured.audit),
        Section("Contamination", _some(accuracy_tables.contamination(measured.audit) if measured.audit else None)),
        Section("Teacher", _some(tables.teacher(measured.teachers))),
        _rollouts(measured.phases),
        _sentences(measured.phases),
        _selection(measured.phases),
        _mixed(measured.phases),
        _training(measured),
        Section("Time", _some(tables.times(measured.figures))),
    ]
    return [part for part in parts if part.tables]


def _some(*maybe: ReportTable | None) -> list[ReportTable]:
    return [table for table in maybe if table is not None]


def _accuracy(models: list[results.ModelAccuracy], audit: Audit | None) -> Section:
    part = Section("Accuracy", wide=True)
    if models:
        main = accuracy_tables.accuracy(models)
        main.notes += accuracy_tables.lowered(models) + ([accuracy_tables.contaminated(audit)] if audit else [])
        part.tables = [
            main,
            *_some(
                accuracy_tables.changes(models),
                accuracy_tables.undecided(models),
                accuracy_tables.several_answers(models),
                accuracy_tables.domains(models),
            ),
        ]
        caption = "Accuracy, with one standard error over questions to either side."
        if any(model.is_teacher for model in models):
            caption += " Dashed: the teacher."
        part.figures = [Figure(_accuracy_figure(models, task), caption) for task in accuracy_tables.tasks_of(models)]
    return part


def _accuracy_figure(models: list[results.ModelAccuracy], task: str) -> str:
    students = [model for model in models if task in model.tasks and not model.is_teacher]
    own = [model.tasks[task] for model in students]
    teacher = next((model.tasks[task].mean for model in models if task in model.tasks and model.is_teacher), None)
    names, means, errors = ([model.name for model in students], [o.mean for o in own], [o.standard_error for o in own])
    return figures.accuracy(task, names, means, errors, teacher)


def _rollouts(phases: list[PhaseRollouts]) -> Section:
    part = Section("Rollouts")
    if not phases:
        return part
    part.tables.append(tables.rollouts(phases))
    geometric = [(_label(phase), phase.geometric) for phase in phases if len(phase.geometric)]
    if geometric:
        caption = "Distribution of the answers by the geometric mean of the teacher's token probabilities."
        if any(phase.source == "mix" for phase in phases):
            caption += " Of a mixed-policy answer, only the teacher's tokens count."
        part.figures.append(Figure(figures.densities(geometric), caption))
    kept = [(phase.name, phase.tokens["kept"]) for phase in phases if len(phase.tokens.get("kept", []))]
    if kept:
        part.figures.append(Figure(figures.lengths(kept), "Distribution of the kept answers by length."))
    return part


def _label(phase: PhaseRollouts) -> str:
    return phase.name if phase.temperature is None else f"{phase.name}, T = {phase.temperature:g}"


def _sentences(phases: list[PhaseRollouts]) -> Section:
    part = Section("Sentences")
    scored = [phase for phase in phases if phase.candidates is not None]
    if scored:
        part.tables.append(tables.sentences(scored))
    for phase in scored:
        if phase.candidates is None or not phase.difference.any():
            continue
        kept = phase.kept.by_position if phase.kept is not None else None
        lines = "all candidates dashed" + (", kept answers solid" if kept is not None else "")
        part.figures += [
            Figure(
                figures.difference(phase.difference, DIFFERENCE_EDGES, phase.beta, phase.name),
                f"{phase.name}: sentences of all candidates by p of the teacher − p of the student.",
            ),
            Figure(
                figures.plane(phase.plane, phase.beta, phase.name),
                f"{phase.name}: the same sentences by both probabilities; stronger color means more, on a log scale.",
            ),
            Figure(
                figures.positions(phase.candidates.by_position, kept, phase.name),
                f"{phase.name}: shares of the classes by position of the sentence, {lines}.",
            ),
        ]
    return part


def _selection(phases: list[PhaseRollouts]) -> Section:
    part = Section("Selection")
    selected = [phase for phase in phases if phase.reasons is not None]
    if selected:
        part.tables += [tables.reasons(selected), *_some(tables.choices(selected))]
    for phase in selected:
        part.tables += tables.preference(phase)
    return part


def _mixed(phases: list[PhaseRollouts]) -> Section:
    part = Section("Mixed policy", _some(tables.mixed(phases)))
    for phase in phases:
        own = phase.mixed
        if own is not None and (known := np.isfinite(own.lengths)).any():
            svg = figures.cut_off(own.lengths[known], own.cut[known], phase.name)
            caption = f"{phase.name}: share of the student's answers that were cut off, with one standard error."
            part.figures.append(Figure(svg, caption))
    return part


def _training(measured: _Run) -> Section:
    part = Section("Training")
    part.tables = _some(tables.packing(measured.figures), tables.training(measured.figures, measured.curves))
    if measured.curves:
        loss = [(curve.phase, curve.steps, curve.loss) for curve in measured.curves]
        rate = [(curve.phase, curve.steps, curve.learning_rate) for curve in measured.curves]
        part.figures = [
            Figure(figures.training(loss, "loss", "loss per target token"), "Training loss of each optimizer step."),
            Figure(figures.training(rate, "rate", "learning rate"), "Learning rate of each optimizer step."),
        ]
    return part


# --- the page ---------------------------------------------------------------------------------------


def render(measured: _Run, parts: list[Section]) -> str:
    """Render the page; text from data is escaped, and the figures are our own."""
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
        packages=results.packages(measured.figures),
        fingerprints=tables.fingerprints(measured.figures),
    )


def _headline(measured: _Run) -> list[tuple[str, str, str]]:
    """Return the few numbers that readers look for first: number, unit, meaning."""
    cards = [card for task in accuracy_tables.tasks_of(measured.accuracies) for card in _accuracy_cards(measured, task)]
    kept = sum(phase.reasons[""] for phase in measured.phases if phase.reasons is not None)
    if kept:
        cards.append((f"{kept:,}", "", f"rollouts kept of {sum(phase.rollouts for phase in measured.phases):,}"))
    if measured.curves:
        steps, num = sum(curve.num_steps for curve in measured.curves), len(measured.curves)
        cards.append((f"{steps:,}", "", f"optimizer steps in {num} phase{'s' if num > 1 else ''}"))
    return cards


def _accuracy_cards(measured: _Run, task: str) -> list[tuple[str, str, str]]:
    on = "" if task == OWN_TASK else f" on {task}"
    models = [model for model in measured.accuracies if task in model.tasks and not model.is_teacher]
    cards: list[tuple[str, str, str]] = []
    if models:
        name = models[0].name
        when = "before training" if name == "before" else f"after {name}"
        cards.append((f"{100 * models[0].tasks[task].mean:.1f}", "%", f"accuracy{on} {when}"))
    if len(models) > 1:
        last = models[-1]
        size = compare_accuracies(models[0].tasks[task], last.tasks[task]).in_errors
        change = "" if size is None else f", {size:+.1f} standard errors over questions".replace("-", "−")
        cards.append((f"{100 * last.tasks[task].mean:.1f}", "%", f"accuracy{on} after {last.name}{change}"))
    cards += [
        (f"{100 * model.tasks[task].mean:.1f}", "%", f"accuracy{on} of the teacher")
        for model in measured.accuracies
        if task in model.tasks and model.is_teacher
    ]
    return cards


def _facts(recipe: RecipeConfig) -> list[tuple[str, str]]:
    return [
        ("teacher", recipe.teacher.model if recipe.teacher else "none: existing answers were used"),
        ("student", recipe.student.model),
        ("phases", " → ".join(phase.name for phase in recipe.phase)),
        ("seed", str(recipe.seed)),
    ]


# --- the terminal -----------------------------------------------------------------------------------


def _print(measured: _Run, parts: list[Section]) -> None:
    from rich.text import Text

    terminal = console.out()
    # Along the chain, but accuracy last: that is what the eye meets when a run is over. A note there counts the texts
    # of Contamination, which are for the page.
    printed = [table for part in parts if part.title not in ("Accuracy", "Contamination") for table in part.tables]
    printed += [table for part in parts if part.title == "Accuracy" for table in reversed(part.tables)]
    for table in printed:
        print_table(terminal, table)
    if (missing := tables.missing(measured.stages)) is not None:
        states = ", ".join(f"{row[0].text}/{row[1].text} ({row[2].text})" for row in missing.rows)
        terminal.print(Text.assemble("\n", ("Not finished:", "yellow"), f" {states}"))


def print_table(terminal: Console, table: ReportTable) -> None:
    """Print a table with its title and its notes."""
    from rich.text import Text

    terminal.print()
    terminal.print(Text(table.title, style="bold"))
    terminal.print(to_rich(table))
    for note in table.notes:
        terminal.print(Text(note, style="dim"))


def to_rich(table: ReportTable) -> RichTable:
    """Lay a table out for the terminal."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    laid_out = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for i, column in enumerate(table.columns):
        texts = [column, *(row[i].text for row in table.rows)]
        longest = max((len(word) for text in texts for word in text.split()), default=0)
        laid_out.add_column(
            Text(column),
            justify="left" if i < table.left else "right",
            overflow="fold",
            min_width=min(longest, 24),  # a narrow terminal breaks lines between words
            no_wrap=max(map(len, texts)) <= min(longest, 24),  # or rich makes it narrower, and cuts the last column
        )
    for row in table.rows:
        laid_out.add_row(*(Text(cell.text, style=_TONES.get(cell.tone, "")) for cell in row))
    return laid_out
