"""What each optimizer step does, known before the first one: its rows, which process reads them, its learning rate.

Input: the lengths of the documents of every row, a seed, the options. Invariants: everything is a pure function of
these and of the step, so a run that resumes does what it would have done; only `share` depends on the number of
processes; every row is read once per epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dasd_lite.config.train import TrainConfig
from dasd_lite.data.seeds import derive_seed
from dasd_lite.method import packing

_MAX_GROUP = 8  # rows of equal cost that are next to each other in the order
_MIN_GROUPS = 4  # groups in a step, so that a step still mixes short and long documents


@dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of one training run.

    Attributes:
        lengths: Tokens of each document, row after row; int64 `[num_documents]`.
        offsets: Row r has the documents `offsets[r]` to `offsets[r + 1]`; int64 `[num_rows + 1]`.
        config: The options of the stage.
        seed: Seed of the order.
        cost: Cost of a token, and of a pair of tokens of one document; see `packing.balance_rows`.
        max_steps: Stop after this many steps; None: after `config.epochs`.
    """

    lengths: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    config: TrainConfig
    seed: int
    cost: tuple[float, float] = (1.0, 0.0)
    max_steps: int | None = None
    _orders: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """Rows in the data."""
        return len(self.offsets) - 1

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all processes, at most all; the last step takes what is left."""
        return min(self.config.micro_batch_size * self.config.grad_accum_steps, self.num_rows)

    @property
    def num_samples(self) -> int:
        """Rows read in total: each one `epochs` times, and some of them once more if that is a fraction."""
        samples = max(1, math.ceil(round(self.config.epochs * self.num_rows, 6)))
        return samples if self.max_steps is None else min(samples, self.max_steps * self.rows_per_step)

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.num_samples / self.rows_per_step)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: linear warm-up, then a cosine down to the minimum."""
        peak, floor = self.config.learning_rate, self.config.min_learning_rate
        warmup = round(self.config.warmup_ratio * self.num_steps)
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, self.num_steps - 1 - warmup)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))

    def rows_of(self, step: int) -> list[int]:
        """Return the rows of a step, the most expensive first; a step may reach into the next epoch."""
        first = step * self.rows_per_step
        samples = range(first, min(first + self.rows_per_step, self.num_samples))
        rows = [int(self.order(epoch)[i]) for epoch, i in (divmod(sample, self.num_rows) for sample in samples)]
        return sorted(rows, key=lambda row: (-self.costs[row], row))

    def share(self, step: int, rank: int, num_ranks: int) -> list[list[int]]:
        """Return the micro-batches of one rank in a step: the same number for each rank, empty where rows run out.

        At any moment all ranks work on rows of about equal cost, because they wait for each other.
        """
        rows, size = self.rows_of(step), self.config.micro_batch_size
        micro_batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        num_turns = math.ceil(len(micro_batches) / num_ranks)
        micro_batches += [[]] * (num_turns * num_ranks - len(micro_batches))
        return micro_batches[rank::num_ranks]

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the order of the rows in an epoch; int64 `[num_rows]`.

        Rows of about equal cost form small groups, in random order, so that any number of ranks finds work of equal
        length.
        """
        if epoch not in self._orders:
            most = max(1, min(_MAX_GROUP, self.rows_per_step // _MIN_GROUPS))
            group = max(n for n in range(1, most + 1) if self.rows_per_step % n == 0)
            rejected = np.empty(0, dtype=np.uint32)
            tokens = np.add.reduceat(self.lengths, self.offsets[:-1])
            num_tokens, longest = int(tokens.sum()), int(tokens.max())
            documents = np.arange(len(self.lengths), dtype=np.uint32)
            balanced = packing.balance_rows(
                packing.Plan(documents, self.offsets, rejected, num_tokens, longest),
                self.lengths,
                num_ranks=group,
                micro_steps=self.rows_per_step // group,
                cost=self.cost,
                seed=derive_seed(self.seed, "rows", epoch),
            )
            while len(self._orders) > 1:  # a step reaches into two epochs at most
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = np.concatenate([balanced.rows.ravel(), balanced.left_over]).astype(np.int64)
        return self._orders[epoch]

    @cached_property
    def costs(self) -> npt.NDArray[np.float64]:
        """Cost of each row; float64 `[num_rows]`."""
        linear, quadratic = self.cost
        work = linear * self.lengths + quadratic * self.lengths.astype(np.float64) ** 2
        return np.add.reduceat(work, self.offsets[:-1])
