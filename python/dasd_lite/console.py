"""What a person sees while a stage works: results, notes, and progress with its rate and time left.

Input: lines of text; or a description, a total, and a unit. Output: results on standard output, notes and
progress on standard error. Invariant: work that ends within two seconds shows no progress.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_BAR_AFTER = 2.0  # seconds, on a terminal
_LINE_EVERY = 10.0  # seconds, in a log


def is_rank() -> bool:
    """Return whether torchrun, or our launcher, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_first() -> bool:
    """Return whether this process may print: it is the only one, or the first of several."""
    return not is_rank() or os.environ["RANK"] == "0"


@cache
def out() -> Console:
    """Return the console for results."""
    from rich.console import Console

    return Console(highlight=False, quiet=not is_first())


@cache
def err() -> Console:
    """Return the console for notes and progress."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=not is_first())


def say(text: str) -> None:
    """Print a line of results as it is: unwrapped, brackets and all."""
    out().print(text, markup=False, soft_wrap=True)


def say_note(text: str) -> None:
    """Print a note among the results of `check`, which are read and kept together."""
    say(f"note: {text}")


def note(text: str) -> None:
    """Print a line that deserves attention but stops nothing."""
    err().print(f"note: {text}", markup=False, soft_wrap=True)


def label(phase: str, work: str) -> str:
    """Return what progress calls some work; a folder or call without a phase has no name for it."""
    return f"{phase}: {work}" if phase else work


@contextmanager
def progress(
    description: str, total: float, unit: str, done: float = 0, status: Callable[[], str] = str
) -> Iterator[Progress]:
    """Show the progress of `total` units of work, of which an earlier run did `done`.

    `status` is called for more to show, such as the state of a server, at every update.
    """
    shown = Progress(description, total, unit, done, status)
    try:
        yield shown
    finally:
        shown.stop()


class Progress:
    """Work under way: a bar on a terminal, a line every ten seconds in a log, even while nothing advances."""

    def __init__(self, description: str, total: float, unit: str, done: float, status: Callable[[], str]) -> None:
        """Begin to measure; the first output comes later."""
        self._description, self._total, self._unit, self._status = description, total, unit, status
        self._before, self._done, self._note = done, 0.0, ""
        self._began = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
        self._thread.start()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count `amount` more units as done; `note` is shown after the figures."""
        self._done += amount
        self._note = note

    def stop(self) -> None:
        """Remove the bar and stop printing."""
        self._stopped.set()
        self._thread.join()

    def _show(self) -> None:
        if not err().is_terminal:
            while not self._stopped.wait(_LINE_EVERY):
                err().print(f"{self._description}: {self._figures()}", markup=False, soft_wrap=True)
        elif not self._stopped.wait(_BAR_AFTER):
            from rich.live import Live

            with Live(get_renderable=self._bar, console=err(), refresh_per_second=2, transient=True):
                self._stopped.wait()

    def _bar(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(self._total, self._before + self._done, width=24)
        line.add_row(Text(self._description), bar, Text(self._figures(), no_wrap=True, overflow="ellipsis"))
        return line

    def _figures(self) -> str:
        seconds = time.monotonic() - self._began
        figures = f"{self._before + self._done:,.0f}/{self._total:,.0f} {self._unit}"
        if self._done:
            left = max(self._total - self._before - self._done, 0) / self._done * seconds
            figures += f", {self._done / seconds:,.1f} {self._unit}/s, {duration(left)} left"
        return ", ".join(filter(None, [figures, self._note or self._status()]))


def duration(seconds: float) -> str:
    """Write seconds as a person reads them: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
