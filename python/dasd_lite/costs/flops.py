"""What a model's shape says of its size and work: parameters, FLOPs of training, peak FLOP/s of known cards.

Input: a model folder's config.json, read as JSON, so that nothing here needs torch. Decoders of the Llama kind are
understood (Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE and what is built like them). Invariant: counts are exact for
these, which tests hold against transformers and peft; only adapters on experts are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.costs.shape import ModelShape

# --- the shape --------------------------------------------------------------------------------------


# --- the work ---------------------------------------------------------------------------------------


def training_flops(
    shape: ModelShape, doc_lengths: Sequence[int] | Iterable[int], method: Full | Lora, num_targets: int | None = None
) -> float:
    """Return the FLOPs of one forward and backward pass over documents that do not see each other.

    Forward 2 a weight and token, backward 2 for the gradient of the input and 2 for that of the weight, which frozen
    weights do not need: 6 and 4. The embedding is looked up, not multiplied; the output head is, at `num_targets`
    tokens (None: at all). Attention is counted causal: of queries times keys and of probabilities times values
    half, forward once and backward twice. What gradient checkpointing computes again is not counted: these are the
    model FLOPs of "model FLOPs utilisation" (PaLM, arXiv 2204.02311, appendix B).
    """
    lengths = [int(length) for length in doc_lengths]
    tokens = sum(lengths)
    targets = tokens if num_targets is None else num_targets
    body = shape.matmul_parameters - shape.head_parameters
    work = (4 if isinstance(method, Lora) else 6) * float(body * tokens + shape.head_parameters * targets)
    if isinstance(method, Lora):
        work += 6.0 * shape.adapter_parameters(method) * tokens
    full = sum(length * length / 2 for length in lengths)
    window = shape.sliding_window or 0
    narrow = sum(length * length / 2 if length <= window else window * (length - window / 2) for length in lengths)
    pairs = (shape.num_layers - shape.num_sliding_layers) * full + shape.num_sliding_layers * narrow
    return work + 3 * 2 * 2 * shape.q_size * pairs


ASSUMED_MFU = 0.4
"""Share of a card's dense peak that training is assumed to reach; an assumption, not a measurement."""


def training_hours(
    shape: ModelShape, config: TrainConfig, doc_length: int, tokens: float, peak: float, num_cards: int = 1
) -> float:
    """Return the hours that documents of `doc_length`, `tokens` in all, take at the assumed share of the peak."""
    work = training_flops(shape, [doc_length], config.method) * tokens / doc_length
    return work / (ASSUMED_MFU * peak * num_cards) / 3600
