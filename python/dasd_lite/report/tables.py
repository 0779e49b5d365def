"""Turn results into tables that terminal and page both show.

Input: the numbers of results.py and rollouts.py. Output: `ReportTable`s of plain text. Invariant: an unknown number is
a dash, and a note under the table explains its columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dasd_lite.config.chain import STAGES
from dasd_lite.data.run_folder import StageFolder
from dasd_lite.grading.grade import UNDECIDED
from dasd_lite.grading.statistics import standard_error
from dasd_lite.grading.temperatures import TeacherAt, advice
from dasd_lite.report.results import Curve, StageResult, phase_label
from dasd_lite.report.rollouts import CLASSES, Opening, PhaseRollouts, RankedAnswers, SentenceCounts

DASH = "–"


@dataclass(frozen=True)
class Cell:
    """Text with a tone: "good", "bad", "dim", "strong", "text" (long, on several lines), or a sentence class."""

    text: str
    tone: str = ""


@dataclass
class ReportTable:
    """A table whose first `left` columns are text, flush left; the others are numbers, flush right."""

    title: str
    columns: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: int = 1

    def add(self, *cells: Cell | str) -> None:
        """Append a row."""
        self.rows.append([cell if isinstance(cell, Cell) else Cell(cell) for cell in cells])


def percent(part: float, whole: float = 1) -> str:
    """Format a share in percent; a dash if it is unknown."""
    share = _ratio(part, whole)
    return DASH if math.isnan(share) else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 0) -> str:
    """Format a number with thousands separators; a dash if it is unknown."""
    return DASH if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


# --- rollouts and selection -------------------------------------------------------------------------


def teacher(teachers: Sequence[TeacherAt]) -> ReportTable | None:
    """Tabulate how good the teacher's answers are at each temperature; None if it was not sampled."""
    if not teachers:
        return None
    columns = ("temperature", "answers", "questions", "right, %", "repeating", "cut off")
    table = ReportTable("The teacher at each temperature", columns)
    for each in teachers:
        means = np.array(list(each.means.values()))
        right = number(100 * float(means.mean()), 1) if len(means) else DASH
        error = standard_error(means)
        table.add(
            f"{each.temperature:g}",
            number(each.answers),
            number(len(means)),
            f"{right} ± {100 * error:.1f}" if error > 0 else right,  # none of 0 follows from equal answers
            percent(each.repeating, each.answers),
            percent(each.cut_off, each.answers),
        )
    table.notes.append(
        "questions: those with an answer that could be compared with its reference. right: of the answers to these,"
        " ± standard error over questions."
        " repeating: by the limits of select, whatever else an answer was rejected for."
    )
    if (line := advice(teachers)) is not None:
        table.notes.append(f"{line[0].upper()}{line[1:]}.")
    return table


def rollouts(phases: Sequence[PhaseRollouts]) -> ReportTable:
    """Tabulate the rollouts of each phase: how many, how varied, how probable, how long."""
    columns = ("phase", "source", "T", "prompts", "rollouts", "varied", "p", "tokens", "kept")
    table = ReportTable("Rollouts", columns, left=2)
    for phase in phases:
        lengths = phase.tokens.values()
        mean = _ratio(sum(values.sum() for values in lengths), sum(map(len, lengths)))
        kept = phase.tokens.get("kept", ())
        table.add(
            phase.name,
            phase.source,
            DASH if phase.temperature is None else f"{phase.temperature:g}",
            number(phase.prompts),
            number(phase.rollouts),
            f"{phase.varied:.2f}",
            f"{phase.geometric.mean():.3f}" if len(phase.geometric) else DASH,
            number(mean, 1),
            number(float(np.mean(kept)) if len(kept) else None, 1),
        )
    table.notes.append(
        "T: sampling temperature. varied: distinct sentences of a prompt's answers ÷ all of them. p: geometric mean of"
        " the teacher's token probabilities (at temperature 1), averaged over answers. tokens, kept: mean length of all"
        " answers and of the kept ones, in the student's tokens."
    )
    return table


