"""Compare any two evaluations on the questions that they share.

Input: two finished evaluations, of the same run or not. Output: a Comparison, or a table of them by task. Invariant: a
question is compared with itself; those that only one of the two has are counted and left out.
"""

from __future__ import annotations

from pathlib import Path

from dasd_lite import console
from dasd_lite.data.handles import Evaluation, PathName
from dasd_lite.errors import DataError
from dasd_lite.grading.statistics import Comparison, compare_accuracies
from dasd_lite.report import accuracy_tables
from dasd_lite.report.page import print_table
from dasd_lite.report.results import ModelAccuracy, read_accuracy


def compare(first: Evaluation | PathName, second: Evaluation | PathName, *, task: str | None = None) -> Comparison:
    """Say how much more accurate the second evaluation is than the first, question by question.

    Args:
        first: An evaluation, or its folder.
        second: Another one: another model, or another phase of the same run.
        task: The task to compare on; None if both share one alone.

    Returns:
        Difference of the accuracies with its standard error over the shared questions, and wins, ties and losses.

    Raises:
        DataError: They share no question, or several tasks and `task` names none of them.

    Source: arXiv 2411.00640, section 4.
    """
    folders = Evaluation.of(first).folder, Evaluation.of(second).folder
    shared = _shared(*folders, *map(read_accuracy, folders))
    if task is None and len(shared) == 1:
        (task,) = shared
    if task not in shared:
        named = f"task = {task!r}" if task is not None else "task is not set"
        raise DataError(f"{named}: {folders[0]} and {folders[1]} share {', '.join(shared)}; name one of them")
    return shared[task]


def show_comparison(folder: Path, against: Path) -> None:
    """Print two evaluations and how the first differs from the second, by task.

    Raises:
        DataError: One of the folders is no finished evaluation, or they share no question.
    """
    own, other = (Evaluation(path).folder for path in (folder, against))
    names = _names(own, other)
    models = [
        ModelAccuracy(name, read.tasks, read.domains)
        for name, read in zip(reversed(names), map(read_accuracy, (other, own)), strict=True)
    ]
    shared = _shared(other, own, *models)
    accuracies, undecided = accuracy_tables.accuracy(models), accuracy_tables.undecided(models)
    rows = [(task, f"{names[0]} against {names[1]}", comparison) for task, comparison in shared.items()]
    for table in (accuracies, undecided, accuracy_tables.comparisons("Difference", rows)):
        if table is not None:
            print_table(console.out(), table)


def _shared(first: Path, second: Path, own: ModelAccuracy, other: ModelAccuracy) -> dict[str, Comparison]:
    tasks = [task for task in own.tasks if task in other.tasks]
    compared = {task: compare_accuracies(own.tasks[task], other.tasks[task]) for task in tasks}
    shared = {task: comparison for task, comparison in compared.items() if comparison.shared}
    if not shared:
        raise DataError(f"{first} and {second} share no question, so they cannot be compared")
    return shared


def _names(own: Path, other: Path) -> tuple[str, str]:
    """Return the phases, or the paths as far as they differ if those are the same."""
    first, second = own.resolve().parts, other.resolve().parts
    if first[-2] != second[-2]:
        return first[-2], second[-2]
    same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    return "/".join(first[same:]), "/".join(second[same:])
