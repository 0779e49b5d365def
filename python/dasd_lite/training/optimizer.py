"""AdamW over the trained weights: torch's in float32, or bitsandbytes' with moments in 8 bits.

Input: a model and the options of the stage. Invariant: matrices decay, vectors (norms, biases) do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dasd_lite.config.train import TrainConfig

if TYPE_CHECKING:
    import torch


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer, with a learning rate of 0 until one is set.

    What this machine cannot do was refused before, by `requirements.conflicts`.
    """
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": 1e-8}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    import bitsandbytes as bnb

    kind = bnb.optim.PagedAdamW8bit if config.optimizer == "paged_adamw_8bit" else bnb.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, **options)
    return optimizer
