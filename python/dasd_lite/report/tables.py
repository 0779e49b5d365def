"""Turn results into tables that terminal and page both show.

Input: the numbers of results.py and rollouts.py. Output: `ReportTable`s of plain text. Invariant: an unknown number is
a dash, and a note under the table explains its columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from dasd_lite.config.chain import STAGES
from dasd_lite.data.records import OWN_TASK
from dasd_lite.data.run_folder import StageFolder
from dasd_lite.grading.contamination import FLAGGED, LISTED
from dasd_lite.grading.grade import UNDECIDED, VERDICTS
from dasd_lite.grading.statistics import Accuracy, Comparison, compare_accuracies, standard_error
from dasd_lite.grading.temperatures import TeacherAt, advice
from dasd_lite.report.audit import Audit
from dasd_lite.report.results import Curve, ModelAccuracy, StageResult, phase_label
from dasd_lite.report.rollouts import CLASSES, Opening, PhaseRollouts, RankedAnswers, SentenceCounts

DASH = "–"
_MOST_PAIRS = 200  # of questions and training prompts that are alike
_MOST_TEXT = 600  # characters of each


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


# --- accuracy ---------------------------------------------------------------------------------------


def accuracy(models: Sequence[ModelAccuracy]) -> ReportTable:
    """Tabulate the accuracy of each model on each task, with its two errors, and beside it cut-off rate and length."""
    tasks = tasks_of(models)
    title = "Accuracy" if tasks == [OWN_TASK] or len(tasks) > 1 else f"Accuracy on {tasks[0]}"
    columns = ("after", "n × k", "accuracy, %", "95 % interval", "± new", "cut off", "tokens")
    table = _by_task(title, columns, tasks)
    for task, model, own in _each(models):
        _add(
            table,
            task,
            Cell(_after(model), "strong"),
            f"{own.num_questions:,} × {_samples(own)}",
            Cell(with_error(own), "strong"),
            interval(own.interval()),
            number(100 * own.resampling_error, 1),
            percent(own.truncated, own.num_answers),
            number(own.tokens / own.num_answers, 1),
        )
    table.notes.append(
        "n × k: questions, and answers to each. accuracy: ± standard error over questions, as is the interval. ± new:"
        " standard error over new answers to the same questions; – if each has one. cut off: reached the"
        " length limit, so not right. tokens: mean length of an answer."
    )
    return table


def undecided(models: Sequence[ModelAccuracy]) -> ReportTable | None:
    """Tabulate the answers that are neither right nor wrong; None if there are none."""
    everything = [own for _, _, own in _each(models)]
    verdicts = [name for name in VERDICTS[2:] if any(own.verdicts.get(name) for own in everything)]
    if not verdicts:
        return None
    bounds = any(own.undecided.any() for own in everything)
    columns = ["after", *(name.replace("_", " ") for name in verdicts), *(["accuracy at least, at most"] * bounds)]
    table = _by_task("Neither right nor wrong", columns, tasks_of(models))
    for task, model, own in _each(models):
        shares = (percent(own.verdicts.get(name, 0), own.num_answers) for name in verdicts)
        _add(table, task, _after(model), *shares, *([interval(own.bounds)] * bounds))
    table.notes.append(
        "None of them counts as right. no answer: no final answer is stated, though the answer was not cut off."
        + (
            " unparseable: could not be compared with the reference. unknown: the comparison took too long or died. The"
            " accuracy is at least that with all of these wrong, at most that with all of them right."
            if bounds
            else ""
        )
    )
    return table


def _each(models: Sequence[ModelAccuracy]) -> Iterator[tuple[str, ModelAccuracy, Accuracy]]:
    """Yield each accuracy, one task after another."""
    for task in tasks_of(models):
        for model in models:
            if (own := model.tasks.get(task)) is not None:
                yield task, model, own


def tasks_of(models: Sequence[ModelAccuracy]) -> list[str]:
    """Return the tasks that any of the models was evaluated on, in order."""
    return list(dict.fromkeys(task for model in models for task in model.tasks))


def _by_task(title: str, columns: Sequence[str], tasks: Sequence[str]) -> ReportTable:
    """Begin a table with a row per task and model; a single task has no column."""
    several = len(tasks) > 1
    return ReportTable(title, ["task", *columns] if several else columns, left=2 if several else 1)


def _add(table: ReportTable, task: str, *cells: Cell | str) -> None:
    """Append a row; the task stands in the first of its rows."""
    if table.columns[0] == "task":
        shown = any(row[0].text == task for row in table.rows)
        cells = (Cell("" if shown else task, "strong"), *cells)
    table.add(*cells)


def _after(model: ModelAccuracy) -> str:
    return f"({model.name})" if model.name == "before" else model.name


def _samples(own: Accuracy) -> str:
    most = int(own.samples.max())
    return f"{most}" if most == own.k else f"{own.k}–{most}"


def with_error(own: Accuracy) -> str:
    """Format an accuracy with its standard error over questions, in percent without the sign."""
    return f"{100 * own.mean:.1f} ± {number(100 * own.standard_error, 1)}"


def interval(bounds: tuple[float, float]) -> str:
    """Format a confidence interval, in percent without the sign; a dash if it is unknown."""
    return DASH if math.isnan(bounds[0]) else f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}"


def changes(models: Sequence[ModelAccuracy]) -> ReportTable | None:
    """Tabulate how accuracy changed from phase to phase, and what is missing to the teacher; None for one model."""
    students = [model for model in models if not model.is_teacher]
    pairs = [(students[0], later, "since") for later in students[1:]]
    pairs += [(before, after, "since") for before, after in pairwise(students[1:])]
    pairs += [(students[-1], model, "against") for model in models if model.is_teacher and students]
    pairs.sort(key=lambda pair: models.index(pair[1]))
    tasks = tasks_of(models)
    rows = [
        (task, f"{after.name} {word} {before.name}", compare_accuracies(before.tasks[task], after.tasks[task]))
        for task in tasks
        for before, after, word in pairs
        if task in before.tasks and task in after.tasks
    ]
    return comparisons("Changes in accuracy", rows) if rows else None


def comparisons(title: str, rows: Sequence[tuple[str, str, Comparison]]) -> ReportTable:
    """Tabulate comparisons of two evaluations: task, what is compared, and the comparison."""
    unpaired = any(own.only_first or own.only_second for _, _, own in rows)
    columns = ["", "points", "95 % interval", "won", "tied", "lost", "questions", *(["unpaired"] if unpaired else [])]
    table = _by_task(title, columns, list(dict.fromkeys(task for task, _, _ in rows)))
    for task, name, own in rows:
        low, high = own.interval()
        tone = "good" if low > 0 else "bad" if high < 0 else ""
        _add(
            table,
            task,
            name,
            Cell(change(own), tone),
            DASH if math.isnan(low) else f"{_signed(low)} to {_signed(high)}",
            *(number(count) for count in (own.wins, own.ties, own.losses, own.shared)),
            *([number(own.only_first + own.only_second)] if unpaired else []),
        )
    table.notes.append(
        "points: difference of the accuracies in percentage points, ± its standard error over questions, paired: each"
        " question is compared with itself. 95 % interval: by Student's t; – if all questions differ equally. won,"
        " lost: questions to which the first-named gave the larger or the smaller share of right answers."
        + (" unpaired: questions that only one of the two has, which do not count." if unpaired else "")
    )
    return table


def change(own: Comparison) -> str:
    """Format a difference with its standard error, in percentage points."""
    if math.isnan(own.difference):
        return DASH
    return f"{_signed(own.difference)} ± {number(100 * own.standard_error, 1)}"


def _signed(difference: float) -> str:
    return f"{'−' if difference < 0 else '+'}{abs(100 * difference):.1f}"


def lowered(models: Sequence[ModelAccuracy]) -> list[str]:
    """Return a note on the phases that lowered accuracy; empty if none did."""
    students = [model for model in models if not model.is_teacher]
    tasks = tasks_of(models)
    lower = []
    for before, after in pairwise(students):
        for task in (task for task in tasks if task in before.tasks and task in after.tasks):
            own = compare_accuracies(before.tasks[task], after.tasks[task])
            if own.difference < 0:
                on = f" on {task}" if len(tasks) > 1 else ""
                lower.append(f"{after.name}{on} ({change(own)})")
    if not lower:
        return []
    return [
        f"Lower than after the previous phase, ± standard error over questions: {', '.join(lower)}. Known cause: a"
        " small student adopts the sharpness of the data it saw last (measured in docs/evidence.md). One run is no"
        " evidence for or against a phase or a rule."
    ]


def several_answers(models: Sequence[ModelAccuracy]) -> ReportTable | None:
    """Tabulate what several answers to a question are good for; None if each question has one."""
    columns = ("after", "k", "one", "pass@k", "maj@k", "pass^k")
    table = _by_task("Several answers to a question", columns, tasks_of(models))
    for task, model, own in _each(models):
        if (k := own.k) > 1:
            shares = (own.mean, own.pass_at(k), own.majority_at(k), own.pass_all(k))
            _add(table, task, _after(model), number(k), *map(percent, shares))
    table.notes.append(
        "one: accuracy of one answer. pass@k: at least one of k answers is right. maj@k: the most frequent of k answers"
        " is right; ties share the credit, and answers without a final answer do not vote. pass^k: all k are right."
    )
    return table if table.rows else None


def domains(models: Sequence[ModelAccuracy]) -> ReportTable | None:
    """Tabulate accuracy per domain of one's own questions; None if there is only one."""
    names = list(dict.fromkeys(name for model in models for name in model.domains))
    if len(names) < 2:
        return None
    first = models[0]
    columns = ("domain", "after", "questions", "accuracy, %", f"since {first.name}", "cut off", "tokens")
    table = ReportTable("Accuracy by domain", columns, left=2)
    for name in names:
        for model in models:
            if (own := model.domains.get(name)) is None:
                continue
            since = model is not first and not model.is_teacher and name in first.domains
            table.add(
                Cell(name if model is first else "", "strong"),
                _after(model),
                number(own.num_questions),
                with_error(own),
                change(compare_accuracies(first.domains[name], own)) if since else DASH,
                percent(own.truncated, own.num_answers),
                number(own.tokens / own.num_answers, 1),
            )
    table.notes.append("±: standard error over the questions of the domain; changes are paired by question.")
    return table


