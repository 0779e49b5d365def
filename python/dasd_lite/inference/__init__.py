"""The protocol of everything that generates text: a model in this process, in vLLM, behind a server, or your own class.

Input: requests, each with a conversation, the part of the answer that already exists, and a seed. Output: completions
in the order in which they finish. Invariant: `logprobs` are those of the raw model at temperature 1, one per sampled
token, or the sampler raises an error; missing values are never filled in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from dasd_lite.data.records import Message
from dasd_lite.data.seeds import digest
from dasd_lite.data.usage import Usage

if TYPE_CHECKING:
    from dasd_lite.config.models import EndpointModel, TransformersModel, VllmModel


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


@dataclass(frozen=True)
class Completion:
    """What was sampled for one request."""

    position: int
    text: str
    """The answer without the request's prefix and without end tokens."""
    token_ids: npt.NDArray[np.int32]
    """Sampled ids, the end token included; empty if the source does not report them."""
    logprobs: npt.NDArray[np.float32]
    """Natural logs at temperature 1, one per sampled token."""
    token_bytes: npt.NDArray[np.int32]
    """Length of each token in bytes of `text` (0 for the end token). Only a `<think>` that the template wrote may
    precede the bytes of the first token."""
    finish_reason: str
    """stop: the model ended its turn; length: it was cut off at max_tokens."""
    prompt_tokens: int = 0
    """Prompt tokens as the source counts them, 0 if it does not report them."""
    completion_tokens: int = 0
    """Generated tokens as the source counts and charges them, 0 if it does not report them."""


class Sampler(Protocol):
    """Something that generates answers."""

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Yield one completion per request, in any order, as they finish."""
        ...

    def status(self) -> str:
        """Return a few words for the progress line, such as the state of servers or engines; "" for nothing."""
        ...

    def close(self) -> None:
        """Free the model or the connections."""
        ...


def source(model: TransformersModel | VllmModel | EndpointModel) -> Path | str:
    """Return what identifies a model in fingerprints: its folder, or a hash for a model behind an endpoint.

    The hash covers its name and, if known, its tokenizer and template. Every stage that uses the teacher calls this
    function, so two different teachers within one run are noticed.
    """
    from dasd_lite.chat.chat import Chat
    from dasd_lite.data.hub import model_folder

    if model.kind == "endpoint":
        return digest(model.model, Chat(model_folder(model.tokenizer)).fingerprint if model.tokenizer else "")
    return model_folder(model.model, weights=True)


def open_sampler(
    model: TransformersModel | VllmModel | EndpointModel, folder: Path | None = None, used: Usage | None = None
) -> Sampler:
    """Open the sampler for `model`.

    Args:
        model: The teacher or student table of a recipe.
        folder: Weights to load in place of the model's own, such as a student after training.
        used: Tokens used so far, which count against an endpoint's budget.
    """
    if model.kind == "endpoint":
        from dasd_lite.inference.endpoint.sampler import EndpointSampler

        return EndpointSampler(model, used)
    if model.kind == "vllm":
        from dasd_lite.inference.vllm.sampler import VllmSampler

        return VllmSampler(model, folder)
    from dasd_lite.inference.local import TransformersSampler

    return TransformersSampler(model, folder)
