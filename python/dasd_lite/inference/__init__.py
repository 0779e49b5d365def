"""The protocol of everything that generates text: a model in this process, in vLLM, behind a server, or your own class.

Input: requests, each with a conversation, the part of the answer that already exists, and a seed. Output: completions
in the order in which they finish. Invariant: `logprobs` are those of the raw model at temperature 1, one per sampled
token, or the sampler raises an error; missing values are never filled in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from dasd_lite.config.models import Endpoint, Transformers, Vllm
from dasd_lite.data.records import Message
from dasd_lite.data.seeds import digest
from dasd_lite.data.usage import Usage

if TYPE_CHECKING:
    from dasd_lite.config.models import CustomTeacher


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
    every rule can. With a method `score` (see `scorer.Scorer`) and an attribute `tokenizer`, the folder or hub id of
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


def source(model: Transformers | Vllm | Endpoint | CustomTeacher | Sampler) -> Path | str:
    """Return what identifies a model in fingerprints.

    This is its folder; behind an endpoint a hash of its name and, if known, its tokenizer and template; of a custom
    sampler a hash of its code and options. Every stage that uses the teacher calls this function, so two different
    teachers within one run are noticed.
    """
    from dasd_lite.chat.chat import Chat
    from dasd_lite.data.hub import model_folder

    if isinstance(model, Endpoint):
        return digest(model.model, Chat(model_folder(model.tokenizer)).fingerprint if model.tokenizer else "")
    if isinstance(model, Transformers | Vllm):
        return model_folder(model.model, weights=True)
    from dasd_lite.inference.custom import custom_source

    return custom_source(model)


def open_sampler(
    model: Transformers | Vllm | Endpoint | CustomTeacher | Sampler,
    folder: Path | None = None,
    used: Usage | None = None,
) -> Sampler:
    """Open the sampler for `model`.

    Args:
        model: The teacher or student table of a recipe, or a sampler, which is used as it is.
        folder: Weights to load in place of the model's own, such as a student after training.
        used: Tokens used so far, which count against an endpoint's budget.

    Raises:
        ConfigError: The options do not fit the machine, or a custom class cannot be used as a sampler.
    """
    if isinstance(model, Endpoint):
        from dasd_lite.inference.endpoint.sampler import EndpointSampler

        return EndpointSampler(model, used)
    if isinstance(model, Vllm):
        from dasd_lite.inference.vllm.sampler import VllmSampler

        return VllmSampler(model, folder)
    if isinstance(model, Transformers):
        from dasd_lite.inference.local import TransformersSampler

        return TransformersSampler(model, folder)
    from dasd_lite.inference.custom import open_custom

    return open_custom(model)
