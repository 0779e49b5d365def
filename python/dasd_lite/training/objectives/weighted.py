"""−log p of the teacher's tokens, each answer's tokens times its weight (arXiv 2601.09088, future work).

The weights come with the rows (see method/weights.py) and have mean 1 over the target tokens of the data, so the
learning rate keeps its meaning. With weights of 1 it is `sft` to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dasd_lite.training.objectives.objective import Targets
from dasd_lite.training.objectives.sft import per_token

if TYPE_CHECKING:
    from torch import Tensor

    from dasd_lite.training.objectives.objective import Metrics

__all__ = ["loss", "needs", "per_token", "token_weights"]

needs = ("weight",)


def token_weights(targets: Targets) -> Tensor:
    """The gradient of the loss by each −log p; float32 [N]."""
    return targets.documents["weight"][targets.document] / targets.num_step


def loss(per_token_N: Tensor, targets: Targets) -> tuple[Tensor, Metrics]:
    """Σ −w log p / tokens of the step; reports the unweighted loss beside it."""
    total = (per_token_N * targets.documents["weight"][targets.document]).sum()
    return total / targets.num_step, {"loss": total.detach(), "unweighted_loss": per_token_N.detach().sum()}
