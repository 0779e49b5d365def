"""What a person sees while a stage works: a bar with rate and time left, or plain lines in a log.

Input: a description, a total and a unit. Invariant: nothing is shown for work that is over within
two seconds, and standard output stays free for results; progress goes to standard error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

_SHOW_AFTER = 2.0  # seconds
_LINE_EVERY = 10.0  # seconds, when not a terminal


class Progress(Protocol):
    """Work under way."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count `amount` more units as done; `note` is shown behind the bar."""
        ...


@cache
def out() -> Console:
    """Return the console for results."""
    from rich.console import Console

    return Console(highlight=False)


@cache
def err() -> Console:
    """Return the console for progress and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def progress(description: str, total: float, unit: str, done: float = 0) -> Iterator[Progress]:
    """Show the progress of `total` units of work, of which `done` were done by an earlier run."""
    if not err().is_terminal:
        yield _Lines(description, total, unit, done)
        return
    bar = _Bar(description, total, unit, done)
    try:
        yield bar
    finally:
        bar.stop()


class _Bar:
    """A rich bar that appears once the work has taken two seconds."""

    def __init__(self, description: str, total: float, unit: str, done: float) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=err(),
            transient=True,
        )
        self._task = self._bar.add_task(description, total=total, completed=int(done), rate="", note="")
        self._began, self._unit, self._done = time.monotonic(), unit, 0.0
        self._timer = threading.Timer(_SHOW_AFTER, self._bar.start)  # also when the first item takes long
        self._timer.daemon = True
        self._timer.start()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        rate = f"{self._done / max(time.monotonic() - self._began, 1e-9):,.1f} {self._unit}/s"
        self._bar.update(self._task, advance=amount, rate=rate, note=note)

    def stop(self) -> None:
        self._timer.cancel()
        self._timer.join()
        self._bar.stop()


class _Lines:
    """A line every ten seconds."""

    def __init__(self, description: str, total: float, unit: str, done: float) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._start, self._done = done, 0.0
        self._began = self._last = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last < _LINE_EVERY:
            return
        self._last = now
        rate = self._done / (now - self._began)
        left = max(self._total - self._start - self._done, 0) / max(rate, 1e-9)
        line = f"{self._description}: {self._start + self._done:,.0f}/{self._total:,.0f} {self._unit}"
        err().print(f"{line}, {rate:,.1f} {self._unit}/s, {left:,.0f} s left {note}".rstrip())
