"""metrics.jsonl of a training run: one line per step.

Input: the file, which a training run may be writing. Output: the figures of each step. Invariant: after a restart the
file ends with the step that the checkpoint holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dasd_lite.errors import CheckpointError, DataError


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the figures of each step; nothing if there is no file. A last line without its end is still being written.

    Raises:
        DataError: A line is not a step; names the line.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                step: dict[str, Any] = json.loads(line)
                int(step["step"]), float(step["loss"]), float(step["learning_rate"]), float(step["grad_norm"] or 0)
            except (ValueError, KeyError, TypeError) as error:
                finished = (path.parent / "manifest.json").exists()
                remedy = "delete the line" if finished else f"remove {path.parent} to train from scratch"
                raise DataError(f"{path}:{number}: damaged ({error}); {remedy}") from None
            yield step


def truncate_metrics(path: Path, num_steps: int) -> None:
    """Cut off the lines after the first `num_steps`, which the checkpoint does not know."""
    data = path.read_bytes() if path.exists() else b""
    end = 0
    for step in range(num_steps):
        end = data.find(b"\n", end) + 1
        if end == 0:
            raise CheckpointError(
                f"{path}: has {step} steps, the checkpoint has {num_steps}; remove {path.parent} to train from scratch"
            )
    if path.exists():
        os.truncate(path, end)
