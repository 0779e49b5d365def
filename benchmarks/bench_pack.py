"""Decide packing: 448,000 lengths into rows of 65,536, against every packer one could install instead.

    python benchmarks/bench_pack.py

Prints milliseconds and rows of each; beside them the counting sort with which any best fit begins, and the fewest rows
that could hold all tokens. Then ours alone on 10,000 and 5,000,000 lengths of the same law.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import harness  # first: it pins this process to one core
import numpy as np
from data import SEQ_LEN, fewest_rows, long_lengths

from dasd_lite.method.packing import pack_rows

NUM = 448_000


def main() -> None:
    """Measure and print."""
    print(f"## Decide packing\n\n{harness.machine()}\n")
    lengths = long_lengths(NUM)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lengths.npy"
        np.save(file, lengths)

        def ours_and_native() -> harness.Measured:
            seconds, plan = harness.best(lambda: pack_rows(lengths, SEQ_LEN), times=9)
            return {"pack_rows": {"seconds": seconds, "rows": plan.num_rows}} | harness.native("pack", file, SEQ_LEN)

        ours, peers = harness.around(ours_and_native, lambda: harness.peers("pack", file, SEQ_LEN))
    print(f"{NUM:,} lengths, {lengths.sum(dtype=np.int64) / 1e9:.2f}G tokens, rows of {SEQ_LEN:,}.\n")
    every = ours | peers
    rows = [
        (
            name,
            harness.milliseconds(one),
            f"{one['rows']:,}" if "rows" in one else "–",
            harness.faster(ours["pack_rows"], one),
        )
        for name, one in every.items()
    ]
    rows.append(("no packing needs fewer rows than", "–", f"{fewest_rows(lengths):,}", "–"))
    harness.table(("", "time", "rows", "ours is as fast"), rows)
    other_sizes()


def other_sizes() -> None:
    """Ours on fewer and on more lengths, beside the counting sort of the same lengths."""
    rows = []
    for num in (10_000, NUM, 5_000_000):
        lengths = long_lengths(num)
        seconds, plan = harness.best(lambda lengths=lengths: pack_rows(lengths, SEQ_LEN))
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder) / "lengths.npy", lengths)
            sort = harness.native("sort-lengths", Path(folder) / "lengths.npy", SEQ_LEN)["counting sort"]["seconds"]
        rows.append(
            (
                f"{num:,}",
                f"{seconds * 1e3:,.2f} ms",
                f"{seconds / num * 1e9:,.1f} ns",
                f"{sort * 1e3:,.2f} ms",
                f"{seconds / sort:,.2f}",
                f"{plan.num_rows:,}",
                f"{fewest_rows(lengths):,}",
            )
        )
    harness.table(("lengths", "pack_rows", "a length", "counting sort", "ratio", "rows", "at least"), rows)


if __name__ == "__main__":
    main()
