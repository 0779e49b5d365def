"""The card that is here, and the smallest change that makes a training fit it.

Input: a model's shape, the options of `train`, the length of a row, a card's memory. Output: settings to change, as
they are written in a recipe. Changes are tried in an order, each on top of those before it, then those that turn out
not to be needed are taken back. Nothing here needs torch, but without it no card is seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.costs.hardware import GPU_SIZES, Hardware
from dasd_lite.costs.memory import Prediction, predict
from dasd_lite.costs.shape import ModelShape

_SHORTEST = 512  # a row under this is no answer to anything


def sizes_that_fit(prediction: Prediction) -> list[int]:
    """Return the common cards, in GB, that have room for it."""
    return [size for size in GPU_SIZES if prediction.total <= size * 1e9]


@dataclass(frozen=True)
class OptionChange:
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
    machine: Hardware | None = None,
) -> OptionChange | None:
    """Find the smallest change with which training fits into `card_bytes`; None when nothing helps."""

    def with_all(tries: list[_Try]) -> OptionChange:
        options: dict[str, Any] = {}
        length = seq_len
        for one in tries:
            options |= one.train
            length = one.seq_len or length
        changed = config.model_copy(update=options)
        found = predict(shape, changed, seq_len=length, num_processes=num_processes, machine=machine)
        settings = {f"train.{key}": _toml(value) for key, value in options.items()}
        settings |= {"pack.seq_len": str(length)} if length != seq_len else {}
        return OptionChange(settings, found, changed, length)

    def fits(change: OptionChange) -> bool:
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
    if config.gradient_checkpointing != "on":
        yield _Try({"gradient_checkpointing": "on"})
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
