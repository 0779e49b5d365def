"""What torchrun and our launcher tell this process about itself, in environment variables."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from dasd_lite.console import is_rank
from dasd_lite.costs.cards import usable_gpus

LAUNCHED = "DASD_LITE_LAUNCHED"
"""Set in processes that our launcher starts, not in those of torchrun on the command line."""

WAIT_MINUTES = 30
"""How long a process that trains waits for the others before all are ended."""


_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name before torch 2.9


def training_gpus() -> list[str]:
    """Return the GPUs to train on, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    import torch

    return usable_gpus() if torch.cuda.device_count() else []


def rank_environment(num_processes: int, gpus: Sequence[str] = ()) -> dict[str, str]:
    """Return what processes that train need in their environment beside this one's.

    Args:
        num_processes: How many there are on this machine.
        gpus: Those that they train on; none: the CPU.
    """
    given = {LAUNCHED: "1"}
    if "OMP_NUM_THREADS" not in os.environ:  # each would take all cores, for the CPU's part of loading too
        given["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))
    if gpus:
        given["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        # Every row has another length: blocks of fixed sizes would leave some GB of fragments.
        if not any(name in os.environ for name in _ALLOCATOR):
            given[_ALLOCATOR[0]] = "expandable_segments:True"
    return given


def num_ranks() -> int:
    """Return how many processes train together, this one included."""
    return int(os.environ["WORLD_SIZE"]) if is_rank() else 1


def stop_numbers() -> tuple[signal.Signals, ...]:
    """Return the signals that ask this process to stop. The parent forwards Ctrl-C to those that it launched."""
    return (signal.SIGTERM,) if LAUNCHED in os.environ else (signal.SIGINT, signal.SIGTERM)
