"""LLaMA-Factory's packing.

Importing `llamafactory.data` would also load its dependencies for audio and images. So its folder is registered as a
package without running its `__init__`; its modules are used as installed.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

_spec = importlib.util.find_spec("llamafactory")
if _spec is None or _spec.origin is None:
    raise ModuleNotFoundError("llamafactory")
_data = types.ModuleType("llamafactory.data")
_data.__path__ = [str(Path(_spec.origin).parent / "data")]
sys.modules["llamafactory.data"] = _data

from llamafactory.data.processor.processor_utils import greedy_knapsack  # noqa: E402
from llamafactory.data.processor.supervised import PackedSupervisedDatasetProcessor  # noqa: E402

__all__ = ["PackedSupervisedDatasetProcessor", "greedy_knapsack"]
