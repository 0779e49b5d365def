"""Read what a run folder holds besides its rollouts: the figures of each stage, accuracies, training curves.

Input: folders of a run, finished or not. Output: plain numbers. Invariants: summary, tables, and page take every figure
from here; what an unfinished stage would say is left out, never guessed; an unknown number is None or NaN, not zero.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from dasd_lite.data.run_folder import RunFolder, StageFolder
from dasd_lite.errors import DataError
from dasd_lite.method.accuracy import standard_error

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
    """Return the folders of all stages that a recipe runs, including the evaluation before training."""
    planned = [(BASE, "evaluate")] if recipe.phase[0].evaluate.prompts is not None else []
    planned += [(phase.name, stage) for phase in recipe.phase for stage in phase.stages]
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
class Accuracy:
    """Graded answers to some questions; the standard error is over questions, whose answers are not independent."""

    by_question: Mapping[str, float]
    """Share of right answers to each question."""
    samples: int
    """All answers."""
    truncated: int
    unparseable: int
    """Without those that were truncated."""
    tokens: int
    """In all answers together."""

    @cached_property
    def _means(self) -> npt.NDArray[np.float64]:
        return np.fromiter(self.by_question.values(), dtype=np.float64)

    @property
    def questions(self) -> int:
        """Number of questions."""
        return len(self.by_question)

    @property
    def mean(self) -> float:
        """Mean over questions, 0 to 1."""
        return float(self._means.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for a single question."""
        return standard_error(self._means)


@dataclass(frozen=True)
class ModelAccuracy:
    """Accuracy of one model: before distillation, or after a phase."""

    name: str
    """`before`, or the phase."""
    overall: Accuracy
    domains: Mapping[str, Accuracy]


@dataclass(frozen=True)
class AccuracyChange:
    """Difference of two accuracies with its standard error."""

    difference: float
    error: float

    @property
    def in_errors(self) -> float | None:
        """The difference in standard errors; None if the error is unknown or zero."""
        return self.difference / self.error if self.error > 0 else None


def read_accuracy(folder: Path) -> ModelAccuracy:
    """Add up the graded answers of a finished evaluation."""
    rows = Evaluation(folder).to_table(["prompt_uid", "domain", "grade", "finish_reason", "num_tokens"]).to_pylist()
    by_domain: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_domain[row["domain"]].append(row)
    domains = {domain: _accuracy(of_domain) for domain, of_domain in sorted(by_domain.items())}
    return ModelAccuracy(phase_label(folder.parent.name), _accuracy(rows), domains)


def phase_label(phase: str) -> str:
    """Return how tables call a phase: the evaluation of the untrained student is `before`."""
    return "before" if phase == BASE else phase


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> Accuracy:
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        right[row["prompt_uid"]].append(row["grade"] == "right")
    return Accuracy(
        by_question={uid: sum(answers) / len(answers) for uid, answers in right.items()},
        samples=len(rows),
        truncated=sum(row["finish_reason"] == "length" for row in rows),
        unparseable=sum(row["grade"] == "unparseable" and row["finish_reason"] != "length" for row in rows),
        tokens=sum(row["num_tokens"] for row in rows),
    )


def accuracy_change(before: Accuracy, after: Accuracy) -> AccuracyChange:
    """Compare two accuracies: question by question if both have the same questions, which gives a smaller error."""
    difference = after.mean - before.mean
    if before.by_question.keys() == after.by_question.keys():
        pairs = np.array([after.by_question[uid] - mean for uid, mean in before.by_question.items()])
        return AccuracyChange(difference, standard_error(pairs))
    return AccuracyChange(difference, math.hypot(before.error, after.error))


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
