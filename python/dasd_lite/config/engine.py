"""Which engine runs the student of a recipe that leaves `student.kind` out.

Input: the tables as written, the run folder, this machine. Output: the kind, and why. Invariant: a run keeps the engine
that it began with, so its fingerprints stay what they were; and torch is not imported, which takes seconds.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dasd_lite.config.models import Transformers, Vllm

RECIPE_FILE = "recipe.json"
"""The resolved recipe in a run folder."""
_DRIVERS = ("nvidiactl", "dxg", "nvmap", "kfd")  # CUDA, in Windows, on a Jetson, ROCm
_OWN_OPTIONS = {
    "transformers": Transformers.model_fields.keys() - Vllm.model_fields.keys(),
    "vllm": Vllm.model_fields.keys() - Transformers.model_fields.keys(),
}


def has_gpu_driver() -> bool:
    """Return whether a GPU may be visible, by the drivers' device files; where there are no such files, it may."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices is not None and devices.strip() in ("", "-1"):
        return False
    return not Path("/dev").is_dir() or any(Path("/dev", driver).exists() for driver in _DRIVERS)


def student_kind(student: Mapping[str, Any], evaluations: Iterable[Mapping[str, Any]], out: object) -> tuple[str, str]:
    """Return the kind of a student's table that names none, and a line that says why.

    Args:
        student: The table as written.
        evaluations: The tables `evaluate` of the recipe and its phases, as written.
        out: The run folder, as written.
    """
    named = {kind: key for kind, options in _OWN_OPTIONS.items() for key in student if key in options}
    if len(named) == 1:
        ((kind, key),) = named.items()
        return kind, f"student.kind = {kind!r}, which student.{key} belongs to"
    if any(table.get("four_bit") is True for table in evaluations):
        return "transformers", "student.kind = 'transformers', which evaluate.four_bit belongs to"
    if isinstance(out, str) and (before := _kind_in(Path(out))) is not None:
        return before, f"student.kind = {before!r}, as this run began"
    if not has_gpu_driver():
        return "transformers", "student.kind = 'transformers': no GPU is visible"
    if importlib.util.find_spec("vllm") is None:
        return "transformers", "student.kind = 'transformers': vLLM is not installed"
    return "vllm", "student.kind = 'vllm': a GPU and vLLM are here"


def _kind_in(run: Path) -> str | None:
    """Return the student's kind in the recipe of a run; None if nothing of it is finished yet."""
    try:
        kind = json.loads((run / RECIPE_FILE).read_text(encoding="utf-8"))["student"]["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind if kind in _OWN_OPTIONS else None
