"""What an option of training needs from packages, hardware and the model; checked before anything is spent."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from dasd_lite.config.stages import RecipeConfig
from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.costs.hardware import has_liger


def conflicts(config: TrainConfig, num_processes: int | None = None) -> Iterator[str]:
    """Name options of train that this machine, or each other, do not allow; nothing is loaded.

    `num_processes` is how many train, on one machine or several; none is what the options say of this one.
    """
    import torch

    gpus, method = int(torch.cuda.device_count()), config.method
    number = num_processes or config.num_processes or max(1, gpus)
    if gpus and (config.num_processes or 1) > gpus:
        yield f"train.num_processes = {config.num_processes}: GPUs here are {gpus}, and each process needs one"
    if config.optimizer == "paged_adamw_8bit" and not gpus:
        yield "train.optimizer = 'paged_adamw_8bit' needs a GPU; on a CPU use 'adamw_8bit' or 'adamw'"
    if config.optimizer != "adamw" and isinstance(method, Full) and number > 1:
        yield (
            f"train.optimizer = {config.optimizer!r} cannot be spread over {number} processes; use 'adamw', whose"
            " moments are, or train.num_processes = 1"
        )
    if config.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        yield f"train.optimizer = {config.optimizer!r}: bitsandbytes is missing; pip install 'dasd-lite[train]'"
    has_bfloat16 = not gpus or torch.cuda.is_bf16_supported(including_emulation=False)
    if config.dtype == "bfloat16" and not has_bfloat16:
        yield f"train.dtype = 'bfloat16': {torch.cuda.get_device_name()} has not; use 'auto' or 'float16'"
    if (
        isinstance(method, Full)
        and number > 1
        and (config.dtype == "float16" or (config.dtype != "float32" and not has_bfloat16))
    ):
        yield (
            "train.method full in float16 over several processes: its loss cannot be scaled there; use lora or qlora,"
            " or train.num_processes = 1"
        )
    if config.liger == "on" and not (gpus and has_liger()):
        yield "train.liger = 'on' needs a GPU and liger-kernel (pip install liger-kernel); use 'auto'"
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        yield f"train.tracker = {config.tracker!r}: {config.tracker} is missing; pip install {config.tracker}"


def no_such_layer(recipe: RecipeConfig) -> Iterator[str]:
    """Name the layers that are to get an adapter and of which the student's files have no weights."""
    methods = [phase.train.method for phase in recipe.phase if isinstance(phase.train.method, Lora)]
    targets = {
        target for method in methods if method.target_modules != "all-linear" for target in method.target_modules
    }
    if not targets or importlib.util.find_spec("safetensors") is None:
        return
    from safetensors import safe_open

    names: set[str] = set()
    for path in Path(recipe.student.model).glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            names |= {
                name.removesuffix(".weight").rsplit(".", 1)[-1]
                for name in list(file.keys())
                if name.endswith(".weight")
            }
    for target in sorted(targets) if names else ():
        if target.rsplit(".", 1)[-1] not in names:
            layers = sorted(name for name in names if name.endswith("_proj")) or sorted(names)
            yield f"train.method.target_modules: the student has no layer {target!r}; it has {', '.join(layers)}"
