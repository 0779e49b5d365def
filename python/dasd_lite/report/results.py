"""Read what a run folder holds besides its rollouts: the figures of each stage, accuracies, training curves.

Input: folders of a run, finished or not. Output: plain numbers. Invariants: summary, tables, and page take every figure
from here; what an unfinished stage would say is left out, never guessed; an unknown number is None or NaN, not zero.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from dasd_lite.config.chain import BASE
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.data.handles import Evaluation
from dasd_lite.data.manifest import read_manifest, read_timing
from dasd_lite.data.metrics import read_metrics
from dasd_lite.data.records import OWN_TASK
from dasd_lite.data.references import kind_of
from dasd_lite.data.run_folder import TEACHER, RunFolder, StageFolder
from dasd_lite.errors import DataError
from dasd_lite.grading.grade import VERDICTS
from dasd_lite.grading.statistics import Accuracy

_Row = dict[str, Any]
_GRADED_COLUMNS = ("task", "prompt_uid", "domain", "grade", "vote", "finish_reason", "num_tokens")
_CURVE_POINTS = 400  # per curve of the report; longer ones are averaged over equal spans of steps


# --- stages -----------------------------------------------------------------------------------------


def read_recipe(run: RunFolder) -> RecipeConfig:
    """Read the resolved recipe of a run; raises DataError if it is missing, damaged, or of another version."""
    try:
        return RecipeConfig.model_validate(run.recipe())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{run.recipe_file}: {key}: {first['msg']}; another version of dasd-lite wrote it") from error


def planned_stages(run: RunFolder, recipe: RecipeConfig) -> list[StageFolder]:
    """Return the folders of all stages of a run: those of its phases, and evaluations of untrained student and teacher.

    An evaluation of the teacher counts that the recipe does not ask for any more.
    """
    planned = [(BASE, "evaluate")] if recipe.phase[0].evaluate.has_questions else []
    planned += [(phase.name, stage) for phase in recipe.phase for stage in phase.stages]
    wanted = any(phase.evaluate.teacher for phase in recipe.phase)
    if wanted or run.stage(TEACHER, "evaluate").is_dir():
        planned.append((TEACHER, "evaluate"))
    return [StageFolder(phase, stage, run.stage(phase, stage)) for phase, stage in planned]


@dataclass(frozen=True)
class StageResult:
    """What a finished stage counted, and the time and tokens of the call that finished it.

    In `mix`, and in `score` by the teacher, two models work in turn: time and tokens are those of both.
    """

    phase: str
    stage: str
    folder: Path
    manifest: dict[str, Any]
    timing: dict[str, float]
    """Other things that were measured, such as cost and memory."""
    seconds: float | None
    tokens: float | None
    """Tokens that were sampled, scored, or trained on; None if the stage has none."""
    tokens_per_second: float | None

    @property
    def counts(self) -> dict[str, Any]:
        """What the stage counted."""
        return dict(self.manifest["counts"])


def read_result(folder: Path) -> StageResult:
    """Read the figures of a finished stage; raises DataError if it is unfinished."""
    manifest = read_manifest(folder)
    stage = manifest["stage"]
    timings = [read_timing(part) for part in StageFolder(folder.parent.name, stage, folder).parts]
    seconds = _sum(timings, "seconds")
    tokens = manifest["counts"].get("tokens") if stage == "train" else _sum(timings, "sampled_tokens", "scored_tokens")
    rate = timings[0].get("tokens_per_second")
    if any(timings[1:]):
        rate = tokens / seconds if tokens and seconds else None
    # A teacher that returns text alone has 0 tokens: their number is unknown.
    return StageResult(folder.parent.name, stage, folder, manifest, timings[0], seconds, tokens or None, rate or None)


def _sum(timings: Iterable[Mapping[str, float]], *names: str) -> float | None:
    values = [timing[name] for timing in timings for name in names if name in timing]
    return sum(values) if values else None


# --- accuracy ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelAccuracy:
    """Accuracies of one model: of the student before distillation or after a phase, or of the teacher."""

    name: str
    """`before`, the phase, or `teacher`."""
    tasks: Mapping[str, Accuracy]
    """By task: each benchmark, and OWN_TASK for the questions of `evaluate.prompts`."""
    domains: Mapping[str, Accuracy]
    """By domain, of the questions of OWN_TASK."""

    @property
    def is_teacher(self) -> bool:
        """Whether it is what students are measured against."""
        return self.name == TEACHER


def read_accuracy(folder: Path) -> ModelAccuracy:
    """Add up the graded answers of a finished evaluation."""
    evaluation = Evaluation(folder)
    rows = [row for batch in evaluation.batches(_GRADED_COLUMNS, batch_size=4096) for row in batch.to_pylist()]
    by_task: dict[str, list[_Row]] = defaultdict(list)
    by_domain: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    if OWN_TASK in by_task:
        for row, reference in zip(rows, _references(evaluation), strict=True):
            row["reference"] = reference if row["task"] == OWN_TASK else ""
    for row in by_task.get(OWN_TASK, ()):
        by_domain[row["domain"]].append(row)
    return ModelAccuracy(
        name=phase_label(folder.resolve().parent.name),
        tasks={task: _accuracy(own) for task, own in by_task.items()},
        domains={domain: _accuracy(own) for domain, own in sorted(by_domain.items())},
    )


def _references(evaluation: Evaluation) -> Iterator[str]:
    """Yield the answer that each row is graded against: with the uid it identifies a question of a user's file.

    Two files that number their questions from 1 are not to be paired. Of options and tests nothing is kept: options
    stand in another order for each answer, and tests are large.
    """
    for batch in evaluation.batches(("answer",)):
        for answer in batch["answer"].to_pylist():
            yield answer if answer is not None and kind_of(answer) == "math" else ""


def phase_label(phase: str) -> str:
    """Return how tables call a phase: the evaluation of the untrained student is `before`."""
    return "before" if phase == BASE else phase


def _accuracy(rows: Sequence[_Row]) -> Accuracy:
    by_question: dict[tuple[str, str], list[_Row]] = defaultdict(list)
    for row in rows:
        by_question[row["prompt_uid"], row.get("reference", "")].append(row)

    def count(*verdicts: str) -> npt.NDArray[np.int64]:
        return np.array([sum(row["grade"] in verdicts for row in own) for own in by_question.values()], np.int64)

    truncated = [row["finish_reason"] == "length" for row in rows]
    return Accuracy(
        questions=tuple(by_question),
        samples=count(*VERDICTS),
        right=count("right"),
        undecided=count("unparseable", "unknown"),
        votes=[[True if row["grade"] == "right" else row["vote"] for row in own] for own in by_question.values()],
        verdicts=Counter(row["grade"] for row, cut in zip(rows, truncated, strict=True) if not cut),
        truncated=sum(truncated),
        tokens=sum(row["num_tokens"] for row in rows),
    )


# --- training ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Training metrics of one phase, thinned to what a figure can show."""

    phase: str
    steps: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]
    learning_rate: npt.NDArray[np.float64]
    num_steps: int
    first_loss: float
    """Mean over the first tenth of the steps."""
    last_loss: float
    """Mean over the last tenth."""
    max_grad_norm: float
    """Largest gradient norm before clipping; NaN if none is known."""


