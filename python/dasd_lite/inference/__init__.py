"""One protocol for whatever writes text: teacher and student, in this process, in vLLM or behind a server.

Input: requests, each a conversation, what of the answer is there already, and a seed. Output:
completions in the order in which they finish. Invariant: `logprobs` are those of the raw model at
temperature 1, one per sampled token, or the sampler raises; nothing is ever filled in.
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
    """One answer to be sampled."""

    position: int
    """Place in the caller's plan, given back with the completion."""
    messages: tuple[Message, ...]
    max_tokens: int
    seed: int
    prefix: str = ""
    """What of the answer is written already; the completion is what follows it."""


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
    """Sampled ids, the end token included; empty when the source does not tell them."""
    logprobs: npt.NDArray[np.float32]
    """Natural logs at temperature 1, one per sampled token."""
    token_bytes: npt.NDArray[np.int32]
    """Length of each token in bytes of `text` (0 for the end token); what no token spells stands before them all."""
    finish_reason: str
    """stop: the model ended its turn; length: it was cut at max_tokens."""
    prompt_tokens: int = 0
    """Tokens read for this answer as their source counts them, 0 where it does not say."""
    completion_tokens: int = 0
    """Tokens written for it as their source counts and charges them; 0 where it does not say."""


class Sampler(Protocol):
    """Something that writes answers."""

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once; completions come as they finish, in any order."""
        ...

    def status(self) -> str:
        """Say in a few words what goes on inside: servers, engines; "" when there is nothing to say."""
        ...

    def close(self) -> None:
        """Free the model or the connections."""
        ...


def source(model: TransformersModel | VllmModel | EndpointModel) -> Path | str:
    """Return what stands for a model in fingerprints: its folder, or of one behind an endpoint a hash.

    The hash is of its name and, where they are known, its tokenizer and template. Every stage that asks the teacher
    uses this one, so that two teachers in one run are noticed.
    """
    from dasd_lite.chat.chat import Chat
    from dasd_lite.data.hub import model_folder

    if model.kind == "endpoint":
        return digest(model.model, Chat(model_folder(model.tokenizer)).fingerprint if model.tokenizer else "")
    return model_folder(model.model, weights=True)


def open_sampler(
    model: TransformersModel | VllmModel | EndpointModel, folder: Path | None = None, spent: Usage | None = None
) -> Sampler:
    """Open the sampler that `model` names; `folder` stands in for its weights (a student after training).

    `spent` is what was read and written before and counts against an endpoint's budget.
    """
    if model.kind == "endpoint":
        from dasd_lite.inference.endpoint.sampler import EndpointSampler

        return EndpointSampler(model, spent)
    if model.kind == "vllm":
        from dasd_lite.inference.vllm.sampler import VllmSampler

        return VllmSampler(model, folder)
    from dasd_lite.inference.local import TransformersSampler

    return TransformersSampler(model, folder)
