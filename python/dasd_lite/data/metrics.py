"""The metrics.jsonl of a training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dasd_lite.errors import CheckpointError, DataError


def parse_metrics(path: Path, number: int, line: str) -> dict[str, Any]:
    """Read a line of a training's metrics.jsonl."""
    try:
        found: dict[str, Any] = json.loads(line)
        found["step"], found["loss"], found["learning_rate"], found["grad_norm"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}:{number}: damaged ({error}); take the line out, or train again") from None
    return found


def truncate_metrics(path: Path, step: int) -> None:
    """Cut a metrics file back to its first `step` lines: those of the steps that the checkpoint knows."""
    data = path.read_bytes() if path.exists() else b""
    end = 0
    for i in range(step):
        end = data.find(b"\n", end) + 1
        if end == 0:
            raise CheckpointError(f"{path}: {i} steps, the checkpoint has {step}; remove {path.parent} to train afresh")
    if path.exists():
        os.truncate(path, end)
