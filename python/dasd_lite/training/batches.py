"""The micro-batches of a training run, each made ready while the one before it computes.

Input: the rows of each step. Output: micro-batches whose tensors are on the device, or on their way there. Invariant:
they are the same, in the same order, with and without the thread that makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from dasd_lite.model.attention import Documents
from dasd_lite.model.row import Row
from dasd_lite.training.objectives.objective import Targets


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass, joined, and what the model and the objective need of them on the device."""

    row: Row
    documents: Documents
    targets: Targets
    counts: bool = True
    """False where a process only takes part because all gather the weights together."""


@dataclass(frozen=True)
class Share:
    """What one process computes in a step.

    Attributes:
        num_targets: Target tokens of the step, over all processes.
        micro_batches: The rows of each of its micro-batches, and whether it counts.
    """

    num_targets: int
    micro_batches: tuple[tuple[tuple[int, ...], bool], ...]


class Batches:
    """Makes micro-batches ready one ahead, across the end of a step too."""

    def __init__(
        self,
        shares: Iterator[Share],
        prepare: Callable[[tuple[int, ...], int, bool], MicroBatch],
        *,
        in_thread: bool,
    ) -> None:
        """Begin with the first share.

        Args:
            shares: Of all steps that are left.
            prepare: Takes rows, the target tokens of their step, and whether they count.
            in_thread: Whether to work ahead. On a CPU a thread would only take time from the computation.
        """
        self._ahead: Iterator[tuple[tuple[int, ...], int, bool]] = (
            (rows, share.num_targets, counts) for share in shares for rows, counts in share.micro_batches
        )
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(1, "batches") if in_thread else None
        self._next: Future[MicroBatch] | None = None

    def take(self, number: int) -> Iterator[MicroBatch]:
        """Yield the next micro-batches."""
        for _ in range(number):
            if self._pool is None:
                yield self._prepare(*next(self._ahead))
                continue
            if self._next is None:
                self._next = self._pool.submit(self._prepare, *next(self._ahead))
            made, self._next = self._next.result(), None
            # The next one's rows are chosen here: the schedule is not made for two threads.
            if (work := next(self._ahead, None)) is not None:
                self._next = self._pool.submit(self._prepare, *work)
            yield made

    def __enter__(self) -> Batches:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Make nothing more; what is being made takes milliseconds."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
