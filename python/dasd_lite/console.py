"""What a person sees while a stage works: a bar with rate and time left, or plain lines in a log.

Input: a description, a total and a unit. Invariant: nothing is shown for work that is over within
two seconds, and standard output stays free for results; progress goes to standard error.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
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


def is_first() -> bool:
    """Tell whether this process speaks: the only one, or the first of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


@cache
def out() -> Console:
    """Return the console for results."""
    from rich.console import Console

    return Console(highlight=False, quiet=not is_first())


@cache
def err() -> Console:
    """Return the console for progress and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=not is_first())


@contextmanager
def progress(
    description: str, total: float, unit: str, done: float = 0, status: Callable[[], str] = str
) -> Iterator[Progress]:
    """Show the progress of `total` units of work, of which `done` were done by an earlier run.

    `status` is asked for what else there is to say whenever something is shown.
    """
    bar = (_Bar if err().is_terminal else _Lines)(description, total, unit, done, status)
    try:
        yield bar
    finally:
        bar.stop()


class _Bar:
    """A rich bar that appears once the work has taken two seconds."""

    def __init__(self, description: str, total: float, unit: str, done: float, status: Callable[[], str]) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            ProgressColumn,
            Task,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.text import Text

        class Status(ProgressColumn):
            max_refresh = 0.5

            def render(self, task: Task) -> Text:
                return Text(str(task.fields["note"]) or status(), style="dim", no_wrap=True, overflow="ellipsis")

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            Status(),
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
    """A line every ten seconds, also while nothing gets done."""

    def __init__(self, description: str, total: float, unit: str, done: float, status: Callable[[], str]) -> None:
        self._description, self._total, self._unit, self._status = description, total, unit, status
        self._start, self._done, self._note = done, 0.0, ""
        self._began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._print, name="progress", daemon=True)
        self._thread.start()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        self._note = note

    def _print(self) -> None:
        while not self._over.wait(_LINE_EVERY):
            rate = self._done / (time.monotonic() - self._began)
            line = f"{self._description}: {self._start + self._done:,.0f}/{self._total:,.0f} {self._unit}"
            if self._done:
                left = max(self._total - self._start - self._done, 0) / rate
                line += f", {rate:,.1f} {self._unit}/s, {duration(left)} left"
            err().print(", ".join(filter(None, [line, self._note or self._status()])), markup=False, soft_wrap=True)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def duration(seconds: float) -> str:
    """Write seconds as a person reads them: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
