"""The paper's objective: −log p of the teacher's tokens, every token alike (arXiv 2601.09088, sections 2 and 6.4)."""

from __future__ import annotations

from typing import Any

from dasd_lite.model.logprobs import negative_logprobs as terms
from dasd_lite.training.objectives import Targets

__all__ = ["loss", "terms"]


def loss(terms_N: Any, targets: Targets) -> tuple[Any, dict[str, Any]]:
    """Σ −log p / tokens of the step."""
    total = terms_N.sum()
    return total / targets.num_step, {"loss": total.detach()}
