"""How good the teacher's answers are at each temperature: right answers, repetition, cut-offs.

Input: folders that select wrote from sampled answers. Output: shares, and a line of advice. The advice rests on a
testbed (docs/evidence.md): training on answers at T = 1 gained over training on those at T = 0.6 by as much as the
teacher is worse at T = 0.6.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dasd_lite.data.dataset import batches
from dasd_lite.data.manifest import read_manifest
from dasd_lite.grading.grade import UNDECIDED
from dasd_lite.grading.statistics import standard_error, t_quantile

_FEW = 10  # questions, on which equal figures say nothing
_HARDLY = 0.1  # share of right answers, below which equal figures say nothing
_MARGIN = 5.0  # points, within which the teacher counts as not worse


@dataclass
class TeacherAt:
    """The teacher's answers at one temperature.

    Attributes:
        temperature: At which they were sampled.
        answers: How many there are.
        repeating: Those that repeat themselves, by the limits of select.
        cut_off: Those that reached the length limit.
        undecided: Those that could not be compared with the reference; they are not among `right`.
        right: Of each question with a reference answer, whether each answer is right.
    """

    temperature: float
    answers: int = 0
    repeating: int = 0
    cut_off: int = 0
    undecided: int = 0
    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))

    @property
    def graded(self) -> int:
        """Answers that were compared with a reference answer."""
        return sum(map(len, self.right.values()))

    @property
    def means(self) -> dict[str, float]:
        """Share of right answers to each question."""
        return {uid: sum(right) / len(right) for uid, right in self.right.items()}

    def add(self, select: Path) -> None:
        """Add the candidates of a phase, kept and rejected."""
        counts = read_manifest(select)["counts"]
        self.answers += counts["rollouts"]
        self.repeating += counts["repeating"]
        for table in ("kept", "rejected"):
            for batch in batches(select, table, ("prompt_uid", "grade", "finish_reason")):
                self.cut_off += batch["finish_reason"].to_pylist().count("length")
                for uid, grade in zip(batch["prompt_uid"].to_pylist(), batch["grade"].to_pylist(), strict=True):
                    if grade in UNDECIDED:
                        self.undecided += 1
                    elif grade is not None:
                        self.right[uid].append(grade == "right")


def by_temperature(folders: Iterable[tuple[float, Path]]) -> list[TeacherAt]:
    """Return what the folders of select show, for each temperature at which the teacher was sampled."""
    found: dict[float, TeacherAt] = {}
    for temperature, select in folders:
        found.setdefault(temperature, TeacherAt(temperature)).add(select)
    return [found[temperature] for temperature in sorted(found)]


def teacher_lines(teachers: Sequence[TeacherAt]) -> list[str]:
    """Return a line for each temperature, and one of advice if it can be given."""
    lines = []
    for each in teachers:
        parts = [f"{each.answers:,} answers"]
        if each.graded:
            means = np.array(list(each.means.values()))
            error = standard_error(means)
            around = "" if np.isnan(error) else f" ± {100 * error:.1f}"
            parts.append(f"right {100 * means.mean():.1f}{around}% (standard error over {len(means):,} questions)")
        parts += [f"{each.undecided:,} not comparable"] if each.undecided else []
        parts.append(f"repeating {each.repeating / each.answers:.1%}")
        parts.append(f"cut off {each.cut_off / each.answers:.1%}")
        lines.append(f"teacher at T = {each.temperature:g}: {', '.join(parts)}")
    return [*lines, *([line] if (line := advice(teachers)) else [])]


def advice(teachers: Sequence[TeacherAt]) -> str | None:
    """Say what the lowest and the highest temperature promise; None where no question was graded at both.

    The teacher is called worse at the low temperature if the whole interval of the difference (95%, Student's t, paired
    by question) says so, and not worse if none of it goes beyond a few points.
    """
    if len(teachers) < 2:
        return None
    low, high = teachers[0], teachers[-1]
    shared = [uid for uid in low.means if uid in high.means]
    if len(shared) < 2:
        return None
    if max(np.mean([own.means[uid] for uid in shared]) for own in (low, high)) < _HARDLY:
        return None  # it is hardly ever right at any temperature: another warning says so
    gains = 100 * np.array([high.means[uid] - low.means[uid] for uid in shared])
    difference, error = gains.mean(), standard_error(gains)
    half = t_quantile(0.95, len(shared) - 1) * error
    measured = f"{difference:+.1f} ± {error:.1f} points, standard error over {len(shared):,} questions"
    measured = measured.replace("-", "−")
    at_low, at_high = f"T = {low.temperature:g}", f"T = {high.temperature:g}"
    if difference - half > 0:
        return (
            f"the teacher is right less often at {at_low} than at {at_high} ({measured}); where this was so in our"
            " tests, training on the hotter answers gained 5.4 ± 1.4 points (standard error over 5 seeds,"
            " docs/evidence.md)"
        )
    if len(shared) < _FEW or difference + half > _MARGIN:
        return (
            f"whether the teacher is worse at {at_low} than at {at_high} cannot be told ({measured}); more questions"
            " tell more (prompts.trial)"
        )
    return (
        f"the teacher is not worse at {at_low} than at {at_high} ({measured}); where this was so in our tests, training"
        " on the hotter answers lost 2.9 ± 1.5 points (standard error over 5 seeds, docs/evidence.md)"
    )
