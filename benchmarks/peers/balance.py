"""The grouping by length of Hugging Face's trainer, with the costs of rows as their lengths.

    python benchmarks/peers/balance.py COSTS.npy NUM_RANKS

It shuffles the rows, cuts them into groups of `mega_batch_mult` batches, and sorts each group. Its default is 50; one
group of all rows is the best that it can do.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from timing import best, measure

COSTS = np.load(sys.argv[1]).tolist()
NUM_RANKS = int(sys.argv[2])


def main() -> None:
    """Measure both."""
    measure(
        {
            "transformers, groups of 50 micro-steps": lambda: group(50),
            "transformers, one group": lambda: group(len(COSTS) // NUM_RANKS + 1),
        }
    )


def group(micro_steps: int) -> dict[str, Any]:
    """Order the rows so that each NUM_RANKS consecutive rows have similar costs."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    def run() -> list[int]:
        return get_length_grouped_indices(COSTS, NUM_RANKS, micro_steps, torch.Generator().manual_seed(0))

    seconds, order = best(run, times=3)
    return {"seconds": seconds, "order": [int(index) for index in order]}


if __name__ == "__main__":
    main()
