"""Read what a run folder holds beside its rollouts: state, accuracies, packing, training, time.

Input: a run folder, finished or not. Output: plain numbers for the report's tables and figures.
Invariant: a stage that is not finished is named as such and never guessed; what is not known is None
or NaN, not zero.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.data.dataset import batches
from dasd_lite.data.manifest import read_manifest
from dasd_lite.data.metrics import parse_metrics
from dasd_lite.errors import DataError

_CURVE_POINTS = 400  # of a curve in the report; longer ones are averaged in equal spans of steps


@dataclass(frozen=True)
class Stage:
    """One stage of one phase: where it is and how far it came."""

    phase: str
    name: str
    folder: Path

    @property
    def state(self) -> str:
        """Say whether the folder is finished, unfinished or not begun."""
        if (self.folder / "manifest.json").exists():
            return "finished"
        return "unfinished" if self.folder.is_dir() and any(self.folder.iterdir()) else "not begun"

    @property
    def finished(self) -> bool:
        """Whether its results can be read."""
        return self.state == "finished"

    def manifest(self) -> dict[str, Any]:
        """Read its manifest."""
        return read_manifest(self.folder)

    def timing(self) -> dict[str, float]:
        """Read what its last run took; empty where it did not say."""
        found: dict[str, float] = defaultdict(float)
        for folder in (self.folder, self.folder / "student"):  # of mix, the student's part has a folder of its own
            if (path := folder / "timing.json").exists():
                for name, value in json.loads(path.read_text(encoding="utf-8")).items():
                    found[name] += value
        return dict(found)


def read_recipe(run_folder: Path) -> RecipeConfig:
    """Read the resolved recipe of a run folder."""
    path = run_folder / "recipe.json"
    if not path.is_file():
        raise DataError(f"{run_folder}: no recipe.json in it, so no run was begun here; name the recipe's out folder")
    try:
        return RecipeConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {key}: {first['msg']}; this version did not write it") from error


def phase_stages(run_folder: Path, phase: Phase) -> list[Stage]:
    """Return the stages that a phase goes through, in order."""
    names: list[str] = [phase.source]
    names += ["score"] if phase.is_scored else []
    names += ["select", "pack", "train"]
    names += ["evaluate"] if phase.evaluate.prompts is not None else []
    return [Stage(phase.name, name, run_folder / phase.name / name) for name in names]


def all_stages(run_folder: Path, recipe: RecipeConfig) -> list[Stage]:
    """Return every stage of a run, the evaluation before it included."""
    stages = [stage for phase in recipe.phase for stage in phase_stages(run_folder, phase)]
    if recipe.phase[0].evaluate.prompts is not None:
        stages.insert(0, Stage("base", "evaluate", run_folder / "base" / "evaluate"))
    return stages


# --- accuracy ---------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Sums over the answers to some questions."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    unparseable: int = 0
    truncated: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on some questions; the standard error is over questions, whose samples are not independent."""

    questions: int
    samples: int
    mean: float
    error: float
    truncated: float
    unparseable: float
    tokens: float
    by_question: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """One model's accuracy: before distillation, or after a phase."""

    name: str
    overall: Accuracy
    domains: Mapping[str, Accuracy]


@dataclass(frozen=True)
class AccuracyChange:
    """A difference of two accuracies and its standard error."""

    difference: float
    error: float

    @property
    def in_errors(self) -> float | None:
        """The difference in standard errors; None where the error is not known or nothing varied."""
        return self.difference / self.error if self.error > 0 else None


def evaluation(folder: Path, name: str) -> Evaluation:
    """Add up the graded answers of one evaluation."""
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    for batch in batches(folder, "graded", ("prompt_uid", "domain", "grade", "finish_reason", "num_tokens")):
        for row in batch.to_pylist():
            tally = tallies[row["domain"]]
            tally.right[row["prompt_uid"]] += row["grade"] == "right"
            tally.asked[row["prompt_uid"]] += 1
            tally.unparseable += row["grade"] == "unparseable"
            tally.truncated += row["finish_reason"] == "length"
            tally.tokens += row["num_tokens"]
    if not tallies:
        raise DataError(f"{folder}: no graded answer in it")
    domains = {domain: _accuracy([tally]) for domain, tally in sorted(tallies.items())}
    return Evaluation(name, _accuracy(list(tallies.values())), domains)


def _accuracy(tallies: list[_Tally]) -> Accuracy:
    by_question = {uid: t.right[uid] / asked for t in tallies for uid, asked in t.asked.items()}
    samples = sum(sum(t.asked.values()) for t in tallies)
    means = np.fromiter(by_question.values(), dtype=np.float64)
    return Accuracy(
        questions=len(means),
        samples=samples,
        mean=float(means.mean()),
        error=standard_error(means),
        truncated=sum(t.truncated for t in tallies) / samples,
        unparseable=sum(t.unparseable for t in tallies) / samples,
        tokens=sum(t.tokens for t in tallies) / samples,
        by_question=by_question,
    )


def standard_error(values: npt.NDArray[np.float64]) -> float:
    """Return the standard error of a mean; NaN for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")


def change(before: Accuracy, after: Accuracy) -> AccuracyChange:
    """Compare two accuracies: question by question when they answered the same ones, which is sharper."""
    difference = after.mean - before.mean
    if before.by_question.keys() == after.by_question.keys():
        pairs = np.array([after.by_question[uid] - mean for uid, mean in before.by_question.items()])
        return AccuracyChange(difference, standard_error(pairs))
    return AccuracyChange(difference, math.hypot(before.error, after.error))


def evaluations(stages: list[Stage]) -> list[Evaluation]:
    """Read every finished evaluation, in order; the one before distillation is called `before`."""
    found = [s for s in stages if s.name == "evaluate" and s.finished]
    return [evaluation(s.folder, "before" if s.phase == "base" else s.phase) for s in found]


# --- training ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One phase's training, thinned to what a figure can show."""

    phase: str
    steps: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]
    learning_rate: npt.NDArray[np.float64]
    num_steps: int
    first_loss: float  # mean of the first tenth of the steps
    last_loss: float
    max_grad_norm: float


def curve(stage: Stage) -> Curve | None:
    """Read a phase's metrics, also of a training under way; None where there are none."""
    path = stage.folder / "metrics.jsonl"
    rows = np.array(list(_metric_rows(path)), dtype=np.float64).reshape(-1, 4) if path.exists() else np.empty((0, 4))
    if not len(rows):
        return None
    steps, loss, rate, norm = rows.T
    tenth = max(len(rows) // 10, 1)
    spans = np.array_split(np.arange(len(rows)), min(len(rows), _CURVE_POINTS))

    def thin(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.array([values[span].mean() for span in spans])

    return Curve(
        phase=stage.phase,
        steps=thin(steps),
        loss=thin(loss),
        learning_rate=thin(rate),
        num_steps=len(rows),
        first_loss=float(loss[:tenth].mean()),
        last_loss=float(loss[-tenth:].mean()),
        max_grad_norm=float(norm.max()),
    )


def _metric_rows(path: Path) -> Iterator[tuple[float, float, float, float]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):  # a training under way is writing it
                return
            row = parse_metrics(path, number, line)
            yield row["step"], row["loss"], row["learning_rate"], row["grad_norm"]


# --- where it came from -----------------------------------------------------------------------------


def packages(stages: list[Stage]) -> dict[str, str]:
    """Return the versions that the stages ran with; where two runs differ, both."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for stage in stages:
        if stage.finished:
            for name, version in stage.manifest().get("packages", {}).items():
                found[name][version] = None
    return {name: " and ".join(versions) for name, versions in found.items()}
