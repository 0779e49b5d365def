"""Snapshots of the student during training: its answers to a few questions, so that a collapse is noticed early.

Input: the model in training and questions with answers. Output: a `Snapshot`. The answers are greedy and short, so they
do not measure quality (evaluate does). They reveal a student whose output collapsed: its answers are no longer right,
or it repeats itself without end. Answers that reach the length limit are counted separately, because a student that
learns to think at length has not collapsed. Invariant: a snapshot leaves the model as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dasd_lite.config.models import Transformers
from dasd_lite.data.files import write_atomic
from dasd_lite.data.records import Prompt
from dasd_lite.inference import Request, SamplingParams
from dasd_lite.inference.local import TransformersSampler
from dasd_lite.method.sentences import repeated_ngrams
from dasd_lite.model.architecture import architecture_of
from dasd_lite.model.decode import decoding_attention
from dasd_lite.model.logprobs import causal_model

if TYPE_CHECKING:
    from torch import Tensor

    from dasd_lite.grading.grade import Grader
    from dasd_lite.model.logprobs import LanguageModel

_NGRAM = 20
_LOOPS = 0.5  # an answer repeats itself if more than this share of its 20-grams occurred in it before
_MIN_FINISHED = 6  # finished answers, before and now, that allow a conclusion


@dataclass(frozen=True)
class Snapshot:
    """How the student answered the questions after some steps.

    Attributes:
        step: Finished optimizer steps.
        questions: How many were asked.
        finished: Answers that ended with an end token.
        right: Finished answers that are right.
        looping: Answers, finished or not, that repeat themselves.
        mean_tokens: Mean length of all answers.
    """

    step: int
    questions: int
    finished: int
    right: int
    looping: int
    mean_tokens: float


def take_snapshot(
    model: LanguageModel,
    folder: Path,
    questions: Sequence[Prompt],
    step: int,
    *,
    grader: Grader,
    max_tokens: int,
    batch_size: int = 16,
    broadcast: Callable[[Tensor], Tensor] | None = None,
) -> Snapshot:
    """Let the model answer questions; all processes that share its weights have to call it.

    Args:
        model: In training.
        folder: Where its tokenizer is.
        questions: With answers.
        step: Finished optimizer steps.
        grader: Decides which answers are right.
        max_tokens: Longest answer.
        batch_size: Questions answered at the same time.
        broadcast: Makes the drawn tokens of all processes those of the first one; None: there is one process.
    """
    causal = causal_model(model)
    packed, training = causal.config._attn_implementation, causal.training
    sampler = TransformersSampler(Transformers(model=str(folder), batch_size=batch_size), folder, causal, broadcast)
    requests = [Request(i, prompt.messages, max_tokens, i) for i, prompt in enumerate(questions)]
    causal.set_attn_implementation(decoding_attention(architecture_of(causal.config)))
    model.eval()
    try:
        answers = list(sampler.complete(requests, SamplingParams(temperature=0.0)))
    finally:
        causal.set_attn_implementation(packed)
        model.train(training)
    finished = [answer for answer in answers if answer.finish_reason == "stop"]
    right = [a for a in finished if grader(a.text, questions[a.position].answer or "").verdict == "right"]
    lengths = np.array([len(answer.token_ids) for answer in answers], dtype=np.int64)
    token_ids = np.concatenate([answer.token_ids for answer in answers]).astype(np.int32)
    repeats = repeated_ngrams(token_ids, np.append(0, lengths.cumsum()), _NGRAM).num_repeated
    looping = repeats > _LOOPS * np.maximum(lengths - _NGRAM + 1, 1)
    return Snapshot(step, len(answers), len(finished), len(right), int(looping.sum()), float(lengths.mean()))


def has_collapsed(before: Snapshot, now: Snapshot) -> str | None:
    """Return the evidence of a collapse since before training; None if there is none, or too few answers finished."""
    if now.looping > now.questions / 2 and before.looping <= now.questions / 4:
        return (
            f"{now.looping} of {now.questions} answers repeat themselves without end ({before.looping} before training)"
        )
    enough = min(before.finished, now.finished, before.right) >= _MIN_FINISHED
    if enough and now.right / now.finished < 0.5 * before.right / before.finished:
        return (
            f"{now.right} of {now.finished} finished answers are right ({before.right} of {before.finished} before"
            " training)"
        )
    return None


def append_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Add a snapshot to the file, in the order of steps."""
    snapshots = {**read_snapshots(path), snapshot.step: snapshot}
    write_atomic(path, "".join(json.dumps(asdict(each)) + "\n" for _, each in sorted(snapshots.items())))


def read_snapshots(path: Path) -> dict[int, Snapshot]:
    """Return the snapshots in the file, by step; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {each.step: each for each in (Snapshot(**json.loads(line)) for line in lines)}
