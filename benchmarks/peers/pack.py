"""Packers in Python and C++ on the same lengths.

    python benchmarks/peers/pack.py LENGTHS.npy SEQ_LEN [lightbinpack]

Each gets the lengths in the form it needs (a list, an array); the conversion is not timed. Only the rows of a packing
of all lengths at once are comparable: by default TRL, LLaMA-Factory and axolotl pack window by window, which takes less
time and more rows.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from timing import best, measure

LENGTHS = np.load(sys.argv[1])
SEQ_LEN = int(sys.argv[2])
WINDOW = 1_000  # LLaMA-Factory's preprocessing_batch_size


def main() -> None:
    """Measure each packer."""
    lightbinpack = {
        f"lightbinpack {name}": lambda name=name: light(name) for name in ("obfd", "obfdp", "ogbfd", "bfd", "ffd")
    }
    others = {
        "TRL pack_dataset, 1,000 at a time (lengths ÷ 64)": lambda: trl(1_000),
        "TRL pack_dataset, all at once (lengths ÷ 64)": lambda: trl(len(LENGTHS)),
        "LLaMA-Factory greedy_knapsack, 1,000 at a time": knapsack_windows,
        "LLaMA-Factory greedy_knapsack, all at once": knapsack,
        "axolotl pack_parallel, groups of 100,000": axolotl,
    }
    measure(lightbinpack if sys.argv[3:] == ["lightbinpack"] else lightbinpack | others)


def light(name: str) -> dict[str, Any]:
    """One of lightbinpack's functions in C++, which take and return lists."""
    import lightbinpack

    lengths = LENGTHS.tolist()
    seconds, rows = best(lambda: getattr(lightbinpack, name)(lengths, SEQ_LEN), times=3)
    return {"seconds": seconds, "rows": len(rows)}


def trl(window: int) -> dict[str, Any]:
    """TRL's packing of a dataset, `window` sequences at a time.

    It moves the tokens while it packs. So all lengths and the row are divided by 64 (rounded up) and tokens have one
    byte: 90 MB to move instead of 22 GB, and a search tree of 10 levels instead of 16.
    """
    import pyarrow as pa
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    offsets = np.concatenate(([0], np.cumsum(-(-LENGTHS // 64), dtype=np.int32)))
    tokens = pa.array(np.zeros(offsets[-1], np.uint8))
    dataset = Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), tokens)}))
    options = {"batch_size": window, "keep_in_memory": True}
    seconds, rows = best(lambda: pack_dataset(dataset, SEQ_LEN // 64, "bfd", options), times=2)
    return {"seconds": seconds, "rows": len(rows)}


def knapsack_windows() -> dict[str, Any]:
    """LLaMA-Factory's greedy_knapsack on windows, as LLaMA-Factory calls it."""
    from llama_factory import greedy_knapsack

    windows = [LENGTHS[at : at + WINDOW].tolist() for at in range(0, len(LENGTHS), WINDOW)]
    # It empties its argument.
    seconds, rows = best(lambda: sum(len(greedy_knapsack(window.copy(), SEQ_LEN)) for window in windows), times=3)
    return {"seconds": seconds, "rows": rows}


def knapsack() -> dict[str, Any]:
    """The same on all lengths at once, which LLaMA-Factory does not do."""
    from llama_factory import greedy_knapsack

    lengths = LENGTHS.tolist()
    seconds, rows = best(lambda: len(greedy_knapsack(lengths.copy(), SEQ_LEN)), times=2)
    return {"seconds": seconds, "rows": rows}


def axolotl() -> dict[str, Any]:
    """Axolotl's defaults: first fit in groups, in the given order, with numba, in one process."""
    from axolotl.utils.samplers.multipack import pack_parallel

    run = lambda: pack_parallel(LENGTHS, SEQ_LEN, 100_000, 200, num_processes=1)  # noqa: E731
    pack_parallel(LENGTHS[:1_000], SEQ_LEN, 100_000, 200, num_processes=1)  # compiles
    seconds, rows = best(run, times=1)
    return {"seconds": seconds, "rows": len(rows)}


if __name__ == "__main__":
    main()
