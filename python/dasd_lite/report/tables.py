"""Turn what was measured into tables, each made once and shown twice: in the terminal and in the page.

Input: the numbers of report_data and report_rollouts. Output: `Table`s of plain text. Invariant: a number
that is not known is a dash, and what a column means stands in a note under its table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dasd_lite.report.results import Accuracy, Curve, Evaluation, Stage, change
from dasd_lite.report.rollouts import CLASSES, Answers, Opening, PhaseRollouts, SentenceTally
from dasd_lite.report.summary import watched

DASH = "–"
_CHAIN = ("sample", "ingest", "mix", "score", "select", "pack", "train", "evaluate")


@dataclass(frozen=True)
class Cell:
    """Text with a tone: "good", "bad", "dim", "strong" or a sentence class."""

    text: str
    tone: str = ""


@dataclass
class TableModel:
    """A table; its first columns are text and flush left, the rest numbers and flush right."""

    title: str
    columns: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: int = 1

    def add(self, *cells: Cell | str) -> None:
        """Append a row."""
        self.rows.append([cell if isinstance(cell, Cell) else Cell(cell) for cell in cells])


def percent(share: float, digits: int = 1) -> str:
    """Write a share in per cent."""
    return DASH if math.isnan(share) else f"{100 * share:.{digits}f} %"


def number(value: float | None, digits: int = 0) -> str:
    """Write a number with its thousands apart."""
    return DASH if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


# --- accuracy ---------------------------------------------------------------------------------------


def accuracy(evaluations: Sequence[Evaluation]) -> TableModel:
    """Tabulate accuracy before and after each phase."""
    first = evaluations[0]
    columns = ("after", "accuracy, %", f"since {first.name}", "since last", "truncated", "unparseable", "tokens")
    table = TableModel("Accuracy", columns)
    for i, found in enumerate(evaluations):
        own = found.overall
        table.add(
            Cell(_after(found), "strong"),
            Cell(_with_error(own.mean, own.error), "strong"),
            _change(first.overall, own) if i else DASH,
            _change(evaluations[i - 1].overall, own) if i > 1 else DASH,
            percent(own.truncated),
            percent(own.unparseable),
            number(own.tokens, 1),
        )
    own = first.overall
    samples = f"{own.samples / own.questions:g} answers each" if own.samples > own.questions else "one answer each"
    table.notes.append(
        f"{own.questions:,} questions, {samples}. ± is the standard error over questions; changes are in points and,"
        " in brackets, in their own standard errors, which are taken question by question."
        " Truncated and unparseable answers are not right; they are columns of their own."
    )
    table.notes += lowered(evaluations)
    return table


def _after(found: Evaluation) -> str:
    return "(before)" if found.name == "before" else found.name


def _with_error(mean: float, error: float) -> str:
    return f"{100 * mean:.1f} ± {DASH if math.isnan(error) else f'{100 * error:.1f}'}"


def _change(before: Accuracy, after: Accuracy) -> Cell:
    found = change(before, after)
    size = found.in_errors
    tone = "" if size is None or abs(size) < 2 else ("good" if size > 0 else "bad")
    return Cell(f"{_signed(found.difference)} ({DASH if size is None else f'{abs(size):.1f}'})", tone)


def _signed(difference: float) -> str:
    return f"{'−' if difference < 0 else '+'}{abs(100 * difference):.1f}"


def lowered(evaluations: Sequence[Evaluation]) -> list[str]:
    """Say of each phase that lowered accuracy what is known about it."""
    fallen = []
    for before, after in pairwise(evaluations):
        found = change(before.overall, after.overall)
        if found.difference < 0:
            size = "" if found.in_errors is None else f", {-found.in_errors:.1f} standard errors"
            fallen.append(f"{after.name} ({_signed(found.difference)}{size})")
    if not fallen:
        return []
    return [
        f"Lower than the phase before: {', '.join(fallen)}. What is known: a small student ends with the sharpness of"
        " the data that it saw last (measured in docs/evidence.md). One run is no evidence for or against a phase or a"
        " rule."
    ]


def domains(evaluations: Sequence[Evaluation]) -> TableModel | None:
    """Tabulate accuracy per domain; None when there is only one."""
    names = list(dict.fromkeys(name for found in evaluations for name in found.domains))
    if len(names) < 2:
        return None
    since = f"since {evaluations[0].name}"
    columns = ("domain", "after", "questions", "accuracy, %", since, "truncated", "unparseable")
    table = TableModel("Accuracy by domain", columns, left=2)
    for name in names:
        first = evaluations[0].domains.get(name)
        for i, found in enumerate(evaluations):
            if (own := found.domains.get(name)) is None:
                continue
            table.add(
                Cell(name if not i else "", "strong"),
                _after(found),
                number(own.questions),
                _with_error(own.mean, own.error),
                _change(first, own) if i and first else DASH,
                percent(own.truncated),
                percent(own.unparseable),
            )
    return table


# --- rollouts and selection -------------------------------------------------------------------------


def responses(phases: Sequence[PhaseRollouts]) -> TableModel:
    """Tabulate what was sampled: how much, how varied, how probable, how long."""
    columns = ("phase", "source", "T", "prompts", "rollouts", "varied", "p", "tokens", "kept")
    table = TableModel("Rollouts", columns, left=2)
    for found in phases:
        everything = [values for values in found.tokens.values() if len(values)]
        mean = sum(v.sum() for v in everything) / sum(map(len, everything)) if everything else math.nan
        kept = found.tokens.get("kept")
        table.add(
            found.name,
            found.source,
            DASH if found.temperature is None else f"{found.temperature:g}",
            number(found.prompts),
            number(found.rollouts),
            f"{found.varied:.2f}",
            f"{found.geometric.mean():.3f}" if len(found.geometric) else DASH,
            number(mean, 1),
            number(float(kept.mean()), 1) if kept is not None and len(kept) else DASH,
        )
    table.notes.append(
        "T: sampling temperature. varied: distinct ÷ all sentences of a prompt's answers. p: mean over answers of the"
        " geometric mean of the teacher's token probabilities (at temperature 1). tokens, kept: mean length of all and"
        " of the kept answers, in the student's tokens."
    )
    return table


def sentences(phases: Sequence[PhaseRollouts]) -> TableModel:
    """Tabulate sentence classes before selection and among the kept."""
    columns = ("phase", "answers", "number", "sentences", *CLASSES)
    table = TableModel("Sentence classes", columns, left=2)
    for found in phases:
        for name, tally in (("candidates", found.candidates), ("kept", found.kept)):
            if tally is not None:
                table.add(found.name if name == "candidates" else "", name, *_classes(tally))
    betas = sorted({found.beta for found in phases})
    table.notes.append(
        f"teacher: p_T − p_S over β = {', '.join(f'{beta:g}' for beta in betas)}; student: p_S − p_T over β;"
        " shared: neither; none: no token begins in the sentence. sentences: mean per answer; so is the first number"
        " under teacher, the others are shares."
    )
    return table


def _classes(tally: SentenceTally) -> list[Cell | str]:
    total = int(tally.totals.sum())
    texts = [percent(_ratio(int(count), total)) for count in tally.totals]
    texts[1] = f"{number(_ratio(int(tally.totals[1]), tally.answers), 2)} ({texts[1]})"
    shares = [Cell(text, kind) for text, kind in zip(texts, CLASSES, strict=True)]
    return [number(tally.answers), number(_ratio(total, tally.answers), 1), *shares]


def reasons(phases: Sequence[PhaseRollouts]) -> TableModel:
    """Tabulate how many rollouts were kept, and why the others were not."""
    table = TableModel("Kept and rejected", ("", *(found.name for found in phases)))
    counts = [found.reasons or Counter() for found in phases]
    names = [""] + [name for name, _ in sum(counts, Counter[str]()).most_common() if name]
    for name in names:
        cells = [
            f"{c[name]:,} ({percent(_ratio(c[name], c.total()))})" if c[name] or not name else DASH for c in counts
        ]
        table.add(Cell("kept", "strong") if not name else f"rejected: {name}", *cells)
    table.add("all", *(number(c.total()) for c in counts))
    table.add(Cell("rule", "dim"), *(Cell(found.rule, "dim") for found in phases))
    return table


def preference(found: PhaseRollouts) -> list[TableModel]:
    """Tabulate what the rule chose beside what it ranked lower, with lengths; and openings of sentences."""
    shown = found.preference
    if shown is None or not shown.rest.answers:
        return []
    scored = found.candidates is not None
    columns = ("", "answers", "right", "wrong", "unparseable", "tokens", "sentences", "teacher")
    table = TableModel(f"What the rule “{found.rule}” prefers in {found.name}", columns)
    for name, side in (("chosen", shown.chosen), ("rest", shown.rest)):
        table.add(Cell(name, "strong" if side is shown.chosen else ""), *_answers(side, scored))
    table.notes.append(
        "rest: passed the filters, ranked lower. tokens, sentences: mean per answer; teacher: teacher sentences per"
        " answer, and in brackets their share."
    )
    over, under = shown.openings()
    if not over and not under:
        table.notes.append("No opening of a sentence was picked a tenth more or less often than expected.")
        return [table]
    both = shown.chosen.answers + shown.rest.answers
    openings = TableModel(
        f"Openings of sentences in {found.name}", ("opening", "chosen", "expected", "ratio", "tokens of its answers")
    )
    for heading, rows in (("over-picked", over), ("under-picked", under)):
        if rows:
            openings.add(Cell(heading, "dim"), "", "", "", "")
        for row in rows:
            openings.add(*_opening(row))
    mean = (shown.chosen.tokens + shown.rest.tokens) / both
    drawn = "" if shown.counted_answers == both else f" Counted on {shown.counted_answers:,} of {both:,} answers."
    openings.notes.append(
        "expected: its sentences in all ranked answers × the chosen answers' share of sentences;"
        " ratio: chosen ÷ expected, each + 5; numbers are shown as #."
        f" The mean of all ranked answers is {mean:,.1f} tokens.{drawn}"
    )
    return [table, openings]


def _answers(side: Answers, scored: bool) -> list[str]:
    graded = side.grades.total()
    verdicts = [percent(_ratio(side.grades[name], graded)) for name in ("right", "wrong", "unparseable")]
    means = [number(_ratio(value, side.answers), 1) for value in (side.tokens, side.sentences)]
    teacher = f"{number(_ratio(side.teacher, side.answers), 2)} ({percent(_ratio(side.teacher, side.sentences))})"
    return [number(side.answers), *verdicts, *means, teacher if scored else DASH]


def _opening(row: Opening) -> list[str]:
    return [row.text, number(row.chosen), number(row.expected, 1), f"{row.ratio:.2f}", number(row.mean_tokens, 1)]


def mixed(phases: Sequence[PhaseRollouts]) -> TableModel | None:
    """Tabulate mixed-policy phases: cut off, and mended by the teacher."""
    table = TableModel(
        "Mixed policy", ("phase", "questions", "cut off", "right after", "wrong", "unparseable", "student's part")
    )
    for found in phases:
        if (own := found.mixed) is None:
            continue
        graded = own.grades.total()
        verdicts = [percent(_ratio(own.grades[name], graded)) for name in ("right", "wrong", "unparseable")]
        cut = int(own.cut.sum())
        share = f"{cut:,} ({percent(_ratio(cut, own.prompts))})"
        table.add(found.name, number(own.prompts), share, *verdicts, percent(own.prefix_share))
    table.notes.append(
        "cut off: answers of the student that reached the cap, a multiple of the teacher's length. The teacher wrote"
        " the rest of those from a point in their second half; right after: of these, before any filter, where the"
        " answer is known. student's part: share of their bytes."
    )
    return table if table.rows else None


# --- packing, training, time ------------------------------------------------------------------------


def packing(stages: Sequence[Stage]) -> TableModel | None:
    """Tabulate how full the rows are, a row per phase."""
    table = TableModel("Packing", ("phase", "rollouts", "replayed", "rows", "tokens", "targets", "fill"))
    for stage in stages:
        if stage.name == "pack" and stage.finished:
            counts: dict[str, Any] = stage.manifest()["counts"]
            numbers = (number(counts[name]) for name in ("rollouts", "replayed", "rows", "tokens", "target_tokens"))
            table.add(stage.phase, *numbers, percent(counts["fill"]))
    table.notes.append(
        "replayed: of the rollouts, those joined from a phase before. targets: tokens that are learnt. fill: share of"
        " the rows' places that hold a token."
    )
    return table if table.rows else None


def training(stages: Sequence[Stage], curves: Sequence[Curve]) -> TableModel | None:
    """Tabulate training, a row per phase."""
    table = TableModel("Training", ("phase", "steps", "loss", "largest gradient", "tokens/s", "watched"))
    found = {stage.phase: stage for stage in stages if stage.name == "train"}
    for own in curves:
        stage = found[own.phase]
        loss = f"{own.first_loss:.3f} → {own.last_loss:.3f}"
        phase = own.phase if stage.finished else f"{own.phase} (unfinished)"
        table.add(phase, number(own.num_steps), loss, f"{own.max_grad_norm:.2f}", number(_rate(stage)), _watched(stage))
    table.notes.append(
        "loss: mean of the first and of the last tenth of the steps. largest gradient: its norm, unclipped. watched:"
        " right ones of a few short greedy answers before and after, where a collapse shows; no measure of quality."
    )
    return table if table.rows else None


def _watched(stage: Stage) -> str:
    """Say how the student answered the few questions that it was watched by."""
    looks = stage.manifest()["counts"].get("watched") if stage.finished else None
    return watched(looks) if looks else DASH


def times(stages: Sequence[Stage]) -> TableModel | None:
    """Tabulate the seconds of each stage, with tokens per second where it says how many."""
    phases = list(dict.fromkeys(stage.phase for stage in stages if stage.finished))
    names = [name for name in _CHAIN if any(stage.name == name for stage in stages)]
    table = TableModel(
        "Seconds of each stage (tokens per second)", ("", *("before" if p == "base" else p for p in phases))
    )
    found = {(stage.phase, stage.name): stage for stage in stages}
    totals = dict.fromkeys(phases, 0.0)
    for name in names:
        cells = []
        for phase in phases:
            stage = found.get((phase, name))
            seconds = _seconds(stage) if stage else None
            rate = _rate(stage) if stage else None
            totals[phase] += seconds or 0.0
            cells.append(number(seconds, 1) + (f" ({number(rate)})" if rate else ""))
        table.add(name, *cells)
    table.add(Cell("all", "strong"), *(Cell(number(total, 1), "strong") for total in totals.values()))
    table.notes.append(
        f"{sum(totals.values()):,.1f} seconds together. Seconds and tokens are those of the call that finished the"
        " stage; starting a model is part of it."
    )
    return table if any(totals.values()) else None


def _seconds(stage: Stage) -> float | None:
    timing = stage.timing() if stage.finished else {}
    return timing.get("seconds", timing.get("train_seconds"))


def _rate(stage: Stage) -> float | None:
    timing = stage.timing() if stage.finished else {}
    if "tokens_per_second" in timing:
        return timing["tokens_per_second"]
    tokens = timing.get("sampled_tokens", timing.get("scored_tokens"))
    return tokens / timing["seconds"] if tokens and timing.get("seconds") else None


def missing(stages: Sequence[Stage]) -> TableModel | None:
    """Tabulate what is not finished; None when all is."""
    table = TableModel("Not finished", ("phase", "stage", "state"), left=3)
    for stage in stages:
        if not stage.finished:
            table.add("before" if stage.phase == "base" else stage.phase, stage.name, stage.state)
    return table if table.rows else None


def fingerprints(stages: Sequence[Stage]) -> TableModel:
    """Tabulate what identifies each result."""
    table = TableModel("Fingerprints", ("phase", "stage", "version", "fingerprint"), left=4)
    for stage in stages:
        if stage.finished:
            manifest = stage.manifest()
            phase = "before" if stage.phase == "base" else stage.phase
            table.add(phase, stage.name, str(manifest["version"]), manifest["fingerprint"])
    return table
