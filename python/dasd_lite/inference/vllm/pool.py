"""Engines in child processes over one queue of jobs: handed out, watched, started again.

Input: jobs, taken from their iterator as engines have room for them; output: each job's answer, once, as they finish.
Invariants: at most `WINDOW` jobs are at an engine, so memory does not grow with their number; a child that ends or
hangs is started again and its unfinished jobs go back to the queue; no child outlives the pool, or this process.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any

from dasd_lite.console import note
from dasd_lite.errors import ConfigError, EngineError
from dasd_lite.inference.vllm.engine import EngineJob, EngineReply

WINDOW = 1280
"""Jobs that an engine holds: the largest batch that vLLM makes by itself (1,024), and the next ones."""
_PORTION = 64  # jobs handed out at once, so that the first answers do not wait for the last prompt to be read
_MAX_DEATHS = 3
_TICK_S = 1.0  # between two looks at engines that say nothing
_CLOSE_S = 10.0
_TAIL = 1 << 16  # bytes of what a child wrote that are searched for its last words


class _Child:
    """One child process: what it says goes to `inbox`, what it writes to a file; its death is a message too."""

    def __init__(self, options: dict[str, Any], devices: str | None, inbox: SimpleQueue[Any]) -> None:
        self.steps = 0
        self.running = 0
        self._inbox = inbox
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._log: IO[bytes] | None = None
        # The user's own modules come from where this process has them, never from the folder it happens to be in.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        if "VLLM_LOGGING_LEVEL" not in os.environ:
            environment["VLLM_LOGGING_LEVEL"] = "WARNING"
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dasd_lite.inference.vllm.engine", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log or 2,  # standard output is for results
                stderr=self._log or 2,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for this process alone, which then closes its children
            )
        self._connection = Connection(os.dup(self._socket.fileno()))
        # Threads, because a child that hangs must not hold up this process in the middle of a message.
        self._threads = [Thread(target=work, daemon=True) for work in (self._listen, self._talk)]
        for thread in self._threads:
            thread.start()
        self.send(options)

    def send(self, message: Any) -> None:
        """Tell the child; returns at once."""
        self._outbox.put(message)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def end(self, patience: float = 0.0) -> str:
        """Wait `patience` seconds for the child to end, then kill it with its workers; return how it ended."""
        how = ""
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            how = "was killed"
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        with suppress(OSError):  # some systems know already that nobody is at the other end
            self._socket.shutdown(socket.SHUT_RDWR)
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._connection.close()
        self._socket.close()
        how = how or (f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}")
        return f"{how}; {self._last_words()}"

    def _last_words(self) -> str:
        if self._log is None:
            return "what it wrote stands above"
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL))
        lines = self._log.read().decode(errors="replace").splitlines()
        self._log.close()
        lines = [line.strip()[-300:] for line in lines if line.strip()]
        # Where workers fail, the last line only says that they did; the first error is theirs.
        errors = [line for line in lines if re.search(r"\b\w+(Error|Exception): ", line)]
        said = dict.fromkeys([*errors[:1], *lines[-1:]])
        return f"its last words: {' … '.join(said)}" if said else "it wrote nothing"

    def _listen(self) -> None:
        try:
            while True:
                kind, *content = pickle.loads(self._connection.recv_bytes())
                if kind == "beat":
                    self.steps, self.running = content
                else:
                    self._inbox.put((self, kind, content[0]))
        except (EOFError, OSError):
            self._inbox.put((self, "ended", None))

    def _talk(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError:
            pass  # it has ended, which the other thread tells


class _Slot:
    """A group of GPUs, the child that works there, and the jobs that it has."""

    def __init__(self, number: int, devices: str | None) -> None:
        self.number = number
        self.devices = devices
        self.child: _Child | None = None
        self.ready = False
        self.jobs: dict[int, EngineJob] = {}
        self.deaths = 0  # in a row, without an answer between them
        self.still_s = 0.0
        self._steps = 0
        self._gone_s = 0.0

    def start(self, options: dict[str, Any], inbox: SimpleQueue[Any]) -> None:
        """Put a child here, which is to load the model."""
        self.ready, self._steps, self._gone_s = False, 0, 0.0
        self.child = _Child(options, self.devices, inbox)

    def give(self, jobs: list[EngineJob]) -> None:
        """Send jobs to the child."""
        assert self.child is not None
        if not self.jobs:
            self.still_s = 0.0
        self.jobs |= {job.key: job for job in jobs}
        self.child.send(("add", jobs))

    def gone(self, passed: float) -> bool:
        """Tell whether the child has ended without the end of its messages: workers that it forked hold the socket."""
        if self.child is not None and not self.child.alive:
            self._gone_s += passed
        return self._gone_s > 2 * _TICK_S

    def hangs(self, passed: float, stall_s: float) -> bool:
        """Count `passed` seconds more without a step; return whether that makes it hung."""
        if self.child is None or not self.ready or not self.jobs:
            return False
        if self.child.steps != self._steps:
            self._steps, self.still_s = self.child.steps, 0.0
        else:
            self.still_s += passed
        return self.still_s > stall_s


class Pool:
    """One engine per group of GPUs, all with the same options."""

    def __init__(self, options: dict[str, Any], groups: Sequence[str | None], *, stall_s: float) -> None:
        """Start an engine on each of `groups` and wait until all are ready.

        Args:
            options: Keywords of vLLM's EngineArgs.
            groups: Per engine the CUDA_VISIBLE_DEVICES of its process; none leaves that as it is.
            stall_s: Seconds without a step after which an engine with jobs counts as hung.

        Raises:
            ConfigError: vLLM refuses the options.
            EngineError: An engine has ended three times in a row.
        """
        self.context = 0
        """Longest prompt plus answer in tokens, as the engines say."""
        self.vocab_size = 0
        """Rows of the model's embedding. An id beyond them is the end of an engine."""
        self._options = options
        self._stall_s = stall_s
        self._slots = [_Slot(number, devices) for number, devices in enumerate(groups)]
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._queue: deque[EngineJob] = deque()
        self._looked = time.monotonic()
        self._opened = self._busy = False
        try:
            for slot in self._slots:
                slot.start(options, self._inbox)
            while not all(slot.ready for slot in self._slots):
                self._look()
        except BaseException:
            self.close()
            raise
        self._opened = True

    def run(self, jobs: Iterator[EngineJob]) -> Iterator[EngineReply]:
        """Answer every job once, in the order in which they finish; leaving early drops the others.

        Raises EngineError when an engine has ended three times in a row without an answer.
        """
        if self._busy or not self._slots:
            raise RuntimeError("the engines are at work already" if self._slots else "the engines are closed")
        self._busy = True
        try:
            for slot in self._slots:
                if slot.child is None:  # given up in an earlier call
                    slot.deaths = 0
                    slot.start(self._options, self._inbox)
            answers: list[EngineReply] = []
            while True:
                left = self._hand_out(jobs)
                yield from answers
                if not left and not any(slot.jobs for slot in self._slots):
                    return
                answers = self._look()
        finally:
            self._busy = False
            self._queue.clear()
            for slot in self._slots:
                if slot.child is not None and slot.jobs:
                    slot.child.send(("abort", list(slot.jobs)))
                slot.jobs = {}

    def status(self) -> str:
        """Say how many engines there are and what they have to do."""
        slots = list(self._slots)
        ready = [slot.child for slot in slots if slot.child is not None and slot.ready]
        words = [f"{len(ready)} vLLM {'engine' if len(ready) == 1 else 'engines'}"]
        words.append(f"{sum(child.running for child in ready)} answers at work")
        if len(ready) < len(slots):
            words.append(f"{len(slots) - len(ready)} loading")
        return ", ".join(words)

    def close(self) -> None:
        """End all children."""
        slots, self._slots = [slot for slot in self._slots if slot.child is not None], []
        until = time.monotonic()
        for slot in slots:
            if slot.ready and slot.child is not None:
                slot.child.send(("close",))
                until = time.monotonic() + _CLOSE_S
        for slot in slots:
            if slot.child is not None:
                slot.child.end(max(0.0, until - time.monotonic()) if slot.ready else 0.0)

    def _hand_out(self, jobs: Iterator[EngineJob]) -> bool:
        """Give the engines what they have room for, by turns; return whether anything is left in the queue."""
        ahead = _PORTION * len(self._slots)
        free = [slot for slot in self._slots if slot.ready]
        self._queue.extend(islice(jobs, max(0, ahead - len(self._queue))))
        while free:
            for slot in list(free):
                self._queue.extend(islice(jobs, max(0, ahead - len(self._queue))))
                share = WINDOW
                if len(self._queue) < ahead:  # these are the last: engines get an equal number of them
                    share = -(-(len(self._queue) + sum(len(p.jobs) for p in self._slots)) // len(self._slots))
                num = min(_PORTION, len(self._queue), min(WINDOW, share) - len(slot.jobs))
                if num > 0:
                    slot.give([self._queue.popleft() for _ in range(num)])
                else:
                    free.remove(slot)
        return bool(self._queue)

    def _look(self) -> list[EngineReply]:
        """Wait for a message, a tick at most; mend what has ended or hangs; return the answers that have come."""
        try:
            child, kind, content = self._inbox.get(timeout=_TICK_S)
        except Empty:
            child, kind, content = None, "", None
        now = time.monotonic()
        # What counts is time in which this process was looking: it may have been stopped itself (Ctrl-Z), or be slow.
        passed, self._looked = min(now - self._looked, 2 * _TICK_S), now
        for slot in self._slots:
            if slot.hangs(passed, self._stall_s):
                self._start_again(slot, f"made no step for {slot.still_s:.0f} s and ")
            elif slot.gone(passed):
                self._start_again(slot, "")
        said = [slot for slot in self._slots if child is not None and slot.child is child]
        return self._hear(said[0], kind, content) if said else []  # nobody spoke, or one that is gone by now

    def _hear(self, slot: _Slot, kind: str, content: Any) -> list[EngineReply]:
        """Act on a message from the child at `slot`; return the answers in it."""
        if kind == "done":
            slot.deaths = 0
            # Some were dropped since, when the caller left early.
            return [answer for answer in content if slot.jobs.pop(answer.key, None) is not None]
        if kind == "ready":
            slot.ready = True
            self.context, self.vocab_size = content
        elif kind == "ended":
            self._start_again(slot, "", _CLOSE_S)
        elif self._opened:  # refused, though it ran before: the memory of the one before is not free yet, say
            self._start_again(slot, f"cannot start ({content}) and ", _CLOSE_S)
        else:
            raise ConfigError(f"vLLM cannot start: {content}")
        return []

    def _start_again(self, slot: _Slot, why: str, patience: float = 0.0) -> None:
        """Put a new child in the slot of one that has ended or hangs; its jobs go to the front of the queue."""
        assert slot.child is not None
        how = why + slot.child.end(patience)
        slot.child, slot.ready = None, False
        slot.deaths += 1
        if slot.deaths == _MAX_DEATHS:
            raise EngineError(f"vLLM: engine {slot.number} ended {_MAX_DEATHS} times without an answer: it {how}")
        num = len(slot.jobs)
        self._queue.extendleft(reversed(slot.jobs.values()))
        slot.jobs = {}
        note(f"vLLM: engine {slot.number} {how}; it is started again with its {num} unfinished answers")
        slot.start(self._options, self._inbox)
