"""Scoring given token ids: from a model table to a scorer, and the scorer of a model in this process.

Input: sequences of token ids. Output: the log-probability of each token given those before it and, if the engine
counts it, its rank; sequences come back in any order. Invariant: both are the raw model's at temperature 1, or the
scorer raises an error; missing values are never filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import TokenIds
from dasd_lite.config.models import Endpoint, Teacher, Transformers, Vllm
from dasd_lite.data.hub import model_folder
from dasd_lite.errors import ConfigError
from dasd_lite.inference import Sampler, Scorer, TokenScores

if TYPE_CHECKING:
    from dasd_lite.data.usage import Usage

_WINDOW = 16  # forward passes whose sequences are sorted by length together


def open_scorer(
    model: Teacher | Sampler,
    *,
    folder: Path | None = None,
    batch_tokens: int = 8192,
    chunk_tokens: int | None = None,
    four_bit: bool = False,
    used: Usage | None = None,
) -> tuple[Scorer, Chat]:
    """Open the scorer for `model`.

    Args:
        model: The teacher or student table of a recipe, or a sampler that can also score.
        folder: Weights to load in place of the model's own.
        batch_tokens: Tokens of one forward pass (transformers only).
        chunk_tokens: Tokens whose logits exist at once (transformers only); None chooses by memory.
        four_bit: Load the weights in 4 bits (transformers only).
        used: Tokens used so far, which count against an endpoint's budget.

    Returns:
        The scorer, and the tokenizer whose ids it scores.

    Raises:
        ConfigError: The model cannot score given answers.
    """
    if isinstance(model, Endpoint):
        from dasd_lite.inference.endpoint.sampler import EndpointSampler

        server = EndpointSampler(model, used)
        if server.chat is None:
            raise ConfigError("score.by = 'teacher' needs teacher.tokenizer: servers score given answers by token ids")
        return server, server.chat
    if isinstance(model, Vllm):
        from dasd_lite.inference.vllm.sampler import VllmSampler

        engine = VllmSampler(model, folder, scoring=True)
        return engine, engine.chat
    if isinstance(model, Transformers):
        local = TransformersScorer(
            model, folder, batch_tokens=batch_tokens, chunk_tokens=chunk_tokens, four_bit=four_bit
        )
        return local, local.chat
    from dasd_lite.inference.custom import open_custom_scorer

    scorer, tokenizer = open_custom_scorer(model)
    return scorer, Chat(model_folder(tokenizer))


def context_of(model: Teacher | Sampler, chat: Chat) -> int:
    """Return the longest sequence that `model` can score, in tokens."""
    if isinstance(model, Endpoint):
        from dasd_lite.inference.endpoint.sampler import served_context

        # Servers need room to generate one token.
        return min(chat.context, served_context(model) or chat.context) - 1
    limit = model.max_model_len if isinstance(model, Vllm | Transformers) else None
    return min(chat.context, limit or chat.context)


class TransformersScorer:
    """A model in this process that scores sequences packed into rows."""

    def __init__(
        self,
        config: Transformers,
        folder: Path | None = None,
        *,
        batch_tokens: int,
        chunk_tokens: int | None = None,
        four_bit: bool = False,
    ) -> None:
        """Load the model of `config`, or the weights in `folder` in its place."""
        from dasd_lite.model.load import load_model

        path = folder or model_folder(config.model, weights=True)
        self.chat = Chat(path)
        self._batch_tokens, self._chunk_tokens = batch_tokens, chunk_tokens
        self._model = load_model(
            path,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            four_bit=four_bit,
            context=config.max_model_len,
        )
        self._checked = False

    def score(self, sequences: Iterable[tuple[int, TokenIds]]) -> Iterator[TokenScores]:
        """Score each sequence once; raises TrainError if packed sequences would attend to each other.

        Sequences are sorted by length within a window: a pass over sequences of similar length is full, and its
        attention has little padding.
        """
        window: list[tuple[int, TokenIds]] = []
        size = 0
        for position, ids in sequences:
            window.append((position, ids))
            size += len(ids)
            if size >= _WINDOW * self._batch_tokens:
                yield from self._score_window(window)
                window, size = [], 0
        yield from self._score_window(window)

    def _score_window(self, window: list[tuple[int, TokenIds]]) -> Iterator[TokenScores]:
        from dasd_lite.model.logprobs import target_scores
        from dasd_lite.model.packed_check import check_packing

        if window and not self._checked:
            check_packing(self._model, [ids for _, ids in window])
            self._checked = True
        for group in _groups(sorted(window, key=lambda pair: -len(pair[1])), self._batch_tokens):
            lengths = np.array([len(ids) for _, ids in group])
            row = np.concatenate([ids for _, ids in group])
            scores = target_scores(self._model, row, lengths, self._chunk_tokens)
            edges = np.cumsum(lengths)[:-1]
            for (position, _), logprobs, ranks in zip(group, *(np.split(x, edges) for x in scores), strict=True):
                yield position, logprobs, ranks

    def status(self) -> str:
        """No status to report."""
        return ""

    def close(self) -> None:
        """Free the model and its GPU memory, which another engine may need next."""
        from dasd_lite.model.memory import free_gpu

        self._model = None
        free_gpu()


def _groups(window: Sequence[tuple[int, TokenIds]], batch_tokens: int) -> Iterator[list[tuple[int, TokenIds]]]:
    """Split into groups of at most `batch_tokens` in total; a longer sequence is a group of its own."""
    group: list[tuple[int, TokenIds]] = []
    size = 0
    for pair in window:
        if group and size + len(pair[1]) > batch_tokens:
            yield group
            group, size = [], 0
        group.append(pair)
        size += len(pair[1])
    if group:
        yield group
