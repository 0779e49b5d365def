"""Turn accuracies into tables that terminal and page both show, and questions that were trained on.

Input: the numbers of results.py and audit.py. Output: `ReportTable`s of plain text. Invariant: every ± says in a note
under its table what it is the error of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from dasd_lite.data.records import OWN_TASK
from dasd_lite.grading.contamination import FLAGGED, LISTED
from dasd_lite.grading.grade import VERDICTS
from dasd_lite.grading.statistics import Accuracy, Comparison, compare_accuracies
from dasd_lite.report.audit import Audit
from dasd_lite.report.results import ModelAccuracy
from dasd_lite.report.tables import DASH, Cell, ReportTable, number, percent

_MOST_PAIRS = 200  # of questions and training prompts that are alike
_MOST_TEXT = 600  # characters of each


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
    """Return a note on the phases that lowered accuracy by twice the error or more; empty if none did."""
    students = [model for model in models if not model.is_teacher]
    tasks = tasks_of(models)
    lower = []
    for before, after in pairwise(students):
        for task in (task for task in tasks if task in before.tasks and task in after.tasks):
            own = compare_accuracies(before.tasks[task], after.tasks[task])
            if own.in_errors is not None and own.in_errors < -1.99:
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
    named = [
        f"{count:,} of {number:,} questions of {'evaluate.prompts' if task == OWN_TASK else task}"
        for task, count, number in flagged
        if count
    ]
    return (
        f"Contamination: {', '.join(named)} have half or more of their 8-grams in one of the {searched}. An accuracy on"
        " them says what was remembered. The page shows the texts."
    )


def _abridged(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _MOST_TEXT else f"{plain[:_MOST_TEXT].rstrip()} …"
