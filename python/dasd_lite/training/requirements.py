"""What the options of training need from packages, hardware and the model; checked before anything is spent."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.costs.hardware import has_liger
from dasd_lite.data.hub import read_json
from dasd_lite.errors import MissingExtraError
from dasd_lite.training.environment import training_gpus


def num_processes(config: TrainConfig) -> int:
    """Return how many processes train on this machine: as many as are asked for, or one per GPU."""
    try:
        return config.num_processes or max(1, len(training_gpus()))
    except ImportError as error:
        raise MissingExtraError("train", "torch") from error


def conflicts(config: TrainConfig, number: int | None = None) -> Iterator[str]:
    """Name options that this machine, or other options, rule out. Loads nothing.

    Args:
        config: The options.
        number: Processes that train, on one machine or several; None: what the options say for this one.
    """
    from dasd_lite.model.load import bfloat16_conflict

    gpus, method = len(training_gpus()), config.method
    number = number or num_processes(config)
    if gpus and (config.num_processes or 1) > gpus:
        yield (
            f"train.num_processes = {config.num_processes}: this machine has {gpus} GPU{'s' if gpus > 1 else ''} to"
            " train on, and each process needs one"
        )
    if config.optimizer == "paged_adamw_8bit" and not gpus:
        yield "train.optimizer = 'paged_adamw_8bit' needs a GPU; on a CPU use 'adamw_8bit' or 'adamw'"
    if config.optimizer != "adamw" and isinstance(method, Full) and number > 1:
        yield (
            f"train.optimizer = {config.optimizer!r} cannot be sharded over {number} processes; use 'adamw', or"
            " train.num_processes = 1"
        )
    if config.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        yield f"train.optimizer = {config.optimizer!r}: bitsandbytes is missing; pip install 'dasd-lite[train]'"
    no_bfloat16 = bfloat16_conflict() if gpus else None
    if config.dtype == "bfloat16" and no_bfloat16:
        yield f"train.{no_bfloat16}"
    is_float16 = config.dtype == "float16" or (config.dtype != "float32" and no_bfloat16)
    if isinstance(method, Full) and number > 1 and is_float16:
        yield (
            "train.method full in float16 over several processes: its loss cannot be scaled there; use lora or qlora,"
            " or train.num_processes = 1"
        )
    if config.liger == "on" and (fault := liger_conflict(has_gpu=gpus > 0)):
        yield fault
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        yield f"train.tracker = {config.tracker!r}: {config.tracker} is missing; pip install {config.tracker}"


def liger_conflict(*, has_gpu: bool) -> str | None:
    """Return why Liger's kernels cannot be used; None if they can."""
    if has_gpu and has_liger():
        return None
    return "train.liger = 'on': it needs a GPU and liger-kernel (pip install liger-kernel); use 'auto'"


def missing_layers(methods: Iterable[Full | Lora], folder: Path) -> Iterator[str]:
    """Name the layers that should get an adapter and of which a model's files have no weights."""
    targets = {
        target
        for method in methods
        if isinstance(method, Lora) and method.target_modules != "all-linear"
        for target in method.target_modules
    }
    if not targets or importlib.util.find_spec("safetensors") is None:
        return
    from safetensors import safe_open

    layers: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            layers |= {name.removesuffix(".weight") for name in list(file.keys()) if name.endswith(".weight")}
    if layers:
        yield from layer_conflicts(sorted(targets), layers, "the student")


_FOUR_OR_EIGHT = {"load_in_4bit": ", 4 bits", "load_in_8bit": ", 8 bits"}
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_OTHER_EXPERTS = ("dbrx", "jetmoe")
"""Model types whose experts are neither one tensor per layer nor layers of their own."""


def model_conflicts(folder: Path, methods: Iterable[Full | Lora]) -> Iterator[str]:
    """Name what rules out training this model by these methods, as its config.json tells."""
    config = read_json(folder / "config.json")
    if (quantized := _quantization(config)) is not None:
        yield f"student {folder} is already quantized ({quantized}); name the model that it was made from"
        return
    text = config.get("text_config") or config
    kind, adapters = str(text.get("model_type")), [method for method in methods if isinstance(method, Lora)]
    mixture = has_experts(config)
    for part, adapted in (
        ("experts", any(method.experts == "adapted" for method in adapters)),
        ("router", any(method.router == "adapted" for method in adapters)),
    ):
        if adapted and (not mixture or kind in _OTHER_EXPERTS):
            reason = f"has no {part}" if not mixture else f"has {part} that PEFT cannot adapt"
            yield f"train.method.{part} = 'adapted': the student ({kind}) {reason}; use 'frozen'"


def has_experts(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a mixture of experts."""
    text = config.get("text_config") or config
    return any(int(text.get(key) or 0) > 1 for key in _EXPERT_KEYS)


def _quantization(config: Mapping[str, Any]) -> str | None:
    """Return how a model's files are quantized: "bitsandbytes, 4 bits"; None if they are not."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        found = (config.get("text_config") or {}).get("quantization_config")
    if not isinstance(found, dict) or not found:
        return None
    bits = found.get("bits") or found.get("weight_bits")
    size = next((text for key, text in _FOUR_OR_EIGHT.items() if found.get(key)), f", {bits} bits" if bits else "")
    method = str(found.get("quant_method") or "unknown method")
    return f"{'bitsandbytes' if method.startswith('bitsandbytes') else method}{size}"


def layer_conflicts(target_modules: Iterable[str], layers: Iterable[str], model: str) -> Iterator[str]:
    """Name the layers that should get an adapter and that are not among a model's `layers`."""
    layers = set(layers)
    last = {name.rsplit(".", 1)[-1] for name in layers}
    linear = sorted(name for name in last if name.endswith("_proj")) or sorted(last)
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            yield f"train.method.target_modules: {model} has no layer {target!r}; it has {', '.join(linear)}"
