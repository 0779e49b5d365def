"""The GPUs that work together: those that are visible, without one that is much smaller than the others."""

from __future__ import annotations

import os

_SMALLEST = 1 / 4  # of the largest one's memory; under that it drives a display, and would set the limit for all


def usable_gpus() -> list[int]:
    """Return the visible GPUs as torch counts them, without those far smaller than the largest.

    With one GPU nothing is asked of it: that would make a CUDA context in this process.
    """
    import torch

    number = int(torch.cuda.device_count())
    if number < 2:
        return list(range(number))
    memory = [int(torch.cuda.get_device_properties(i).total_memory) for i in range(number)]
    return [i for i in range(number) if memory[i] >= _SMALLEST * max(memory)]


def left_out_gpus() -> list[str]:
    """Return the names of visible GPUs that are not usable."""
    import torch

    left_out = set(range(int(torch.cuda.device_count()))) - set(usable_gpus())
    return [torch.cuda.get_device_name(i) for i in sorted(left_out)]


def visible_devices(gpus: list[int]) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES that leaves only these of the GPUs that are visible now."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return ",".join(visible[i] if visible else str(i) for i in gpus)
