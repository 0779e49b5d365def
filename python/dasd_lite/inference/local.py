"""Sample with transformers in this process: batches with a key-value cache, from which finished answers leave.

Input: requests; output: completions as they finish. Invariant: the tokens of a request depend only on its seed and its
own logits (one uniform number per token, inverse of the cumulative distribution), so batch size, order and restarts
change an answer by rounding at most.
Shapes: B requests in the batch, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import TokenIds
from dasd_lite.data.hub import model_folder
from dasd_lite.errors import DataError
from dasd_lite.inference import Completion, Request, SamplingParams
from dasd_lite.model.load import load_model
from dasd_lite.model.memory import free_gpu

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

    from dasd_lite.config.models import Transformers

GROUPED = "dasd_grouped"
_WINDOW = 16  # batches whose prompts are sorted by length together: little padding, and results stay nearly in order
_COMPACT_AT = 0.75  # share of a batch still generating at which finished answers are removed from it


class TransformersSampler:
    """Batched generation with a Hugging Face model."""

    def __init__(
        self,
        config: Transformers,
        folder: Path | None = None,
        model: PreTrainedModel | None = None,
        broadcast: Callable[[Tensor], Tensor] | None = None,
        *,
        four_bit: bool = False,
    ) -> None:
        """Load the model, unless one is given.

        Args:
            config: The model, its dtype and the batch size.
            folder: Tokenizer and weights to load in place of the model's own.
            model: A loaded model to sample from as it is.
            broadcast: Replaces the drawn tokens int64 [B] by those of the first process, if several processes share
                the weights.
            four_bit: Load the weights in 4 bits (NF4).
        """
        import torch

        register_attention()
        self._config = config
        path = folder or model_folder(config.model, weights=True)
        self._chat = Chat(path)
        # Tensors created in inference mode could not be used in training afterwards.
        self._mode = torch.inference_mode if model is None else torch.no_grad
        self._model = model or load_model(
            path,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            attention=GROUPED,
            four_bit=four_bit,
        )
        self._context = self._chat.context
        self._broadcast: Callable[[Tensor], Tensor] = broadcast or (lambda drawn: drawn)

    def status(self) -> str:
        """No status to report."""
        return ""

    def close(self) -> None:
        """Free the model and its GPU memory, which another engine may need next."""
        self._model = None
        free_gpu()

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once; raises DataError if a prompt leaves no room in the context."""
        for request in {(id(r.messages), r.prefix): r for r in requests}.values():
            self._prompt_ids(request)  # check all prompts first: no error after hours of sampling
        size = self._config.batch_size
        for start in range(0, len(requests), size * _WINDOW):
            window = [(r, self._prompt_ids(r)) for r in requests[start : start + size * _WINDOW]]
            window.sort(key=lambda pair: len(pair[1]))
            for first in range(0, len(window), size):
                yield from self._complete_batch(window[first : first + size], params)

    def _prompt_ids(self, request: Request) -> TokenIds:
        ids = self._chat.prompt_ids(request.messages, request.prefix)
        if len(ids) >= self._context:
            raise DataError(
                f"prompt {request.messages[-1]['content'][:40]!r}: its {len(ids)} tokens exceed the context of"
                f" {self._config.model}, {self._context} tokens; shorten or remove the prompt"
            )
        return ids

    def _complete_batch(self, batch: list[tuple[Request, TokenIds]], params: SamplingParams) -> Iterator[Completion]:
        """Sample one batch; a row is finished at its end token or its limit."""
        import torch
        from transformers import DynamicCache

        device = self._model.device
        width = max(len(ids) for _, ids in batch)
        limits = [min(r.max_tokens, self._context - len(ids)) for r, ids in batch]
        ids_BT, mask_BT = _left_padded([ids for _, ids in batch], width, max(limits))
        step_ids = torch.from_numpy(ids_BT).to(device)
        mask = torch.from_numpy(mask_BT).to(device)
        positions = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
        uniforms = torch.from_numpy(
            np.stack([np.random.Generator(np.random.Philox(r.seed)).random(max(limits)) for r, _ in batch])
        ).to(device)
        limit = torch.tensor(limits, device=device)
        stop = torch.tensor(self._chat.answer_end_ids, device=device)
        cache = DynamicCache(config=self._model.config)
        rows = torch.arange(len(batch), device=device)  # which request each row of the batch is
        alive = torch.ones(len(batch), dtype=torch.bool, device=device)
        tokens = torch.zeros((len(batch), max(limits)), dtype=torch.int32, device=device)
        logprobs = torch.zeros((len(batch), max(limits)), dtype=torch.float32, device=device)

        for step in range(max(limits)):
            with self._mode():
                logits_BV = self._model(
                    input_ids=step_ids,
                    attention_mask=mask[:, : width + step],
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
                drawn, logprob = _draw(logits_BV.float(), uniforms[rows, step], params, self._chat.vocab_size)
                drawn = self._broadcast(drawn)  # processes that share the weights must continue with the same tokens
                tokens[rows, step], logprobs[rows, step] = drawn.int(), logprob
            ended = torch.isin(drawn, stop)
            done = alive & (ended | (step + 1 >= limit[rows]))
            for row in done.nonzero().flatten().tolist():
                request, prompt = batch[int(rows[row])]
                sampled = tokens[rows[row]][: step + 1], logprobs[rows[row]][: step + 1]
                yield self._completion(request, len(prompt), *sampled, bool(ended[row]))
            alive &= ~done
            num_alive = int(alive.sum())
            if num_alive == 0:
                return
            step_ids, positions = drawn[:, None], positions[:, -1:] + 1
            if num_alive <= _COMPACT_AT * len(rows):
                keep = alive.nonzero().flatten()
                cache.batch_select_indices(keep)
                step_ids, positions, mask, rows, alive = (x[keep] for x in (step_ids, positions, mask, rows, alive))

    def _completion(
        self, request: Request, prompt_tokens: int, tokens: Tensor, logprobs: Tensor, ended: bool
    ) -> Completion:
        ids = tokens.cpu().numpy()
        ending = "stop" if ended else "length"
        text, token_bytes, finish_reason = self._chat.decode_answer(ids.tolist(), ending, request.prefix)
        return Completion(
            position=request.position,
            text=text,
            token_ids=ids,
            logprobs=logprobs.cpu().numpy(),
            token_bytes=token_bytes,
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
        )


def register_attention() -> None:
    """Register grouped-query attention that does not copy the keys for each query head.

    With one new token per answer, the heads that share a key are laid along the query axis: 8 × faster on a CPU than
    the copy that transformers makes if there is a mask.
    """
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        batch, heads, length, dim = query.shape
        if length > 1 or any(kwargs.get(name) is not None for name in ("s_aux", "softcap", "position_bias")):
            output: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
            return output
        grouped = query.view(batch, key.shape[1], heads // key.shape[1], dim)
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(batch, 1, heads, -1), None

    AttentionInterface.register(GROUPED, attend)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)


def _left_padded(prompts: list[TokenIds], width: int, room: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return ids int64 [B, width] and a mask int64 [B, width + room], zeros before each prompt."""
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.ones((len(prompts), width + room), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, : width - len(prompt)] = 0
    return ids, mask


def _draw(logits_BV: Tensor, uniform_B: Tensor, params: SamplingParams, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Draw one token per row; return its id [B] and its log-probability [B] at temperature 1 over all of V.

    Padding rows of the embedding (ids from `vocab_size` on) are never drawn. Filters apply in vLLM's order:
    temperature, min_p, top_k, top_p (v1/sample/sampler.py).
    """
    import torch

    raw_BV = logits_BV.log_softmax(-1)
    logits_BV = logits_BV[:, :vocab_size]
    if params.temperature == 0:
        drawn = logits_BV.argmax(-1)
    else:
        probs = (logits_BV / params.temperature).softmax(-1)
        if params.min_p:
            probs = probs.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), 0.0)
        if params.top_k and params.top_k < probs.shape[-1]:
            smallest = probs.topk(params.top_k, dim=-1).values[:, -1:]
            probs = probs.masked_fill(probs < smallest, 0.0)
        if params.top_p < 1:
            ordered, order = probs.sort(dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # so the token that crosses top_p is kept
            ordered = ordered.masked_fill(before > params.top_p * ordered.sum(-1, keepdim=True), 0.0)
            probs = torch.zeros_like(probs).scatter(-1, order, ordered)
        cumulative = probs.double().cumsum(-1)
        target = uniform_B[:, None].double() * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)
    return drawn, raw_BV.gather(-1, drawn[:, None]).squeeze(-1)