def sentences(phases: Sequence[PhaseRollouts]) -> ReportTable:
    """Tabulate sentence classes of all candidates and of the kept answers."""
    columns = ("phase", "answers", "number", "sentences", *CLASSES)
    table = ReportTable("Sentence classes", columns, left=2)
    for phase in phases:
        for name, classes in (("candidates", phase.candidates), ("kept", phase.kept)):
            if classes is not None:
                table.add(phase.name if name == "candidates" else "", name, *_classes(classes))
    betas = sorted({phase.beta for phase in phases})
    table.notes.append(
        f"teacher: p_T − p_S > β = {', '.join(f'{beta:g}' for beta in betas)}; student: p_S − p_T > β;"
        " shared: neither; none: a model has no token in it, or has not scored the answer. sentences: mean per answer."
        " Classes are shares of all"
        " sentences; the number before the share of teacher sentences is their mean per answer."
    )
    return table


def _classes(classes: SentenceCounts) -> list[Cell | str]:
    total = int(classes.totals.sum())
    texts = [percent(int(count), total) for count in classes.totals]
    texts[1] = f"{number(_ratio(int(classes.totals[1]), classes.answers), 2)} ({texts[1]})"
    shares = [Cell(text, kind) for text, kind in zip(texts, CLASSES, strict=True)]
    return [number(classes.answers), number(_ratio(total, classes.answers), 1), *shares]


def reasons(phases: Sequence[PhaseRollouts]) -> ReportTable:
    """Tabulate how many rollouts were kept, and why the others were rejected."""
    table = ReportTable("Kept and rejected", ("", *(phase.name for phase in phases)))
    counts = [phase.reasons or Counter() for phase in phases]
    names = [""] + [name for name, _ in sum(counts, Counter[str]()).most_common() if name]
    for name in names:
        cells = [f"{c[name]:,} ({percent(c[name], c.total())})" if c[name] or not name else DASH for c in counts]
        table.add(Cell("kept", "strong") if not name else f"rejected: {name}", *cells)
    table.add("all", *(number(c.total()) for c in counts))
    table.add(Cell("rule", "dim"), *(Cell(phase.rule, "dim") for phase in phases))
    return table


def choices(phases: Sequence[PhaseRollouts]) -> ReportTable | None:
    """Tabulate what each choice says about its rule; None if no rule ranked anything."""
    columns = ("phase", "rule", "questions", "with length", "teacher sentences", "ties", "within noise")
    table = ReportTable("Does the rule decide?", columns, left=2)
    for phase in phases:
        if (own := phase.choice) is not None:
            correlation = own["length_correlation"]
            shares = (own[name] for name in ("teacher_share", "tied", "could_flip"))
            table.add(
                phase.name,
                phase.rule,
                number(own["questions"]),
                DASH if correlation is None else f"{correlation:+.2f}".replace("-", "−"),
                *(DASH if share is None else percent(share) for share in shares),
            )
    table.notes.append(
        "questions: those with more candidates than were kept. with length: rank correlation of the score with the"
        " length of an answer, within questions; near ±1 the rule chooses by length. teacher sentences: their share"
        " among all that have a class; near 0 or 100 % a count of them tells answers apart by length alone. ties:"
        " questions in which a rejected answer has the same score as a kept one. within noise: questions in which the"
        " difference between engines that score measured could turn the choice; – if it measured none."
    )
    return table if table.rows else None


