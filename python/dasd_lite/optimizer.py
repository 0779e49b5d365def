"""AdamW over what is trained: by torch in float32, or by bitsandbytes with moments in 8 bits.

Input: a model and the options of the stage. Invariant: matrices decay, vectors (norms, biases) do not.
"""

from __future__ import annotations

from typing import Any

from dasd_lite.config import TrainConfig
from dasd_lite.errors import ConfigError, MissingExtraError


def make_optimizer(model: Any, config: TrainConfig) -> Any:
    """Return the optimiser, at a learning rate of 0 until one is set.

    Raises ConfigError where moments in 8 bits cannot be had: paged without a GPU, and for weights that are spread over
    processes.
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
    if config.optimizer == "paged_adamw_8bit" and trained[0].device.type != "cuda":
        raise ConfigError("train.optimizer = 'paged_adamw_8bit' needs a GPU; on a CPU use 'adamw_8bit' or 'adamw'")
    if hasattr(trained[0], "full_tensor"):
        raise ConfigError(
            f"train.optimizer = {config.optimizer!r} cannot be spread over several GPUs; use 'adamw', whose moments are"
            " spread over them, or train.num_processes = 1"
        )
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise MissingExtraError("train", "bitsandbytes") from error
    kind = bnb.optim.PagedAdamW8bit if config.optimizer == "paged_adamw_8bit" else bnb.optim.AdamW8bit
    return kind(groups, **options)
