"""kill -9 at chosen moments: the one harness for everything that must resume.

A moment is the n-th time that something happens in a process (a path is opened, renamed or removed, a folder is made,
SQLite gets a statement), or some processor time after it. The process dies of it by itself and without a word, so a
kill lands on machines of any speed. `Commands` runs the command line in forks; as a program, this file is their parent.
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KILLS = int(os.environ.get("DASD_KILLS", "5"))
"""Kills of each test that kills; `make torture` sets 200."""
DEATHS = (-signal.SIGKILL, -signal.SIGPROF)
_AUDITED = {"open": 1, "os.rename": 2, "os.remove": 1, "os.mkdir": 1}  # and how many of the arguments are paths


@dataclass(frozen=True)
class Moment:
    """When an event matches `event`, a regular expression, for the `number`-th time; or `cpu_s` later.

    Events are like "rename run/a.tmp run/a", "open run/a" and "COMMIT run/journal.sqlite".
    """

    event: str
    number: int = 1
    cpu_s: float = 0.0
    """Seconds of processor time."""
    signal: int = signal.SIGKILL
    """What the process gets then; after processor time it is always SIGPROF, which ends it just as well."""


def monitor(happens: Callable[[str], None]) -> None:
    """Call `happens` with every event of this process from now on, just before it takes place."""

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        if name in _AUDITED:
            paths = [os.fsdecode(path) for path in arguments[: _AUDITED[name]] if isinstance(path, str | bytes)]
            happens(" ".join([name.removeprefix("os."), *paths]))

    def connect(path: Any, **options: Any) -> sqlite3.Connection:
        database = plain_connect(path, **options)
        database.set_trace_callback(lambda statement: happens(f"{statement.split()[0]} {path}"))
        return database

    plain_connect = sqlite3.connect
    sqlite3.connect = connect  # type: ignore[assignment]
    sys.addaudithook(audit)


def die_at(moment: Moment) -> None:
    """Send this process a signal at a moment."""
    left = moment.number

    def happens(event: str) -> None:
        nonlocal left
        if left and re.match(moment.event, event):
            left -= 1
            if not left and moment.cpu_s:
                signal.setitimer(signal.ITIMER_PROF, moment.cpu_s)
            elif not left:
                os.kill(os.getpid(), moment.signal)

    monitor(happens)


def kill_again_and_again(attempt: Callable[[Moment | None], int], moments: Iterable[Moment]) -> int:
    """Let one attempt after the other die, each at the next moment, until one succeeds; return how many died.

    The last attempt gets no moment. What `attempt` returns is an exit code, negative for a signal.
    """
    for deaths, moment in enumerate([*moments, None]):
        if (code := attempt(moment)) == 0:
            return deaths
        assert moment is not None and code in DEATHS, code
    raise AssertionError


@contextmanager
def started(*args: object, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Start `dasd-lite` with `args` in a process of its own, which ends with the block at the latest."""
    command = [sys.executable, "-m", "dasd_lite", *map(str, args)]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(event: threading.Event, process: subprocess.Popen[str]) -> None:
    """Wait for an event to which `process` must come."""
    while not event.wait(0.1):
        assert process.poll() is None, process.communicate()[1]


class Commands:
    """Runs `dasd-lite` in the folder `folder` by forks of a process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parent = subprocess.Popen(
            [sys.executable, "-P", __file__], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *args: object, moment: Moment | None = None, events: Path | None = None) -> int:
        """Run the command line with `args`; return its exit code, negative for a signal.

        Args:
            *args: What stands after `dasd-lite`.
            moment: When to die.
            events: A file for what happens: a line `PROCESSOR_SECONDS EVENT` each.
        """
        assert self._parent.stdin is not None and self._parent.stdout is not None
        task = {"args": list(map(str, args)), "moment": moment and asdict(moment), "events": events and str(events)}
        self._parent.stdin.write(json.dumps(task) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    @property
    def stderr(self) -> str:
        """What the last command wrote to standard error."""
        return (self.folder / "stderr.txt").read_text()

    def close(self) -> None:
        """End the parent."""
        self._parent.kill()
        self._parent.communicate()


def preload() -> None:
    """Import the package and what it trains with, so that forks need not."""
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import dasd_lite

    for module in pkgutil.walk_packages(dasd_lite.__path__, "dasd_lite."):
        if not module.name.endswith("__main__"):
            __import__(module.name)
    torch.set_num_threads(1)


def run_in_fork(args: list[str], moment: dict[str, Any] | None = None, events: str | None = None) -> int:
    """Run the command line in a fork, return its exit code, and leave its output in stdout.txt and stderr.txt."""
    if not (pid := os.fork()):
        os._exit(_run(args, moment, events))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _run(args: list[str], moment: dict[str, Any] | None, events: str | None) -> int:
    """Run the command line in this process."""
    from dasd_lite import cli

    for name, number in (("stdout.txt", 1), ("stderr.txt", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if moment:
        die_at(Moment(**moment))
    if events:
        file = Path(events).open("w", buffering=1)  # noqa: SIM115
        monitor(lambda event: print(f"{time.process_time():.4f} {event}", file=file))
    sys.argv = ["dasd-lite", *args]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    preload()
    for line in sys.stdin:
        print(run_in_fork(**json.loads(line)), flush=True)
