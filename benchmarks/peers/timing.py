"""Shared by the scripts of the peers: measures each peer alone; one that cannot run reports why instead of a time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import best

__all__ = ["best", "measure"]

# No library may contact a model hub or print its progress.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1", "DISABLE_VERSION_CHECK": "1"}


def measure(peers: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Run each function, which measures one peer, and print the measurements as JSON."""
    measured = {}
    for name, peer in peers.items():
        try:
            with _quiet():
                measured[name] = peer()
        except Exception as error:  # its row in the table shows why it did not run
            measured[name] = {
                "missing": f"not run: {type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
            }
    print(json.dumps(measured))


@contextmanager
def _quiet() -> Iterator[None]:
    """Redirect what libraries print to standard error, because standard output carries the JSON."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
