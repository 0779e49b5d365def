"""Asks a computer algebra system whether two formulas are equal, in processes that can be killed.

Input: two formulas. Output: yes, no, or a reason why that is not known. Invariants: a call returns in bounded time,
from any thread; no process outlives this one. `worker.py` is the program that does the work.

The extra `[eval]` brings math-verify. Without it, or on Windows, where processes cannot be forked, nothing can be
asked.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from dasd_lite.console import note

SECONDS = 5.0  # of processor time for a whole grade
_START_SECONDS = 120.0  # to import math-verify, on a machine that does other work
_REPLY_SECONDS = 40.0  # the worker's own limit is 30 s
_MAX_WORKERS = 8  # each has sympy loaded, 100 MB
_MAX_NESTING, _MAX_DIGITS = 64, 256


Reply: TypeAlias = tuple[bool | None, str, float]
"""Verdict, reason if there is none, and seconds of processor time."""


class Unknown(Exception):
    """The comparison did not end; says why."""


class Unparseable(Exception):
    """The formulas cannot be compared; says why."""


@cache
def is_available() -> bool:
    """Return whether formulas can be compared here; if not, say so once."""
    if find_spec("math_verify") is not None and hasattr(os, "fork"):
        return True
    cure = "run: pip install 'dasd-lite[eval]'" if hasattr(os, "fork") else "that needs Linux or macOS"
    note(f"math-verify compares formulas that are not equal as text, and is not available; {cure}")
    return False


class Budget:
    """The time of one grade, which may need several comparisons."""

    def __init__(self) -> None:
        """Start with all of it."""
        self.seconds = SECONDS

    def equal(self, reference: str, stated: str) -> bool:
        """Return whether two formulas are equal.

        Raises:
            Unknown: It took too long or too much memory, or the process died.
            Unparseable: One of the two cannot be read, or is too long.
        """
        for formula in (reference, stated):
            _check_size(formula)
        if self.seconds <= 0:
            raise Unknown("took more than 5 s")
        verdict, reason, spent = _pool.ask(reference, stated, self.seconds)
        self.seconds -= spent
        if verdict is None:
            raise (Unparseable if reason.startswith("cannot be compared") else Unknown)(reason)
        return verdict


def _check_size(formula: str) -> None:
    depth = deepest = digits = 0
    for char in formula:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
        digits = digits + 1 if char.isdigit() else 0
        if digits > _MAX_DIGITS or deepest > _MAX_NESTING:
            raise Unparseable(f"has more than {_MAX_DIGITS} digits or {_MAX_NESTING} nested brackets")


class _Worker:
    """One process of `worker.py`."""

    def __init__(self) -> None:
        theirs_in, self._requests = os.pipe()
        self._replies, theirs_out = os.pipe()
        self._waiting = b""
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))],
            stdin=theirs_in,
            stdout=theirs_out,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal does not reach it
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            ready = self._read(_START_SECONDS)
            if ready != "ready":
                raise Unparseable(ready[1])
        except BaseException:
            self.close()
            raise

    def send(self, *request: object) -> None:
        """Send a request; OSError if the process is gone."""
        data = (json.dumps(request) + "\n").encode()
        while data:
            data = data[os.write(self._requests, data) :]

    def receive(self) -> Reply:
        """Wait for the reply; EOFError or OSError if the process is gone."""
        verdict, reason, spent = self._read(_REPLY_SECONDS)
        return verdict, reason, spent

    def _read(self, seconds: float) -> Any:
        readable = select.poll()
        readable.register(self._replies, select.POLLIN)
        while b"\n" not in self._waiting:
            if not readable.poll(seconds * 1e3):
                raise TimeoutError(f"no reply within {seconds:.0f} s")
            more = os.read(self._replies, 1 << 16)
            if not more:
                raise EOFError
            self._waiting += more
        line, _, self._waiting = self._waiting.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.forget()
        try:
            self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def forget(self) -> None:
        """Close our ends of the pipes; the process ends when nobody else has them."""
        for descriptor in (self._requests, self._replies):
            with suppress(OSError):
                os.close(descriptor)


class _Pool:
    """As many workers as threads ask at once, up to the number of cores."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._room = threading.BoundedSemaphore(min(cores, _MAX_WORKERS))
        self._lock = threading.Lock()
        self._free: list[_Worker] = []
        self._broken = ""  # why math-verify cannot be loaded, which no second try would change
        self._all: set[_Worker] = set()

    def ask(self, reference: str, stated: str, seconds: float) -> Reply:
        """Return the reply of a worker; that it is unknown, if the worker died twice, or once while at work.

        Raises:
            Unparseable: math-verify is there and cannot be loaded.
        """
        if self._broken:
            raise Unparseable(self._broken)
        with self._room:
            worker: _Worker | None = None
            try:
                for attempt in (1, 2):
                    try:
                        worker = self._take()
                        worker.send(reference, stated, seconds)
                        break
                    except OSError:  # it died while it had nothing to do
                        self._end(worker)
                        worker = None
                        if attempt == 2:
                            raise
                assert worker is not None
                reply = worker.receive()
            except (EOFError, OSError) as error:
                self._end(worker)
                return None, f"the process that compares formulas died{f': {error}' if str(error) else ''}", 0.0
            except Unparseable as error:
                with self._lock:
                    is_first, self._broken = not self._broken, str(error)
                if is_first:
                    note(f"{error}; formulas that are not equal as text are not compared; reinstall 'dasd-lite[eval]'")
                raise
            except BaseException:  # such as Ctrl-C: its reply is still to come
                self._end(worker)
                raise
            with self._lock:
                self._free.append(worker)
            return reply

    def _take(self) -> _Worker:
        with self._lock:
            if self._free:
                return self._free.pop()
        worker = _Worker()
        with self._lock:
            self._all.add(worker)
        return worker

    def _end(self, worker: _Worker | None) -> None:
        if worker is not None:
            with self._lock:
                self._all.discard(worker)
            worker.close()

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            workers, self._all, self._free = self._all, set(), []
        for worker in workers:
            worker.close()

    def forget(self) -> None:
        """Leave the processes to the process that this one was forked from; no lock of another thread is taken."""
        for worker in self._all:
            worker.forget()
            worker.process.returncode = 0  # not ours to wait for


_pool = _Pool()


def close() -> None:
    """End the processes; the next comparison starts new ones."""
    _pool.close()


def _after_fork() -> None:
    global _pool
    _pool.forget()
    _pool = _Pool()


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
