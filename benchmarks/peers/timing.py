"""What the peers' scripts share: each peer is measured alone, and one that is not there says why instead of a time."""

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

# None of the libraries may look for a model hub or print how it is doing.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1", "DISABLE_VERSION_CHECK": "1"}


def measure(peers: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Run each function, which measures one peer, and print all that they return as JSON."""
    found = {}
    for name, peer in peers.items():
        try:
            with _quiet():
                found[name] = peer()
        except Exception as error:  # whatever keeps a peer from running belongs into its row
            found[name] = {
                "missing": f"not run: {type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
            }
    print(json.dumps(found))


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what a library prints to the standard error output: the standard output is ours."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
