"""Which GPUs are worth using: a small card that drives a display is left out.

Input: what CUDA_VISIBLE_DEVICES and the driver say. Output: names for CUDA_VISIBLE_DEVICES. Invariant: this process
gets no CUDA context, which would hold 0.5 GB of a card for as long as it runs.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

from dasd_lite.console import note

_SMALL = 0.25  # of the largest card's memory
_ASK = """
import json, torch
properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
print(json.dumps([(each.name, each.total_memory) for each in properties]))
"""


def usable_gpus() -> list[str]:
    """Return the GPUs that this process may use and that are worth it, named as in CUDA_VISIBLE_DEVICES.

    A card with less than a quarter of the largest one's memory is left out, with a note: every engine and every process
    of a training would have to do with what the smallest holds.
    """
    names = visible_gpus()
    if len(names) < 2:
        return names
    cards = _cards(tuple(names))
    if len(cards) != len(names):  # the driver sees others than the variable names
        return names
    largest = max(memory for _, memory in cards)
    return [name for name, (_, memory) in zip(names, cards, strict=True) if memory >= _SMALL * largest]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices is not None:
        return [name.strip() for name in devices.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


@functools.cache
def _cards(names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Ask another process for the model and the bytes of each card, and note those that are too small."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(names)}
    asked = subprocess.run([sys.executable, "-c", _ASK], env=environment, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        return []
    cards = [(str(name), int(memory)) for name, memory in json.loads(asked.stdout.splitlines()[-1])]
    largest = max((memory for _, memory in cards), default=0)
    for device, (card, memory) in zip(names, cards, strict=False):
        if memory < _SMALL * largest:
            note(
                f"GPU {device} ({card}, {memory / 1e9:.0f} GB) is not used: it has less than a quarter of the largest"
                f" one's {largest / 1e9:.0f} GB; set CUDA_VISIBLE_DEVICES={device} to use it alone"
            )
    return cards
