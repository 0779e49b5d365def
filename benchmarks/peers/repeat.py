"""Repeated n-grams as one would count them with numpy and Python, and as datatrove does.

    python benchmarks/peers/repeat.py FOLDER N SAMPLE

FOLDER has ids.npy, offsets.npy, and num_repeated.npy, which ours found. Python's ways get the first SAMPLE responses.
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
    """Measure each."""
    measure(
        {
            "numpy: hash mod 2^64, unique per response": with_numpy,
            "Python: set of tuples (sample)": with_tuples,
            "Python: set of bytes (sample)": with_bytes,
            "datatrove find_all_duplicate (sample)": with_datatrove,
        }
    )


def sample() -> list[Any]:
    """The first responses."""
    return [IDS[OFFSETS[at] : OFFSETS[at + 1]] for at in range(SAMPLE)]


def checked(work: Callable[[], list[int]], times: int, *, only_whether: bool = False) -> dict[str, Any]:
    """Time it; compare the number per response with ours, or only whether there is any."""
    seconds, found = best(work, times=times)
    expected, counted = EXPECTED[: len(found)], np.array(found)
    differ = (expected > 0) != (counted > 0) if only_whether else expected != counted
    num = int(OFFSETS[len(found)])
    return {"seconds": seconds, "num": num, "responses": len(found), "differing": int(differ.sum())}


def with_numpy() -> dict[str, Any]:
    """A polynomial hash of each n-gram, all positions at once; n-grams less different hashes. Not exact."""

    def run() -> list[int]:
        hashes = np.zeros(len(IDS) - N + 1, np.uint64)
        for at in range(N):
            hashes *= np.uint64(0x9E3779B97F4A7C15)
            hashes += IDS[at : at + len(hashes)].astype(np.uint64)
        found = []
        for begin, end in zip(OFFSETS[:-1], OFFSETS[1:] - N + 1, strict=True):
            ngrams = hashes[begin : max(begin, end)]
            found.append(len(ngrams) - len(np.unique(ngrams)))
        return found

    return checked(run, 2)


def with_tuples() -> dict[str, Any]:
    """N-grams less different tuples."""
    lists = [ids.tolist() for ids in sample()]

    def run() -> list[int]:
        return [max(0, len(ids) - N + 1) - len(set(zip(*(ids[at:] for at in range(N)), strict=False))) for ids in lists]

    return checked(run, 1)


def with_bytes() -> dict[str, Any]:
    """N-grams less different stretches of the ids' bytes."""

    def run() -> list[int]:
        found = []
        for ids in sample():
            text = ids.tobytes()
            num = max(0, len(ids) - N + 1)
            found.append(num - len({text[4 * at : 4 * (at + N)] for at in range(num)}))
        return found

    return checked(run, 1)


def with_datatrove() -> dict[str, Any]:
    """Duplicate n-grams of words that are ids; it skips what it found, so only whether there are any compares."""
    from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate

    words = [[f" {number}" for number in ids.tolist()] for ids in sample()]
    return checked(lambda: [find_all_duplicate(one, N) for one in words], 1, only_whether=True)


if __name__ == "__main__":
    main()
