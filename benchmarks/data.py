"""Inputs shared by several benchmarks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SEQ_LEN = 65_536


def long_lengths(num: int, seed: int = 0) -> NDArray[np.int32]:
    """Lengths of long reasoning answers in tokens: lognormal, median 9,000, σ 0.8, clipped to 64…65,536."""
    normal = np.random.default_rng(seed).normal(np.log(9_000), 0.8, num)
    return np.exp(normal).clip(64, SEQ_LEN).astype(np.int32)


def offsets_of(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Offsets of consecutive spans of these lengths."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def fewest_rows(lengths: NDArray[np.integer]) -> int:
    """Lower bound on the rows of any packing: all tokens ÷ tokens per row, rounded up."""
    return -(-int(lengths.sum(dtype=np.int64)) // SEQ_LEN)