def read_curve(folder: Path) -> Curve | None:
    """Read the metrics of a training run, which may still be running; None if there are none."""
    columns = ("step", "loss", "learning_rate", "grad_norm")
    rows = np.array([[line[name] for name in columns] for line in read_metrics(folder / "metrics.jsonl")], np.float64)
    if not len(rows):
        return None
    steps, loss, rate, norm = rows.T
    tenth = max(len(rows) // 10, 1)
    spans = np.array_split(np.arange(len(rows)), min(len(rows), _CURVE_POINTS))

    def thin(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.array([values[span].mean() for span in spans])

    return Curve(
        phase=folder.parent.name,
        steps=thin(steps),
        loss=thin(loss),
        learning_rate=thin(rate),
        num_steps=len(rows),
        first_loss=float(loss[:tenth].mean()),
        last_loss=float(loss[-tenth:].mean()),
        max_grad_norm=max(filter(math.isfinite, norm.tolist()), default=math.nan),
    )


# --- origin -----------------------------------------------------------------------------------------


def packages(figures: Iterable[StageResult]) -> dict[str, str]:
    """Return the package versions that the stages ran with; all of them if stages differ."""
    versions: dict[str, dict[str, None]] = defaultdict(dict)
    for stage in figures:
        for name, version in stage.manifest.get("packages", {}).items():
            versions[name][version] = None
    return {name: " and ".join(seen) for name, seen in versions.items()}
