"""The teacher's answers graded, where their questions have reference answers.

Input: a folder of rollouts. Output: one verdict each, in their order, or None. Invariant: an answer that was cut off
has no answer, as in an evaluation.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasd_lite.console import progress
from dasd_lite.data.dataset import batches, num_rows
from dasd_lite.grading import CheckedGrader, grade_all, grader_kind
from dasd_lite.grading.grade import Verdict

REASONS = ("wrong answer", "no reference answer", "cannot be compared")
"""Why select.require_right rejects an answer; no number decides it."""

WRONG: tuple[Verdict, ...] = ("wrong", "no_answer")
"""Verdicts that say that an answer is not right; the others that it cannot be told."""


@dataclass(frozen=True)
class Verdicts:
    """A verdict for each rollout; None where the question has no reference, or its programs were not run."""

    of: Sequence[Verdict | None]
    prompts: Sequence[str]
    """The question of each."""

    def counts(self) -> dict[str, Any]:
        """Return what a manifest says: how many have each verdict, and on how many questions one was right.

        A question without a right answer counts only if all answers to it are known to be wrong.
        """
        by_prompt: dict[str, set[Verdict]] = defaultdict(set)
        for prompt, verdict in zip(self.prompts, self.of, strict=True):
            if verdict is not None:
                by_prompt[prompt].add(verdict)
        verdicts = Counter(verdict for verdict in self.of if verdict is not None)
        right = sum("right" in own for own in by_prompt.values())
        return {
            "graded": verdicts.total(),
            **dict(sorted(verdicts.items())),
            "questions": right + sum(own <= set(WRONG) for own in by_prompt.values()),
            "questions_right": right,
        }


def grade_rollouts(folder: Path, grade: CheckedGrader, *, programs: bool, label: str) -> Verdicts:
    """Grade the rollouts of a folder.

    Args:
        folder: Folder of rollouts.
        grade: The grader.
        programs: Run programs too, which takes a second each.
        label: Description in the progress bar.
    """
    found: list[Verdict | None] = []
    prompts: list[str] = []
    open_rows: deque[int] = deque()

    def pairs() -> Iterator[tuple[str, str]]:
        columns = ("prompt_uid", "answer", "finish_reason", "completion")
        for batch in batches(folder, "rollouts", columns):
            if batch["answer"].null_count == batch.num_rows:  # spares reading the texts
                found.extend([None] * batch.num_rows)
                prompts.extend(batch["prompt_uid"].to_pylist())
                continue
            for row in batch.to_pylist():
                answer, cut_off = row["answer"], row["finish_reason"] == "length"
                skipped = answer is None or (not programs and not grade.is_own and grader_kind(answer) == "code")
                found.append("no_answer" if cut_off and not skipped else None)
                prompts.append(row["prompt_uid"])
                if not skipped and not cut_off:
                    open_rows.append(len(found) - 1)
                    yield row["completion"], answer

    with progress(label, num_rows(folder, "rollouts"), "rollouts") as bar:
        for verdict in grade_all(grade, pairs()):
            found[open_rows.popleft()] = verdict.verdict
            bar.advance()
    return Verdicts(found, prompts)
