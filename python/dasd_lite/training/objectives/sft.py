"""The paper's objective: −log p of the teacher's tokens, every token alike (arXiv 2601.09088, sections 2 and 6.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dasd_lite.training.objectives.objective import Targets

if TYPE_CHECKING:
    from torch import Tensor

    from dasd_lite.training.objectives.objective import Metrics


def per_token(logits_CV: Tensor, target_ids_C: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
    """−log p of each target token; float32 [C]."""
    from dasd_lite.model.logprobs import negative_logprobs

    return negative_logprobs(logits_CV, target_ids_C)


def token_weights(targets: Targets) -> Tensor:
    """The gradient of the loss by each −log p; float32 [N]."""
    import torch

    return torch.full_like(targets.document, 1 / targets.num_step, dtype=torch.float32)


def loss(per_token_N: Tensor, targets: Targets) -> tuple[Tensor, Metrics]:
    """Σ −log p / tokens of the step."""
    total = per_token_N.sum()
    return total / targets.num_step, {"loss": total.detach()}
