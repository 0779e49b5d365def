"""Look for the questions of the evaluations among the prompts that were trained on.

Input: the evaluate and select folders of a run. Output: pairs of texts that share much. Invariants: the texts are read
a batch at a time, so memory stays flat; the text of a hidden task is in no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasd_lite.data.dataset import batches
from dasd_lite.data.records import HIDDEN_TASKS, HIDDEN_TEXT
from dasd_lite.grading.contamination import Overlap, overlaps


@dataclass(frozen=True)
class AuditedPair:
    """A question of an evaluation and a training prompt that share much of their text."""

    task: str
    question: str
    """Its uid."""
    prompt: str
    """Uid of the training prompt."""
    overlap: Overlap
    texts: tuple[str, str]
    """Of the question and of the prompt; `HIDDEN_TEXT` for tasks whose text is not to be published."""


@dataclass(frozen=True)
class Audit:
    """What was compared, and what was found."""

    questions: Mapping[str, int]
    """Number of questions of each task."""
    prompts: int
    """Number of training prompts."""
    pairs: Sequence[AuditedPair]
    """The largest share first."""

    def flagged(self, task: str) -> int:
        """Number of questions of a task that count as known to the student."""
        return len({pair.question for pair in self.pairs if pair.task == task and pair.overlap.is_flagged})


def read_audit(evaluations: Sequence[Path], kept: Sequence[Path]) -> Audit | None:
    """Compare the questions of finished evaluations with the prompts of the answers that were kept.

    Returns:
        None without questions or without prompts.
    """
    questions: dict[tuple[str, str], str] = {}
    for folder in evaluations:
        for row in _rows(folder, "graded", ("task", "prompt_uid", "messages")):
            questions.setdefault((row["task"], row["prompt_uid"]), _asked(row))
    if not questions or not kept:
        return None
    uids: list[str] = []

    def prompts() -> Iterator[str]:
        for uid, text in _prompts(kept):
            uids.append(uid)
            yield text

    found = overlaps(list(questions.values()), prompts())
    if not uids:
        return None
    wanted = {uids[own.prompt] for own in found}
    texts = {uid: text for uid, text in _prompts(kept) if uid in wanted} if wanted else {}
    names, sizes = list(questions), dict[str, int]()
    for task, _ in names:
        sizes[task] = sizes.get(task, 0) + 1
    pairs = []
    for own in found:
        (task, question), prompt = names[own.question], uids[own.prompt]
        both = (HIDDEN_TEXT, HIDDEN_TEXT) if task in HIDDEN_TASKS else (questions[task, question], texts[prompt])
        pairs.append(AuditedPair(task, question, prompt, own, both))
    return Audit(sizes, len(uids), pairs)


def _prompts(kept: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield uid and text of each prompt once."""
    seen = set()
    for folder in kept:
        for row in _rows(folder, "kept", ("prompt_uid", "messages")):
            if row["prompt_uid"] not in seen:
                seen.add(row["prompt_uid"])
                yield row["prompt_uid"], _asked(row)


def _rows(folder: Path, table: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in batches(folder, table, columns, batch_size=1024):
        yield from batch.to_pylist()


def _asked(row: Mapping[str, Any]) -> str:
    """Return what the user says; a system message is the same for all."""
    return "\n".join(message["content"] for message in row["messages"] if message["role"] == "user")