def preference(phase: PhaseRollouts) -> list[ReportTable]:
    """Tabulate the answers that the rule chose beside those it ranked lower, and the openings of their sentences."""
    ranked = phase.preference
    if ranked is None or not ranked.rest.answers:
        return []
    scored = phase.candidates is not None
    columns = ("", "answers", "right", "wrong", "no answer", "undecided", "tokens", "sentences", "teacher")
    table = ReportTable(f"What the rule “{phase.rule}” prefers in {phase.name}", columns)
    table.add(Cell("chosen", "strong"), *_answers(ranked.chosen, scored))
    table.add("rest", *_answers(ranked.rest, scored))
    table.notes.append(
        "rest: passed the filters, but ranked lower. tokens, sentences: mean per answer. teacher: teacher sentences per"
        " answer, and in brackets their share of all sentences."
    )
    over, under = ranked.openings()
    if not over and not under:
        table.notes.append("No opening of a sentence was picked a tenth more or less often than expected.")
        return [table]
    openings = ReportTable(
        f"Openings of sentences in {phase.name}", ("opening", "chosen", "expected", "ratio", "tokens of its answers")
    )
    for heading, rows in (("over-picked", over), ("under-picked", under)):
        if rows:
            openings.add(Cell(heading, "dim"), "", "", "", "")
        for row in rows:
            openings.add(*_opening(row))
    both = ranked.chosen.answers + ranked.rest.answers
    mean = (ranked.chosen.tokens + ranked.rest.tokens) / both
    subset = "" if ranked.counted_answers == both else f" Counted on {ranked.counted_answers:,} of {both:,} answers."
    openings.notes.append(
        "opening: first two words of a sentence, with # for numbers. expected: sentences with it in all ranked answers"
        " × the chosen answers' share of all sentences. ratio: chosen ÷ expected, each + 5."
        f" The mean of all ranked answers is {mean:,.1f} tokens.{subset}"
    )
    return [table, openings]


def _answers(side: RankedAnswers, scored: bool) -> list[str]:
    means = [number(_ratio(value, side.answers), 1) for value in (side.tokens, side.sentences)]
    teacher = f"{number(_ratio(side.teacher, side.answers), 2)} ({percent(side.teacher, side.sentences)})"
    return [number(side.answers), *_verdicts(side.grades), *means, teacher if scored else DASH]


def _verdicts(grades: Counter[str]) -> list[str]:
    """Return the shares of right and wrong answers, of those that state none, and of those that cannot be compared."""
    undecided = sum(grades[name] for name in UNDECIDED)
    numbers = (grades["right"], grades["wrong"], grades["no_answer"], undecided)
    return [percent(own, grades.total()) for own in numbers]


def _opening(row: Opening) -> list[str]:
    return [row.text, number(row.chosen), number(row.expected, 1), f"{row.ratio:.2f}", number(row.mean_tokens, 1)]


def mixed(phases: Sequence[PhaseRollouts]) -> ReportTable | None:
    """Tabulate mixed-policy phases: answers that were cut off, and whether the teacher corrected them."""
    columns = (
        "phase",
        "questions",
        "cut off",
        "ended wrong",
        "right after",
        "wrong",
        "no answer",
        "undecided",
        "student's part",
    )
    table = ReportTable("Mixed policy", columns)
    for phase in phases:
        if (own := phase.mixed) is not None:
            cut = f"{own.cut_off:,} ({percent(own.cut_off, own.prompts)})"
            wrong = DASH if own.wrong is None else f"{own.wrong:,} ({percent(own.wrong, own.prompts)})"
            share = percent(own.prefix_share)
            table.add(phase.name, number(own.prompts), cut, wrong, *_verdicts(own.grades), share)
    table.notes.append(
        "cut off: answers of the student that reached the length limit, a multiple of the teacher's length. ended"
        " wrong: finished answers that are not right; – if they were not graded. The teacher rewrote those that"
        " mix.rescue names from a point in their second half onward. right after and the next three: shares of the"
        " rewritten answers before any filter, where the right answer is known. student's part: share of their bytes."
    )
    return table if table.rows else None


# --- packing, training, time ------------------------------------------------------------------------


