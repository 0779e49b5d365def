"""How much work training is: FLOPs, and hours on a GPU of known speed.

Input: a model's shape and the lengths of documents. Nothing here needs torch. Invariant: FLOPs are those that torch
counts, which tests check.
"""

from __future__ import annotations

from collections.abc import Iterable

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.costs.shape import ModelShape


def training_flops(
    shape: ModelShape, doc_lengths: Iterable[int], method: Full | Lora, num_targets: int | None = None
) -> float:
    """Return the FLOPs of one forward and backward pass over documents that do not see each other.

    Per weight and token, 2 in the forward pass, and in the backward pass 2 for the gradient of the input and 2 for the
    gradient of the weight: 6 in all, and 4 for frozen weights. The embedding is looked up, not multiplied. Attention is
    causal: queries times keys and probabilities times values count half, once in the forward pass and twice in the
    backward pass. Of experts those count that a token visits. What gradient checkpointing computes again is not
    counted, nor that PEFT makes the product of an expert's adapter matrices, for all experts.

    Args:
        shape: The model's.
        doc_lengths: Tokens of each document.
        method: Full training, or an adapter.
        num_targets: Tokens at which the output head is computed; None: all.

    Source: the model FLOPs of "model FLOPs utilization" (PaLM, arXiv 2204.02311, appendix B).
    """
    lengths = [int(length) for length in doc_lengths]
    tokens = sum(lengths)
    targets = tokens if num_targets is None else num_targets
    body = shape.matmul_parameters - shape.head_parameters
    work = (4 if isinstance(method, Lora) else 6) * float(body * tokens + shape.head_parameters * targets)
    if isinstance(method, Lora):
        work += 6.0 * shape.adapter_parameters(method, shape.experts_per_token) * tokens
    full = sum(length * length / 2 for length in lengths)
    window = shape.sliding_window or 0
    narrow = sum(length * length / 2 if length <= window else window * (length - window / 2) for length in lengths)
    pairs = (shape.num_layers - shape.num_sliding_layers) * full + shape.num_sliding_layers * narrow
    return work + 3 * 2 * 2 * shape.q_size * pairs


def training_hours(
    shape: ModelShape, config: TrainConfig, doc_length: int, tokens: float, speed: float, num_gpus: int = 1
) -> float:
    """Return the hours that training on `tokens` takes.

    Args:
        shape: The model's.
        config: Options of `train`.
        doc_length: Tokens of each document.
        tokens: Of all documents and epochs together.
        speed: FLOP/s that one GPU is assumed to reach.
        num_gpus: How many there are.
    """
    work = training_flops(shape, [doc_length], config.method) * tokens / doc_length
    return work / (speed * num_gpus) / 3600
