"""The protocols of whatever generates and scores text: a model in this process, in vLLM, behind a server, or your own.

Input: requests, each with a conversation, the part of the answer that already exists, and a seed. Output: completions
in the order in which they finish. Invariant: `logprobs` are those of the raw model at temperature 1, one per sampled
token, or the sampler raises an error; missing values are never filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dasd_lite.chat.spelling import TokenIds
from dasd_lite.data.records import Message


@dataclass(frozen=True)
class Request:
    """One answer to sample."""

    position: int
    """Position in the stage's plan; the completion carries it too."""
    messages: tuple[Message, ...]
    max_tokens: int
    seed: int
    prefix: str = ""
    """The part of the answer that already exists; the completion continues it."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


def _no_integers() -> npt.NDArray[np.int32]:
    return np.empty(0, dtype=np.int32)


def _no_logprobs() -> npt.NDArray[np.float32]:
    return np.empty(0, dtype=np.float32)


@dataclass(frozen=True)
class Completion:
    """What was sampled for one request."""

    position: int
    """The request's."""
    text: str
    """The answer without the request's prefix and without end tokens."""
    token_ids: npt.NDArray[np.int32] = field(default_factory=_no_integers)
    """Sampled ids, the end token included; empty if the source does not report them."""
    logprobs: npt.NDArray[np.float32] = field(default_factory=_no_logprobs)
    """Natural logs at temperature 1, one per sampled token; empty if the source has none."""
    token_bytes: npt.NDArray[np.int32] = field(default_factory=_no_integers)
    """Length of each token in bytes of `text` (0 for the end token), as many as `logprobs`. They sum to the length of
    `text`; only a `<think>` that the template wrote may come before the first token."""
    finish_reason: str = "stop"
    """stop: the model ended its turn; length: it was cut off at max_tokens."""
    prompt_tokens: int = 0
    """Prompt tokens as the source counts them, 0 if it does not report them."""
    completion_tokens: int = 0
    """Generated tokens as the source counts and charges them, 0 if it does not report them."""


class Sampler(Protocol):
    """Something that generates answers.

    Your own class needs these three methods. A recipe names it as `teacher = { kind = "my_teacher:Canned", options =
    { path = "answers.json" } }`; Python code can pass an instance in place of the teacher:

        class Canned:
            def __init__(self, path):
                self.answers = json.loads(Path(path).read_text())
            def complete(self, requests, params):
                for request in requests:
                    yield Completion(request.position, self.answers[request.messages[-1]["content"]])
            def status(self):
                return ""
            def close(self):
                pass

    These completions are text alone, which select.rule = "random" and "all" can use; with `logprobs` and `token_bytes`
    every rule can. With a method `score` (see `Scorer`) and an attribute `tokenizer`, the folder or hub id of
    its tokenizer, it also serves score.by = "teacher". The source of its file and its options are part of the
    fingerprint of what it makes; of an instance, the attribute `fingerprint` in place of the options, if it has one.
    """

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Yield one completion per request, in any order, each as soon as it is finished."""
        ...

    def status(self) -> str:
        """Return a few words for the progress line, such as the state of servers or engines; "" for nothing."""
        ...

    def close(self) -> None:
        """Free the model or the connections. Not called for an instance that Python code passed in."""
        ...


TokenScores = tuple[int, npt.NDArray[np.float32], npt.NDArray[np.int64] | None]
"""Position, log-probabilities and ranks of one sequence; see `Scorer.score`."""


class Scorer(Protocol):
    """Something that scores given answers."""

    def score(self, sequences: Iterable[tuple[int, TokenIds]]) -> Iterator[TokenScores]:
        """Score each sequence once.

        Args:
            sequences: Position, which is returned with the scores, and token ids [T] within the model's context.

        Yields:
            Position; log-probabilities float32 [T], NaN for the first token; ranks int64 [T], 0 for the first token.
            A rank is 1 + the number of tokens with strictly higher probability; None if the engine has no such ranks.
        """
        ...

    def status(self) -> str:
        """Return a few words for the progress line, such as the state of servers or engines; "" for nothing."""
        ...

    def close(self) -> None:
        """Free the model or the connections."""
        ...
