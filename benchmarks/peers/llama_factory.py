"""LLaMA-Factory's packing.

Importing `llamafactory.data` would load what it needs for sound and images as well. Its folder is therefore entered as
a package whose `__init__` is passed over; everything in it is as installed.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

_found = importlib.util.find_spec("llamafactory")
if _found is None or _found.origin is None:
    raise ModuleNotFoundError("llamafactory")
_data = types.ModuleType("llamafactory.data")
_data.__path__ = [str(Path(_found.origin).parent / "data")]
sys.modules["llamafactory.data"] = _data

from llamafactory.data.processor.processor_utils import greedy_knapsack  # noqa: E402
from llamafactory.data.processor.supervised import PackedSupervisedDatasetProcessor  # noqa: E402

__all__ = ["PackedSupervisedDatasetProcessor", "greedy_knapsack"]
