"""Repeated n-grams, counted with numpy, with plain Python, and with datatrove.

    python benchmarks/peers/repeat.py FOLDER N SAMPLE

FOLDER has ids.npy, offsets.npy, and our result, num_repeated.npy. The slow peers get the first SAMPLE responses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timing import best, measure

FOLDER = Path(sys.argv[1])
N, SAMPLE = int(sys.argv[2]), int(sys.argv[3])
IDS, OFFSETS, EXPECTED = (np.load(FOLDER / f"{name}.npy") for name in ("ids", "offsets", "num_repeated"))


def main() -> None:
    """Measure each peer."""
    measure(
        {
            "numpy: hash mod 2^64, unique per response": with_numpy,
            "Python: set of tuples (sample)": with_tuples,
            "Python: set of bytes (sample)": with_bytes,
            "datatrove find_all_duplicate (sample)": with_datatrove,
        }
    )


def sample() -> list[Any]:
    """The ids of the first SAMPLE responses."""
    return [IDS[OFFSETS[at] : OFFSETS[at + 1]] for at in range(SAMPLE)]


def checked(work: Callable[[], list[int]], times: int, *, only_presence: bool = False) -> dict[str, Any]:
    """Time the peer; compare its count for each response with ours, or only whether the count is 0."""
    seconds, counts = best(work, times=times)
    expected, counted = EXPECTED[: len(counts)], np.array(counts)
    differ = (expected > 0) != (counted > 0) if only_presence else expected != counted
    num = int(OFFSETS[len(counts)])
    return {"seconds": seconds, "num": num, "responses": len(counts), "differing": int(differ.sum())}


def with_numpy() -> dict[str, Any]:
    """Hash every n-gram with a polynomial and subtract the number of distinct hashes. Not exact."""

    def run() -> list[int]:
        hashes = np.zeros(len(IDS) - N + 1, np.uint64)
        for at in range(N):
            hashes *= np.uint64(0x9E3779B97F4A7C15)
            hashes += IDS[at : at + len(hashes)].astype(np.uint64)
        counts = []
        for begin, end in zip(OFFSETS[:-1], OFFSETS[1:] - N + 1, strict=True):
            ngrams = hashes[begin : max(begin, end)]
            counts.append(len(ngrams) - len(np.unique(ngrams)))
        return counts

    return checked(run, 2)


def with_tuples() -> dict[str, Any]:
    """Subtract the number of distinct tuples from the number of n-grams."""
    lists = [ids.tolist() for ids in sample()]

    def run() -> list[int]:
        return [max(0, len(ids) - N + 1) - len(set(zip(*(ids[at:] for at in range(N)), strict=False))) for ids in lists]

    return checked(run, 1)


def with_bytes() -> dict[str, Any]:
    """Subtract the number of distinct byte strings from the number of n-grams."""

    def run() -> list[int]:
        counts = []
        for ids in sample():
            text = ids.tobytes()
            num = max(0, len(ids) - N + 1)
            counts.append(num - len({text[4 * at : 4 * (at + N)] for at in range(num)}))
        return counts

    return checked(run, 1)


def with_datatrove() -> dict[str, Any]:
    """Find duplicate n-grams of words that are ids. It skips past each one, so only their presence can be compared."""
    from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate

    words = [[f" {number}" for number in ids.tolist()] for ids in sample()]
    return checked(lambda: [find_all_duplicate(one, N) for one in words], 1, only_presence=True)


if __name__ == "__main__":
    main()
