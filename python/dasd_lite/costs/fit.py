"""The smallest change of options that makes a training run fit a GPU.

Input: a model's shape, the options of `train`, the length of a row, and a GPU's memory. Output: settings to change, as
they are written in a recipe. Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.costs.hardware import GPU_SIZES, Hardware
from dasd_lite.costs.memory import Prediction, predict
from dasd_lite.costs.shape import ModelShape

_SHORTEST = 512  # tokens; in a shorter row no answer fits


def sizes_that_fit(prediction: Prediction) -> list[float]:
    """Return the sizes of common GPUs, in GB, that are large enough."""
    return [size for size in GPU_SIZES if prediction.total <= size * 1e9]


@dataclass(frozen=True)
class OptionChange:
    """Settings that make a training run fit, and what it needs then."""

    settings: dict[str, str]
    """Key and value as in a recipe; empty if it fits as it is."""
    prediction: Prediction
    config: TrainConfig
    seq_len: int

    def __str__(self) -> str:
        """Return the settings as they are written on the command line."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


@dataclass(frozen=True)
class _Step:
    """One change: options of train, or another pack.seq_len."""

    train: dict[str, Any] = field(default_factory=dict)
    seq_len: int | None = None


def smallest_change(
    shape: ModelShape,
    config: TrainConfig,
    *,
    seq_len: int,
    gpu_bytes: float,
    num_processes: int = 1,
    hardware: Hardware | None = None,
) -> OptionChange | None:
    """Find the smallest change with which training fits into `gpu_bytes`; None if nothing helps.

    Steps are taken in order, each on top of those before, until it fits; then those that are not needed are dropped.
    """
    if hardware is not None and hardware.free is not None:
        hardware = replace(hardware, free=min(hardware.free, gpu_bytes))

    def after(steps: list[_Step]) -> OptionChange:
        options: dict[str, Any] = {}
        length = seq_len
        for step in steps:
            options |= step.train
            length = step.seq_len or length
        changed = config.model_copy(update=options)
        prediction = predict(shape, changed, seq_len=length, num_processes=num_processes, hardware=hardware)
        settings = {f"train.{key}": _toml(value) for key, value in options.items()}
        settings |= {"pack.seq_len": str(length)} if length != seq_len else {}
        return OptionChange(settings, prediction, changed, length)

    def fits(steps: list[_Step]) -> bool:
        return after(steps).prediction.total <= gpu_bytes

    if fits([]):
        return after([])
    taken: list[_Step] = []
    for step in _steps(config, seq_len, num_processes):
        taken.append(step)
        if fits(taken):
            for earlier in reversed(taken[:-1]):
                fewer = [other for other in taken if other is not earlier]
                taken = fewer if fits(fewer) else taken
            return after(taken)
    return None


def _steps(config: TrainConfig, seq_len: int, num_processes: int) -> Iterator[_Step]:
    """Yield the changes, from what costs nothing to what changes the most."""
    rows, one_process = config.micro_batch_size, num_processes == 1  # 8-bit moments cannot be sharded
    if rows > 1:
        yield _Step({"micro_batch_size": 1, "grad_accum_steps": config.grad_accum_steps * rows})
    if config.gradient_checkpointing != "on":
        yield _Step({"gradient_checkpointing": "on"})
    if config.optimizer == "adamw" and one_process:
        yield _Step({"optimizer": "adamw_8bit"})
    if not config.offload_activations:
        yield _Step({"offload_activations": True})
    if config.optimizer != "paged_adamw_8bit" and one_process:
        yield _Step({"optimizer": "paged_adamw_8bit"})
    if isinstance(config.method, Full):
        yield _Step({"method": Lora(kind="lora")})
        yield _Step({"method": Lora(kind="qlora")})
    elif config.method.kind == "lora":
        yield _Step({"method": config.method.model_copy(update={"kind": "qlora"})})
    while seq_len // 2 >= _SHORTEST:
        seq_len //= 2
        yield _Step(seq_len=seq_len)


def _toml(value: Any) -> str:
    """Return a value as TOML; of a method, its kind, its rank, and what is not left at its default."""
    if isinstance(value, Full | Lora):
        kept = {"kind", "rank"} | {
            name for name, option in type(value).model_fields.items() if getattr(value, name) != option.default
        }
        pairs = (f"{name} = {_toml(option)}" for name, option in value.model_dump().items() if name in kept)
        return f"{{ {', '.join(pairs)} }}"
    return json.dumps(value)
