"""−log p of the teacher's tokens, each answer's tokens times its weight (arXiv 2601.09088, future work).

The weights come with the rows (see weights.py) and have mean 1 over the target tokens of the data, so the
learning rate keeps its meaning. With weights of 1 it is `sft` to the bit.
"""

from __future__ import annotations

from typing import Any

from dasd_lite.model.logprobs import negative_logprobs as terms
from dasd_lite.training.objectives import Targets

__all__ = ["loss", "terms"]


def loss(terms_N: Any, targets: Targets) -> tuple[Any, dict[str, Any]]:
    """Σ −w log p / tokens of the step; reports the unweighted loss beside it."""
    total = (terms_N * targets.weights[targets.document]).sum()
    return total / targets.num_step, {"loss": total.detach(), "unweighted_loss": terms_N.detach().sum()}
