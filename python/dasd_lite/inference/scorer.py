"""One protocol for whatever reads given token ids: a model in this process, in vLLM or behind a server.

Input: sequences of token ids. Output: the log-probability of each token given those before it and, where
the engine counts so, its rank; sequences come back in any order. Invariant: both are of the raw model at
temperature 1, or the scorer raises; nothing is ever filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import Ids
from dasd_lite.config.models import EndpointModel, TransformersModel, VllmModel
from dasd_lite.data.hub import model_folder
from dasd_lite.errors import ConfigError

if TYPE_CHECKING:
    from dasd_lite.data.usage import Usage

    Scores = tuple[int, npt.NDArray[np.float32], npt.NDArray[np.int64] | None]

_WINDOW = 16  # passes whose sequences are sorted by length together


class Scorer(Protocol):
    """Something that reads answers."""

    def score(self, sequences: Iterable[tuple[int, Ids]]) -> Iterator[Scores]:
        """Read each sequence, a position and ids [T]; none is longer than the model's context.

        Yields position, log-probabilities float32 [T] with NaN for the first token, and ranks int64 [T] with 0 for
        the first: 1 + the number of tokens with strictly higher probability, or None where the engine does not tell.
        """
        ...

    def status(self) -> str:
        """Say in a few words what goes on inside: servers, engines; "" when there is nothing to say."""
        ...

    def close(self) -> None:
        """Free the model or the connections."""
        ...


def open_scorer(
    model: TransformersModel | VllmModel | EndpointModel,
    *,
    folder: Path | None = None,
    batch_tokens: int = 8192,
    chunk_tokens: int | None = None,
    four_bit: bool = False,
    used: Usage | None = None,
) -> tuple[Scorer, Chat]:
    """Open what reads for `model`, and the tokenizer whose ids it reads.

    `folder` stands in for the model's weights; the next three are for transformers alone, as in ScoreConfig. `spent` is
    what counts against an endpoint's budget already.
    """
    if model.kind == "endpoint":
        from dasd_lite.inference.endpoint.sampler import EndpointSampler

        server = EndpointSampler(model, used)
        if server.chat is None:
            raise ConfigError(
                "score.by = 'teacher' needs teacher.tokenizer: a server reads a given answer by its token ids"
            )
        return server, server.chat
    if model.kind == "vllm":
        from dasd_lite.inference.vllm.sampler import VllmSampler

        engine = VllmSampler(model, folder, scoring=True)
        return engine, engine.chat
    scorer = TransformersScorer(model, folder, batch_tokens=batch_tokens, chunk_tokens=chunk_tokens, four_bit=four_bit)
    return scorer, scorer.chat


def context_of(model: TransformersModel | VllmModel | EndpointModel, chat: Chat) -> int:
    """Return the longest sequence that `model` can read, in tokens."""
    if model.kind == "endpoint":
        from dasd_lite.inference.endpoint.sampler import served_context

        # Servers want room for a token of an answer.
        return min(chat.context, served_context(model) or chat.context) - 1
    limit = model.max_model_len if model.kind == "vllm" else None
    return min(chat.context, limit or chat.context)


class TransformersScorer:
    """A model in this process that reads packed rows of sequences."""

    def __init__(
        self,
        config: TransformersModel,
        folder: Path | None = None,
        *,
        batch_tokens: int,
        chunk_tokens: int | None = None,
        four_bit: bool = False,
    ) -> None:
        """Load the model that `config` names, or the weights in `folder` in its place."""
        from dasd_lite.model.load import load_model

        path = folder or model_folder(config.model, weights=True)
        self.chat = Chat(path)
        self._batch_tokens, self._chunk_tokens = batch_tokens, chunk_tokens
        self._model: Any = load_model(
            path, dtype=config.dtype, trust_remote_code=config.trust_remote_code, four_bit=four_bit
        )
        self._checked = False

    def score(self, sequences: Iterable[tuple[int, Ids]]) -> Iterator[Scores]:
        """Read each sequence; raises TrainError when packed ones would leak into each other.

        They are sorted by length within a window: a pass over sequences of like length is full, and its attention
        has little padding.
        """
        window: list[tuple[int, Ids]] = []
        size = 0
        for position, ids in sequences:
            window.append((position, ids))
            size += len(ids)
            if size >= _WINDOW * self._batch_tokens:
                yield from self._score_window(window)
                window, size = [], 0
        yield from self._score_window(window)

    def _score_window(self, window: list[tuple[int, Ids]]) -> Iterator[Scores]:
        from dasd_lite.model.logprobs import target_scores
        from dasd_lite.model.packed_check import check_packing

        if window and not self._checked:
            check_packing(self._model, [ids for _, ids in window])
            self._checked = True
        for group in _groups(sorted(window, key=lambda pair: -len(pair[1])), self._batch_tokens):
            lengths = np.array([len(ids) for _, ids in group])
            row = np.concatenate([ids for _, ids in group])
            found = target_scores(self._model, row, lengths, self._chunk_tokens)
            edges = np.cumsum(lengths)[:-1]
            for (position, _), logprobs, ranks in zip(group, *(np.split(x, edges) for x in found), strict=True):
                yield position, logprobs, ranks

    def status(self) -> str:
        """Have nothing to say."""
        return ""

    def close(self) -> None:
        """Free the model, and on a GPU give its memory back: another engine may come next."""
        import gc

        import torch

        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _groups(window: Sequence[tuple[int, Ids]], batch_tokens: int) -> Iterator[list[tuple[int, Ids]]]:
    """Split into groups of together at most `batch_tokens`; a longer sequence goes alone."""
    group: list[tuple[int, Ids]] = []
    size = 0
    for pair in window:
        if group and size + len(pair[1]) > batch_tokens:
            yield group
            group, size = [], 0
        group.append(pair)
        size += len(pair[1])
    if group:
        yield group
