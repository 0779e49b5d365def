"""A look at the student while it trains: a few questions, so that a collapse is seen at once.

Input: the model under training and questions with answers. The answers are greedy and short, so this is no
measure of quality (that is evaluate); it tells a student that has come apart: what it answers is no longer right, or it
repeats itself without end. Answers still being written at the limit are counted apart, since a
student that learns to think at length is not one that has collapsed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dasd_lite.config.models import TransformersModel
from dasd_lite.data.files import write_atomic
from dasd_lite.data.records import Prompt
from dasd_lite.grading.math import grade
from dasd_lite.inference import Request, SamplingParams
from dasd_lite.inference.local import GROUPED, TransformersSampler
from dasd_lite.method.sentences import repeated_ngrams
from dasd_lite.model.logprobs import causal_model

_NGRAM = 20
_LOOPS = 0.5  # an answer with more than this share of its 20-grams seen before in it repeats itself
_ENOUGH = 6  # finished answers, before and now, from which something can be concluded


@dataclass(frozen=True)
class Snapshot:
    """What the student did with the questions after some steps."""

    step: int
    questions: int
    finished: int
    """Answers that ended by themselves."""
    right: int
    """Of those."""
    looping: int
    """Answers, finished or not, that repeat themselves."""
    mean_tokens: float

    def __str__(self) -> str:
        """Say it in a few words."""
        looping = f", {self.looping} repeat themselves" if self.looping else ""
        return (
            f"{self.right} of {self.finished} finished answers right ({self.questions} questions,"
            f" {self.mean_tokens:,.0f} tokens each{looping})"
        )


def take_snapshot(
    model: Any,
    folder: Path,
    questions: Sequence[Prompt],
    step: int,
    *,
    max_tokens: int,
    batch_size: int = 16,
    broadcast: Any = None,
) -> Snapshot:
    """Let the model answer; `folder` has its tokenizer. All processes that share its weights have to call it."""
    causal = causal_model(model)
    packed, training = causal.config._attn_implementation, causal.training
    sampler = TransformersSampler(
        TransformersModel(model=str(folder), batch_size=batch_size), folder, causal, broadcast
    )
    requests = [Request(i, prompt.messages, max_tokens, i) for i, prompt in enumerate(questions)]
    causal.set_attn_implementation(GROUPED)
    model.eval()
    try:
        found = list(sampler.complete(requests, SamplingParams(temperature=0.0)))
    finally:
        causal.set_attn_implementation(packed)
        model.train(training)
    finished = [c for c in found if c.finish_reason == "stop"]
    right = [c for c in finished if grade(c.text, questions[c.position].answer or "").verdict == "right"]
    lengths = np.array([len(c.token_ids) for c in found], dtype=np.int64)
    repeats, _ = repeated_ngrams(
        np.concatenate([c.token_ids for c in found]).astype(np.int32), np.append(0, lengths.cumsum()), _NGRAM
    )
    looping = repeats > _LOOPS * np.maximum(lengths - _NGRAM + 1, 1)
    return Snapshot(step, len(found), len(finished), len(right), int(looping.sum()), float(lengths.mean()))


def has_collapsed(before: Snapshot, now: Snapshot) -> str | None:
    """Say what has come apart since before training; None when nothing has, or nothing can be concluded."""
    if now.looping > now.questions / 2 and before.looping <= now.questions / 4:
        return (
            f"{now.looping} of {now.questions} answers repeat themselves without end, {before.looping} before training"
        )
    enough = min(before.finished, now.finished) >= _ENOUGH
    if enough and now.right / now.finished < 0.5 * before.right / before.finished and before.right >= _ENOUGH:
        was = f"{before.right} of {before.finished} before training"
        return f"{now.right} of {now.finished} finished answers are right, {was}"
    return None


def append_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Add a snapshot to the file, in the order of steps."""
    snapshots = {**read_snapshots(path), snapshot.step: snapshot}
    write_atomic(path, "".join(json.dumps(asdict(each)) + "\n" for _, each in sorted(snapshots.items())))


def read_snapshots(path: Path) -> dict[int, Snapshot]:
    """Return the snapshots in the file, by step; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {each.step: each for each in (Snapshot(**json.loads(line)) for line in lines)}
