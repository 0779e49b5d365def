"""Pack tightly: rows that `method="tight"` saves over best-fit-decreasing, its peers, and the fewest that could be.

    python benchmarks/bench_tight.py

On the 448,000 lengths of bench_pack.py, where best fit is nearly at the bound, and on 100,000 lengths uniform between a
seventh and a half of a row, where it is not. Prints milliseconds, rows, and rows above the bound.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import harness  # first: it pins this process to one core
import numpy as np
from data import SEQ_LEN, fewest_rows, long_lengths
from numpy.typing import NDArray

from dasd_lite.method.packing import pack_rows


def main() -> None:
    """Measure and print."""
    print(f"## Pack tightly\n\n{harness.machine()}\n")
    uniform = np.random.default_rng(0).integers(SEQ_LEN // 7, SEQ_LEN // 2, 100_000, endpoint=True, dtype=np.int32)
    compare("448,000 lognormal lengths (median 9,000, σ 0.8)", long_lengths(448_000))
    compare("100,000 lengths uniform between 1/7 and 1/2 of a row", uniform)


def compare(title: str, lengths: NDArray[np.int32]) -> None:
    """Print the table of one set of lengths."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lengths.npy"
        np.save(file, lengths)

        def ours_and_native() -> harness.Measured:
            measured = {}
            for method in ("tight", "best_fit"):
                seconds, plan = harness.best(lambda method=method: pack_rows(lengths, SEQ_LEN, method=method))
                measured[f"pack_rows, {method}"] = {"seconds": seconds, "rows": plan.num_rows}
            return measured | harness.native("pack", file, SEQ_LEN)

        ours, peers = harness.around(ours_and_native, lambda: harness.peers("pack", file, SEQ_LEN, "lightbinpack"))
    bound = fewest_rows(lengths)
    rows = []
    for name, one in (ours | peers).items():
        more = (
            (f"{one['rows']:,}", f"{one['rows'] - bound:,}", f"{one['rows'] / bound - 1:.3%}")
            if "rows" in one
            else ("–",) * 3
        )
        rows.append((name, harness.milliseconds(one), *more, harness.faster(ours["pack_rows, tight"], one)))
    print(f"{title}: at least {bound:,} rows of {SEQ_LEN:,}.\n")
    harness.table(("", "time", "rows", "above the bound", "", "tight is as fast"), rows)


if __name__ == "__main__":
    main()
