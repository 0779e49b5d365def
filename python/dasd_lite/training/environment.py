"""What torchrun and our launcher tell this process about itself, in environment variables."""

from __future__ import annotations

import os
import signal

from dasd_lite.console import is_rank

LAUNCHED = "DASD_LITE_LAUNCHED"
"""Set in processes that our launcher starts, not in those of torchrun on the command line."""


def num_ranks() -> int:
    """Return how many processes train together, this one included."""
    return int(os.environ["WORLD_SIZE"]) if is_rank() else 1


def stop_numbers() -> tuple[signal.Signals, ...]:
    """Return the signals that ask this process to stop. The parent forwards Ctrl-C to those that it launched."""
    return (signal.SIGTERM,) if LAUNCHED in os.environ else (signal.SIGINT, signal.SIGTERM)
