"""Balance rows over ranks: how long the slowest rank of a micro-step takes, compared with the mean.

    python benchmarks/bench_balance.py

The rows of bench_pack.py's plan on 8 and 64 ranks, 4 micro-steps to a step. A row costs 24,576·l + l² for each of its
sequences of l tokens: matrix products and attention. Every rank waits for the slowest one, so the mean over all
micro-steps of (largest ÷ mean cost of the ranks) is the time in which 1 would do. Peers: a random order, as a sampler
gives it; and the grouping by length of Hugging Face's trainer, fed with the rows' costs, without and with its shuffled
groups of 50 micro-steps. Of the time, the limits are to add up each row's cost, and to sort the costs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import harness  # first: it pins this process to one core
import numpy as np
from data import SEQ_LEN, long_lengths
from numpy.typing import NDArray

from dasd_lite.method.packing import balance_rows, pack_rows

MICRO_STEPS = 4
COST = (24_576, 1)


def main() -> None:
    """Measure and print."""
    print(f"## Balance rows over ranks\n\n{harness.machine()}\n")
    lengths = long_lengths(448_000)
    plan = pack_rows(lengths, SEQ_LEN)
    costs = row_costs(plan, lengths)
    add, _ = harness.best(lambda: row_costs(plan, lengths))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "costs.npy"
        np.save(file, costs.astype(np.uint64))
        sort = harness.native("sort", file)["sort of the keys"]["seconds"]
        for num_ranks in (8, 64):
            compare(plan, lengths, costs, num_ranks, file)
    print(f"Costs of {plan.num_rows:,} rows added up with numpy: {add * 1e3:.2f} ms; sorted: {sort * 1e3:.2f} ms.\n")


def compare(plan: Any, lengths: NDArray[np.int32], costs: NDArray[np.int64], num_ranks: int, file: Path) -> None:
    """Print the table of one number of ranks."""

    def ours() -> harness.Measured:
        run = lambda: balance_rows(plan, lengths, num_ranks=num_ranks, micro_steps=MICRO_STEPS, cost=COST, seed=0)  # noqa: E731
        seconds, balanced = harness.best(run)
        taken = np.concatenate((balanced.rows.ravel(), balanced.left_over))
        assert len(np.unique(taken)) == len(taken) == plan.num_rows, "every row is there once"
        return {"balance_rows": {"seconds": seconds, "rows": balanced.rows}}

    def shuffled() -> dict[str, Any]:
        seconds, order = harness.best(lambda: np.random.default_rng(0).permutation(plan.num_rows))
        return {"seconds": seconds, "rows": in_steps(order, num_ranks)}

    def peers() -> harness.Measured:
        measured = harness.peers("balance", file, num_ranks)
        for one in measured.values():
            if "order" in one:
                one["rows"] = in_steps(np.array(one.pop("order")), num_ranks)
        return {"random order": shuffled()} | measured

    ours_found, peers_found = harness.around(ours, peers)
    rows = []
    for name, one in (ours_found | peers_found).items():
        shown = ("–", "–")
        if "rows" in one:
            idle = imbalance(costs, one["rows"])
            shown = (f"{idle:.5f}", f"{len(one['rows']):,}")
        rows.append((name, harness.milliseconds(one), *shown))
    print(f"{num_ranks} ranks.\n")
    harness.table(("", "time", "largest ÷ mean", "micro-steps"), rows)


def row_costs(plan: Any, lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """Cost of each row of a plan."""
    each = lengths[plan.items].astype(np.int64)
    return np.add.reduceat(COST[0] * each + COST[1] * each * each, plan.offsets[:-1])


def in_steps(order: NDArray[Any], num_ranks: int) -> NDArray[Any]:
    """An order dealt out to ranks, without what does not fill a step."""
    step = num_ranks * MICRO_STEPS
    return order[: len(order) // step * step].reshape(-1, num_ranks)


def imbalance(costs: NDArray[np.int64], rows: NDArray[Any]) -> float:
    """Mean over micro-steps of the largest cost of a rank ÷ their mean."""
    dealt = costs[rows]
    return float((dealt.max(1) / dealt.mean(1)).mean())


if __name__ == "__main__":
    main()
