"""What guards a step: its statistics, bad losses and the rollouts that caused them, signals to stop.

Input: the loss sums of each micro-batch. Output: what is wrong with a step, before its gradients reach the weights.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dasd_lite.model.row import Row
from dasd_lite.training.environment import stop_numbers

if TYPE_CHECKING:
    from dasd_lite.training.objectives.objective import Metrics

_HISTORY = 32  # steps whose median a loss is compared with
_MIN_HISTORY = 8
_MAX_SKIPPED = 24  # halvings of the loss scale, which starts at 2^16


@dataclass(frozen=True)
class StepStats:
    """What one process reports to the others at the end of a step.

    Attributes:
        sums: The objective's metrics, summed over the micro-batches.
        worst: Of the worst micro-batch: whether its loss is not finite, its loss per target token, its rollouts.
        stop: Whether the process was asked to stop.
        memory_bytes: Its peak so far.
    """

    sums: dict[str, float]
    worst: tuple[bool, float, tuple[str, ...]]
    stop: bool
    memory_bytes: int

    @classmethod
    def of(cls, metrics: Sequence[Metrics], rows: Sequence[Row], stop: bool, memory_bytes: int) -> StepStats:
        """Summarize the micro-batches; `metrics` are the objective's sums for each of `rows`."""
        sums = [{name: float(value) for name, value in each.items()} for each in metrics]
        losses = [each["loss"] / max(1, row.num_targets) for each, row in zip(sums, rows, strict=True)]
        worst = max(
            (
                (not math.isfinite(loss), loss if math.isfinite(loss) else 0.0, row.uids)
                for loss, row in zip(losses, rows, strict=True)
            ),
            default=(False, -math.inf, ()),
        )
        return cls(_add_up(sums), worst, stop, memory_bytes)


def means(stats: list[StepStats], num_targets: int) -> dict[str, float]:
    """Return the objective's metrics per target token of the step."""
    return {name: value / num_targets for name, value in _add_up([each.sums for each in stats]).items()}


def _add_up(parts: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def check_step(loss: float, grad_norm: float, history: list[float], max_jump: float, skipped: int | None) -> str | None:
    """Return what is wrong with a step whose gradients have not reached the weights yet; None if nothing is.

    Args:
        loss: Mean over the target tokens of the step, in nats.
        grad_norm: Norm of the gradients before clipping.
        history: Losses of the steps before.
        max_jump: How much the loss may rise, in nats.
        skipped: Steps just before this one whose gradient overflowed float16, which at first only lowers the scale
            of the loss; None where the loss is not scaled.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm) and (skipped is None or skipped >= _MAX_SKIPPED):
        steps = f" for {skipped + 1} steps" if skipped is not None else ""
        return f"the gradient is {grad_norm}{steps}, the loss {loss:.4g}"
    if not history:
        return None
    # The median of a few steps is exceeded too easily: until there are more, compare with the highest of them.
    usual = statistics.median(history[-_HISTORY:]) if len(history) >= _MIN_HISTORY else max(history)
    if loss > usual + max_jump:
        return (
            f"the loss jumped to {loss:.4g} from {usual:.4g}, by more than train.max_loss_jump = {max_jump:g}; lower"
            " train.learning_rate, or raise train.max_loss_jump if it should come down again"
        )
    return None


def worst_rollouts(stats: list[StepStats], loss: float) -> str:
    """Name the rollouts of the worst micro-batch."""
    uids = max(each.worst for each in stats)[2]
    more = f" and {len(uids) - 8} more" if len(uids) > 8 else ""
    what = "rollouts" if not math.isfinite(loss) else "rollouts with the highest loss"
    return f"{what}: {', '.join(uids[:8]) or 'unnamed'}{more}"


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Let the first Ctrl-C or SIGTERM only set the event; the second one ends the process."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may take signals
        return
    numbers = stop_numbers()
    before = [signal.getsignal(number) for number in numbers]

    def request(number: int, frame: object) -> None:
        stop.set()
        restore()

    def restore() -> None:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    for number in numbers:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
