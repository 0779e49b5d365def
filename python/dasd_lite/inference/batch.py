"""Decoding a batch of answers with a transformers model: finished ones leave at once, and waiting ones join.

Input: prompts as token ids, each with a limit and a seed; output: their tokens, as they finish. Invariant: the tokens
of an answer depend only on its seed and its own logits (one uniform number per token), so batch size, order and
neighbors change an answer by rounding at most.
Shapes: B answers in the batch, U different prompts, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dasd_lite.chat.spelling import TokenIds
from dasd_lite.errors import TrainError
from dasd_lite.inference import SamplingParams
from dasd_lite.inference.draw import draw_tokens
from dasd_lite.model.decode import BatchCache

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Job:
    """One answer to generate."""

    index: int
    """Of its request."""
    prompt: TokenIds
    limit: int
    """Most tokens to generate."""
    seed: int


@dataclass(frozen=True)
class Answer:
    """A finished job."""

    job: Job
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    """At temperature 1 over the whole vocabulary."""
    ended: bool
    """By an end token, not by its limit."""


@dataclass(frozen=True)
class Decoder:
    """A model and what generating with it needs to know.

    Attributes:
        model: In eval mode, with the attention of `decoding_attention`.
        name: What error messages call it.
        end_ids: Tokens that end an answer.
        vocab_size: Ids from here on are padding of the embedding and never drawn.
        join_at: Share of a batch still generating at which waiting answers join it; with 0 they wait for its end.
        mode: Context without gradients.
        broadcast: Replaces the drawn tokens int64 [B] by those of the first process, if several share the weights.
    """

    model: PreTrainedModel
    name: str
    end_ids: Sequence[int]
    vocab_size: int
    join_at: float
    mode: Callable[[], AbstractContextManager[None]]
    broadcast: Callable[[Tensor], Tensor] | None = None


@dataclass
class _Row:
    """An answer in the batch."""

    job: Job
    slot: int
    """Where its uniform numbers and its tokens are stored."""
    start: int = 0
    """Positions of padding before its prompt."""
    num_tokens: int = 0


class Batch:
    """Answers that are generated together. All end at the same position; shorter ones have padding on the left."""

    def __init__(self, decoder: Decoder, params: SamplingParams, size: int) -> None:
        """Make an empty batch for at most `size` answers at the same time."""
        self.length = 0
        """Positions that the rows have in common, padding included."""
        self._decoder, self._params, self._size = decoder, params, size
        self._rows: list[_Row] = []

    def unfinished(self) -> list[Job]:
        """Return the jobs that were taken and have no answer yet."""
        return [row.job for row in self._rows]

    def run(self, waiting: deque[Job]) -> Iterator[Answer]:
        """Take jobs from `waiting` and yield their answers as they finish.

        Raises:
            TrainError: Logits are not finite.
        """
        with self._decoder.mode():
            self._allocate(min(self._size, len(waiting)), max(job.limit for job in waiting))
        while waiting or self._rows:
            with self._decoder.mode():
                answers = self._round(waiting)
            yield from answers

    def _round(self, waiting: deque[Job]) -> list[Answer]:
        """Read the prompts of jobs that join, or one token of each row; draw the next; return what is finished."""
        first = 0
        if waiting and len(self._rows) <= self._decoder.join_at * self._size:
            first = len(self._rows)
            logits_BV = self._join([waiting.popleft() for _ in range(min(len(waiting), self._size - first))])
        else:
            logits_BV = self._step()
        return self._leave(first, self._draw(first, logits_BV))

    def _allocate(self, num_slots: int, longest: int) -> None:
        import torch

        device = self._decoder.model.device
        self._free = list(range(num_slots))
        self._uniforms = torch.zeros((num_slots, longest), dtype=torch.float64, device=device)
        self._tokens = torch.zeros((num_slots, longest), dtype=torch.int32, device=device)
        self._logprobs = torch.zeros((num_slots, longest), dtype=torch.float32, device=device)
        self._end_ids = torch.tensor(list(self._decoder.end_ids), device=device)
        self._last = torch.zeros(0, dtype=torch.long, device=device)  # token of each row

    def _join(self, jobs: list[Job]) -> Tensor:
        """Add a row for each job, reading each different prompt once; return the logits [B, V] of the new rows."""
        import torch

        device, first = self._last.device, len(self._rows)
        self._rows += [_Row(job, self._free.pop()) for job in jobs]
        unique: dict[bytes, int] = {}
        index = [unique.setdefault(job.prompt.tobytes(), len(unique)) for job in jobs]
        prompts = [jobs[index.index(i)].prompt for i in range(len(unique))]
        ids_UT, mask_UT = (torch.from_numpy(array).to(device) for array in _left_padded(prompts))
        cache = BatchCache(self._decoder.model)
        logits_UV = self._forward(ids_UT, mask_UT, (mask_UT.cumsum(-1) - 1).clamp(min=0), cache)
        width = ids_UT.shape[1]
        if first == 0:
            cache.select(index)
            self._cache, self.length = cache, width
        else:
            self._cache.append(cache, index)
            self._pad(max(0, width - self.length))
        for row in self._rows[first:]:
            row.start = self.length - len(row.job.prompt)
            numbers = np.random.Generator(np.random.Philox(row.job.seed)).random(self._uniforms.shape[1])
            self._uniforms[row.slot] = torch.from_numpy(numbers)
        return logits_UV[torch.tensor(index, device=device)]

    def _step(self) -> Tensor:
        """Read the last token of each row; return the logits [B, V] of the next."""
        import torch

        if self._decoder.join_at and (padding := min(row.start for row in self._rows)):
            self._cache.trim(padding)  # of answers that have left
            self._pad(-padding)
        starts = torch.tensor([row.start for row in self._rows], device=self._last.device)[:, None]
        mask = None
        if self._cache.attends and any(row.start for row in self._rows):
            mask = (torch.arange(self.length + 1, device=starts.device) >= starts).long()
        logits_BV = self._forward(self._last[:, None], mask, self.length - starts, self._cache)
        self.length += 1
        return logits_BV

    def _pad(self, positions: int) -> None:
        """Add so many positions of padding before every row; a negative number takes them away."""
        self.length += positions
        for row in self._rows:
            row.start += positions

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: BatchCache) -> Tensor:
        """Return the logits [B, V] after the last of `ids`."""
        logits: Tensor = self._decoder.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache.keyword: cache},
        ).logits[:, -1]
        return logits.float()

    def _draw(self, first: int, logits_BV: Tensor) -> list[int]:
        """Draw the next token of the rows from `first` on; return which of them ended (1) or are not finite (2)."""
        import torch

        rows = self._rows[first:]
        where = torch.tensor([[row.slot, row.num_tokens] for row in rows], device=self._last.device).unbind(-1)
        drawn, logprob = draw_tokens(logits_BV, self._uniforms[where], self._params, self._decoder.vocab_size)
        if self._decoder.broadcast is not None:
            drawn = self._decoder.broadcast(drawn)  # all must continue with the same tokens
        self._tokens[where], self._logprobs[where] = drawn.int(), logprob
        self._last = torch.cat([self._last[:first], drawn])
        for row in rows:
            row.num_tokens += 1
        ended = (drawn[:, None] == self._end_ids).any(-1)
        states: list[int] = torch.where(logprob.isfinite(), ended.int(), 2).tolist()  # a step's only wait for the GPU
        return states

    def _leave(self, first: int, states: list[int]) -> list[Answer]:
        """Return the answers that are finished; other rows take their places."""
        rows = self._rows
        if 2 in states:
            raise TrainError(self._not_finite(rows[first + states.index(2)]))
        states = [0] * first + states
        done = {i for i, row in enumerate(rows) if states[i] or row.num_tokens >= row.job.limit}
        if not done:
            return []
        answers = [self._answer(rows[i], bool(states[i])) for i in sorted(done)]
        left = len(rows) - len(done)
        movers = (i for i in range(left, len(rows)) if i not in done)
        order = [next(movers) if i in done else i for i in range(left)]
        self._free += [rows[i].slot for i in done]
        self._rows = [rows[i] for i in order]
        self._last = self._last[order]
        if order:
            self._cache.select(order)
        return answers

    def _answer(self, row: _Row, ended: bool) -> Answer:
        tokens, logprobs = (each[row.slot, : row.num_tokens].cpu().numpy() for each in (self._tokens, self._logprobs))
        return Answer(row.job, tokens.copy(), logprobs.copy(), ended)  # copies, or they would change with the slot

    def _not_finite(self, row: _Row) -> str:
        import torch

        dtype = self._decoder.model.dtype
        cause = "are its weights whole?"
        if dtype == torch.float16:
            cause = "float16 overflowed: set dtype = 'float32', or 'bfloat16' where the GPU has it"
        return (
            f"{self._decoder.name}: the logits after {len(row.job.prompt)} prompt tokens and {row.num_tokens - 1} of"
            f" the answer are not finite; {cause}"
        )


def _left_padded(prompts: list[TokenIds]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return ids and mask int64 [U, T], zeros before each prompt."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask
