"""Decide packing: 448K long-CoT lengths into rows of 65,536, against a plain sort and a bisect-based best fit.

    python benchmarks/bench_pack.py

Lengths are lognormal (median 9,000, σ 0.8), clipped to 64…65,536. Prints milliseconds (best of five) and ratios.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

import numpy as np

from dasd_lite.packing import pack_rows

SEQ_LEN = 65_536
NUM = 448_000


def main() -> None:
    """Measure and print."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(9_000), 0.8, NUM)).clip(64, SEQ_LEN).astype(np.int32)
    bound = -(-int(lengths.sum(dtype=np.int64)) // SEQ_LEN)
    print(f"{NUM:,} lengths, {lengths.sum(dtype=np.int64) / 1e9:.2f}G tokens, at least {bound:,} rows of {SEQ_LEN:,}")
    sort = best(lambda: np.sort(lengths))
    ours = best(lambda: pack_rows(lengths, SEQ_LEN))
    plan = pack_rows(lengths, SEQ_LEN)
    print(f"pack_rows            {ours * 1e3:9.2f} ms   {plan.num_rows:,} rows, {plan.fill:.3%} full")
    print(f"numpy sort           {sort * 1e3:9.2f} ms   ours takes {ours / sort:.2f} × as long")
    start = time.perf_counter()
    rows = best_fit_by_bisection(lengths.tolist())
    plain = time.perf_counter() - start
    print(f"best fit by bisect   {plain * 1e3:9.2f} ms   {rows:,} rows; ours is {plain / ours:.0f} × as fast")


def best(work: Callable[[], Any], times: int = 5) -> float:
    """Return the fewest seconds of several runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def best_fit_by_bisection(lengths: list[int]) -> int:
    """Pack with best-fit-decreasing over a sorted list, as one would write it in Python; return the rows."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect_left(room, length)
        left = (room.pop(place) if place < len(room) else SEQ_LEN) - length
        insort(room, left)
    return len(room)


if __name__ == "__main__":
    main()
