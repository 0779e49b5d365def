"""Repeated n-grams of token ids, exactly: 20M ids, n = 20, against numpy, Python sets and datatrove.

    python benchmarks/bench_repeat.py

Ids are Zipf-like over 150,000 (what a response's loop repeats is copied into 5 % of the responses); responses have the
lengths of bench_pack.py. Prints ids per second, and in how many responses the number of repeated n-grams differs from
ours. Peers count repetitions only; ours finds the longest stretch of copies as well. The slow ones get the first
responses. Limit: reading the ids once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import harness  # first: it pins this process to one core
import numpy as np
from data import long_lengths, offsets_of
from numpy.typing import NDArray

from dasd_lite.method.sentences import repeated_ngrams

NUM_RESPONSES = 1_620
VOCABULARY = 150_000
N = 20
SAMPLE = 80  # responses that the slow ones get


def main() -> None:
    """Measure and print."""
    print(f"## Repeated n-grams\n\n{harness.machine()}\n")
    offsets = offsets_of(long_lengths(NUM_RESPONSES))
    ids = responses(offsets)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "ids.npy", ids)
        np.save(folder / "offsets.npy", offsets)

        def ours_and_limit() -> harness.Measured:
            seconds, repetition = harness.best(lambda: repeated_ngrams(ids, offsets, N))
            np.save(folder / "num_repeated.npy", repetition.num_repeated)
            limit = harness.native("read", folder / "ids.npy")
            return {"repeated_ngrams": {"seconds": seconds}} | limit

        ours, peers = harness.around(ours_and_limit, lambda: harness.peers("repeat", folder, N, SAMPLE))
        repeating = int((np.load(folder / "num_repeated.npy") > 0).sum())
    print(f"{len(ids) / 1e6:.1f}M ids in {NUM_RESPONSES:,} responses, {repeating} of which repeat {N} ids.\n")
    rows = []
    for label, one in (ours | peers).items():
        one.setdefault("num", len(ids))
        agrees = f"{one['differing']} of {one['responses']:,}" if "differing" in one else "–"
        rows.append((label, harness.speed(one, "M ids"), agrees, harness.faster(ours["repeated_ngrams"], one)))
    harness.table(("", "", "responses that differ", "ours is as fast"), rows)


def responses(offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    """Ids that do not repeat by themselves, and copied spans in 5 % of the responses."""
    rng = np.random.default_rng(3)
    ranks = np.exp(rng.random(offsets[-1], np.float32) * np.float32(np.log(VOCABULARY)))  # density 1 / rank
    ids = ranks.astype(np.int32) - 1
    for response in rng.choice(len(offsets) - 1, len(offsets) // 20, replace=False):
        begin, end = offsets[response], offsets[response + 1]
        span = min(int(rng.integers(50, 2_000)), int(end - begin) // 3)
        ids[end - span : end] = ids[begin : begin + span]
    return ids


if __name__ == "__main__":
    main()