def packing(figures: Sequence[StageResult]) -> ReportTable | None:
    """Tabulate how full the rows are, per phase."""
    table = ReportTable("Packing", ("phase", "rollouts", "replayed", "rows", "tokens", "targets", "fill"))
    for own in figures:
        if own.stage == "pack":
            names = ("rollouts", "replayed", "rows", "tokens", "target_tokens")
            table.add(own.phase, *(number(own.counts[name]) for name in names), percent(own.counts["fill"]))
    table.notes.append(
        "replayed: rollouts repeated from an earlier phase, included in rollouts. targets: tokens in the loss. fill:"
        " share of the rows' positions that hold a token."
    )
    return table if table.rows else None


def training(figures: Sequence[StageResult], curves: Sequence[Curve]) -> ReportTable | None:
    """Tabulate training, per phase; a training run that is still running is included."""
    table = ReportTable("Training", ("phase", "steps", "loss", "largest gradient", "tokens/s", "monitored"))
    finished = {own.phase: own for own in figures if own.stage == "train"}
    for curve in curves:
        own = finished.get(curve.phase)
        snapshots = own.counts.get("monitored") if own else None
        table.add(
            curve.phase if own else f"{curve.phase} (unfinished)",
            number(curve.num_steps),
            f"{curve.first_loss:.3f} → {curve.last_loss:.3f}",
            number(curve.max_grad_norm, 2),
            number(own.tokens_per_second if own else None),
            monitored(snapshots) if snapshots else DASH,
        )
    table.notes.append(
        "loss: means over the first and the last tenth of the steps. largest gradient: its norm before clipping."
        " monitored: how many of a few short greedy answers were right before and after training. They reveal a"
        " collapse and do not measure quality."
    )
    return table if table.rows else None


def monitored(snapshots: Sequence[Mapping[str, Any]]) -> str:
    """Describe how many monitored answers were right before and after training."""
    return f"{snapshots[0]['right']} → {snapshots[-1]['right']} of {snapshots[-1]['questions']} right"


def times(figures: Sequence[StageResult]) -> ReportTable | None:
    """Tabulate the seconds of each stage, and its tokens per second if it has any."""
    cells = {(own.phase, own.stage): own for own in figures}
    phases = list(dict.fromkeys(own.phase for own in figures))
    table = ReportTable("Seconds of each stage (tokens per second)", ("", *map(phase_label, phases)))
    for stage in STAGES:
        row = [cells.get((phase, stage)) for phase in phases]
        if any(row):
            table.add(stage, *(_time(own) if own else DASH for own in row))
    totals = [sum(own.seconds or 0.0 for own in figures if own.phase == phase) for phase in phases]
    table.add(Cell("all", "strong"), *(Cell(number(total, 1), "strong") for total in totals))
    table.notes.append(
        f"{sum(totals):,.1f} seconds in total. Seconds and tokens are those of the command that finished the stage, and"
        " seconds include the time to start a model. mix, and score by the teacher: tokens of both models ÷ seconds of"
        " both."
    )
    return table if any(totals) else None


def _time(own: StageResult) -> str:
    rate = own.tokens_per_second
    return number(own.seconds, 1) + (f" ({number(rate)})" if rate is not None else "")


def missing(stages: Sequence[StageFolder]) -> ReportTable | None:
    """Tabulate the stages that are not finished; None if all are."""
    table = ReportTable("Not finished", ("phase", "stage", "state"), left=3)
    for own in stages:
        if not own.is_finished:
            table.add(phase_label(own.phase), own.stage, own.state)
    return table if table.rows else None


def fingerprints(figures: Sequence[StageResult]) -> ReportTable:
    """Tabulate what identifies each result."""
    table = ReportTable("Fingerprints", ("phase", "stage", "version", "fingerprint"), left=4)
    for own in figures:
        table.add(phase_label(own.phase), own.stage, str(own.manifest["version"]), own.manifest["fingerprint"])
    return table
