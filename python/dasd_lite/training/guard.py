"""What guards a step: its statistics, bad losses and the rollouts behind them, signals to stop."""

from __future__ import annotations

import math
import signal
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dasd_lite.model.row import Row
from dasd_lite.training import launch as distributed

_HISTORY = 32  # steps whose median a loss is held against


_LEAST_HISTORY = 8


_MOST_SKIPPED = 24  # halvings of the loss's scale, which begins at 2^16


@dataclass(frozen=True)
class StepStats:
    """What one process tells the others at the end of a step."""

    sums: dict[str, float]
    """Of the objective's metrics."""
    worst: tuple[bool, float, tuple[str, ...]]
    """Its worst micro-batch: whether its loss is no number, its loss per target, the rollouts in it."""
    stop: bool
    memory_bytes: int

    @classmethod
    def of(cls, metrics: list[dict[str, Any]], rows: list[Row], stop: bool, memory: int) -> StepStats:
        """Put together what came of the micro-batches."""
        values = [{name: float(value) for name, value in found.items()} for found in metrics]
        means = [found["loss"] / max(1, row.num_targets) for found, row in zip(values, rows, strict=True)]
        worst = max(
            ((not math.isfinite(v), v if math.isfinite(v) else 0.0, r.uids) for v, r in zip(means, rows, strict=True)),
            default=(False, -math.inf, ()),
        )
        return cls(_add_up(values), worst, stop, memory)


def means(told: list[StepStats], num_targets: int) -> dict[str, float]:
    """Return the objective's metrics, over all target tokens of the step."""
    return {name: value / num_targets for name, value in _add_up([t.sums for t in told]).items()}


def _add_up(parts: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def check_step(loss: float, grad_norm: float, history: list[float], max_jump: float, skipped: int | None) -> str | None:
    """Say what is wrong with a step whose gradients have not reached the weights yet; None when nothing is.

    `skipped` steps before this one had a gradient too large for float16, which is no fault at first, for the scale
    of the loss is then lowered; None where the loss is not scaled.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm) and (skipped is None or skipped >= _MOST_SKIPPED):
        steps = f" for {skipped + 1} steps" if skipped is not None else ""
        return f"the gradient is {grad_norm}{steps}, the loss {loss:.4g}"
    if not history:
        return None
    # A median of a few steps is too easily passed: until there are more, the highest of them stands in for it.
    usual = statistics.median(history[-_HISTORY:]) if len(history) >= _LEAST_HISTORY else max(history)
    if loss > usual + max_jump:
        return (
            f"the loss is {loss:.4g}, {usual:.4g} in the steps before, and train.max_loss_jump = {max_jump:g}; lower"
            " train.learning_rate, or raise train.max_loss_jump if it will come down again"
        )
    return None


def worst_rollouts(told: list[StepStats], loss: float) -> str:
    """Name the rollouts of the worst micro-batch."""
    uids = max(t.worst for t in told)[2]
    more = f" and {len(uids) - 8} more" if len(uids) > 8 else ""
    what = "rollouts" if not math.isfinite(loss) else "rollouts of the highest loss"
    return f"{what}: {', '.join(uids[:8]) or 'unnamed'}{more}"


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Let the first Ctrl-C or SIGTERM set a flag instead of breaking off; the second one breaks off."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may take signals
        return
    numbers = distributed.stop_numbers()
    before = [signal.getsignal(number) for number in numbers]

    def ask(number: int, frame: object) -> None:
        asked.set()
        restore()

    def restore() -> None:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()