def contamination(audit: Audit) -> ReportTable | None:
    """Tabulate questions of the evaluations beside the training prompts that share their text; None if none does."""
    if not audit.pairs:
        return None
    columns = ("task", "question", "prompt", "8-grams", "text of the question", "text of the prompt")
    table = ReportTable("Questions that share text with a training prompt", columns, left=3)
    for pair in audit.pairs[:_MOST_PAIRS]:
        own = pair.overlap
        share = Cell("the same words" if own.exact else percent(own.share), "bad" if own.is_flagged else "")
        texts = (Cell(_abridged(text), "text") for text in pair.texts)
        table.add(pair.task, pair.question, pair.prompt, share, *texts)
    more = len(audit.pairs) - _MOST_PAIRS
    table.notes.append(
        "8-grams: share of the question's sequences of 8 words that are in this one prompt."
        f" From {FLAGGED:.0%} on the question counts as known to the student; pairs from {LISTED:.0%} on are listed."
        + (f" {more:,} more are not shown." if more > 0 else "")
    )
    return table


def contaminated(audit: Audit) -> str:
    """Say in one line how many questions of each task were trained on."""
    flagged = [(task, audit.flagged(task), number) for task, number in audit.questions.items()]
    searched = f"{audit.prompts:,} training prompts"
    if not any(count for _, count, _ in flagged):
        return f"Contamination: no question has half of its 8-grams in one of the {searched}."
    named = [f"{count:,} of {number:,} questions of {task}" for task, count, number in flagged if count]
    return (
        f"Contamination: {', '.join(named)} have half or more of their 8-grams in one of the {searched}. An accuracy on"
        " them says what was remembered. The page shows the texts."
    )


def _abridged(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _MOST_TEXT else f"{plain[:_MOST_TEXT].rstrip()} …"


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
            right if math.isnan(error) else f"{right} ± {100 * error:.1f}",
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
