"""The card that is here, and the smallest change that makes a training fit it.

Input: a model's shape, the options of `train`, the length of a row, a card's memory. Output: settings to change, as
they are written in a recipe. Changes are tried in an order, each on top of those before it, then those that turn out
not to be needed are taken back. Nothing here needs torch, but without it no card is seen.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.costs.flops import ModelShape, training_flops
from dasd_lite.costs.memory import Machine, Prediction, predict

CARD_SIZES = (8, 12, 16, 24, 48, 80, 141)
"""Memory of common cards in GB of 10⁹ bytes."""
ASSUMED_MFU = 0.4
"""Share of a card's dense peak that training is assumed to reach; an assumption, not a measurement."""
_DRIVERS = ("nvidiactl", "dxg", "nvmap", "kfd")  # CUDA, under Windows, on a Jetson, ROCm: asking torch takes 3 s
_SHORTEST = 512  # a row under this is no answer to anything


@dataclass(frozen=True)
class Card:
    """What is known of the visible GPUs; of several the one with the least memory."""

    name: str
    memory: int
    """Bytes."""
    number: int
    machine: Machine


def visible_card() -> Card | None:
    """Ask torch for the GPUs; None when there is none, or no torch."""
    on_linux = Path("/dev").is_dir()
    if importlib.util.find_spec("torch") is None or (on_linux and not any(Path("/dev", d).exists() for d in _DRIVERS)):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    number = torch.cuda.device_count()
    smallest = min(range(number), key=lambda i: torch.cuda.get_device_properties(i).total_memory)
    properties = torch.cuda.get_device_properties(smallest)
    machine = Machine(varlen=(properties.major, properties.minor) >= (8, 0), liger=has_liger())
    return Card(properties.name, properties.total_memory, number, machine)


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
    if config.liger is True and not (gpus and has_liger()):
        yield "train.liger = true: needs a GPU and liger-kernel (pip install liger-kernel); use 'auto'"
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        yield f"train.tracker = {config.tracker!r}: {config.tracker} is missing; pip install {config.tracker}"


def has_liger() -> bool:
    """Tell whether liger-kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def sizes_that_fit(prediction: Prediction) -> list[int]:
    """Return the common cards, in GB, that have room for it."""
    return [size for size in CARD_SIZES if prediction.total <= size * 1e9]


@dataclass(frozen=True)
class Change:
    """Settings that make a training fit, and what it needs then."""

    settings: dict[str, str]
    """Key and value as in a recipe; none when it fits as it is."""
    prediction: Prediction
    config: TrainConfig
    seq_len: int

    def __str__(self) -> str:
        """Write the settings as they can stand on the command line."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


@dataclass(frozen=True)
class _Try:
    """One change: options of train, or another pack.seq_len."""

    train: dict[str, Any] = field(default_factory=dict)
    seq_len: int | None = None


def smallest_change(
    shape: ModelShape,
    config: TrainConfig,
    *,
    seq_len: int,
    card_bytes: float,
    num_processes: int = 1,
    machine: Machine | None = None,
) -> Change | None:
    """Find the smallest change with which training fits into `card_bytes`; None when nothing helps."""

    def with_all(tries: list[_Try]) -> Change:
        options: dict[str, Any] = {}
        length = seq_len
        for one in tries:
            options |= one.train
            length = one.seq_len or length
        changed = config.model_copy(update=options)
        found = predict(shape, changed, seq_len=length, num_processes=num_processes, machine=machine)
        settings = {f"train.{key}": _toml(value) for key, value in options.items()}
        settings |= {"pack.seq_len": str(length)} if length != seq_len else {}
        return Change(settings, found, changed, length)

    def fits(change: Change) -> bool:
        return change.prediction.total <= card_bytes

    if fits(with_all([])):
        return with_all([])
    tries: list[_Try] = []
    for one in _tries(config, seq_len, num_processes):
        tries.append(one)
        if fits(with_all(tries)):
            for needless in reversed(tries[:-1]):
                fewer = [other for other in tries if other is not needless]
                tries = fewer if fits(with_all(fewer)) else tries
            return with_all(tries)
    return None


def _tries(config: TrainConfig, seq_len: int, num_processes: int) -> Iterator[_Try]:
    """Name the changes from what costs nothing to what changes the most."""
    rows, one_process = config.micro_batch_size, num_processes == 1  # moments in 8 bits cannot be spread over several
    if rows > 1:
        yield _Try({"micro_batch_size": 1, "grad_accum_steps": config.grad_accum_steps * rows})
    if config.gradient_checkpointing is not True:
        yield _Try({"gradient_checkpointing": True})
    if config.optimizer == "adamw" and one_process:
        yield _Try({"optimizer": "adamw_8bit"})
    if not config.offload_activations:
        yield _Try({"offload_activations": True})
    if config.optimizer != "paged_adamw_8bit" and one_process:
        yield _Try({"optimizer": "paged_adamw_8bit"})
    if isinstance(config.method, Full):
        yield _Try({"method": Lora(kind="lora")})
        yield _Try({"method": Lora(kind="qlora")})
    elif config.method.kind == "lora":
        yield _Try({"method": config.method.model_copy(update={"kind": "qlora"})})
    while seq_len // 2 >= _SHORTEST:
        seq_len //= 2
        yield _Try(seq_len=seq_len)


def _toml(value: Any) -> str:
    """Write a value as TOML does; of a method what is not left at its default."""
    if isinstance(value, Full | Lora):
        kept = {"kind", "rank"} | {
            name for name, option in type(value).model_fields.items() if getattr(value, name) != option.default
        }
        pairs = (f"{name} = {_toml(option)}" for name, option in value.model_dump().items() if name in kept)
        return f"{{ {', '.join(pairs)} }}"
    return json.dumps(value)


def training_hours(
    shape: ModelShape, config: TrainConfig, doc_length: int, tokens: float, peak: float, num_cards: int = 1
) -> float:
    """Return the hours that documents of `doc_length`, `tokens` in all, take at the assumed share of the peak."""
    work = training_flops(shape, [doc_length], config.method) * tokens / doc_length
    return work / (ASSUMED_MFU * peak * num_cards) / 3600
