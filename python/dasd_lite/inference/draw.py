"""Drawing the next token of each answer of a batch from the model's logits.

Input: logits and one uniform number per row. Output: token ids and their log-probabilities. Invariant: a row's token
depends on its own logits and number alone (inverse of the cumulative distribution).
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dasd_lite.inference import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


def draw_tokens(logits_BV: Tensor, uniform_B: Tensor, params: SamplingParams, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Draw one token per row; return its id [B] and its log-probability [B] at temperature 1 over all of V.

    A log-probability is not finite if, and only if, the row's logits are not.

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
        cumulative = probs.cumsum(-1, dtype=torch.float64)
        target = uniform_B[:, None].double() * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)
    return drawn, raw_BV.gather(-1, drawn[:, None]).squeeze(-1)
