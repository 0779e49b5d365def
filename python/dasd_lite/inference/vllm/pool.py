"""A pool of engines in child processes that share one queue of jobs: it assigns jobs, and restarts failed engines.

Input: jobs, taken from their iterator as engines have room; output: the reply to each job, once, as they finish.
Invariants: an engine has at most `WINDOW` jobs, so memory does not grow with their number; a child that dies or hangs
is restarted and its unfinished jobs return to the queue; no child outlives the pool or this process.
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
"""Jobs that an engine has: vLLM's largest default batch (1,024) and the next ones."""
_PORTION = 64  # jobs assigned at once, so that the first answers do not wait for the last prompt to be tokenized
_MAX_DEATHS = 3
_TICK_S = 1.0  # between two checks of silent engines
_CLOSE_S = 10.0
_LOG_TAIL = 1 << 16  # bytes at the end of a child's log in which its error is searched


class _EngineProcess:
    """One child process. Its messages go to `inbox`, its death included; its output goes to a log file."""

    def __init__(self, options: dict[str, Any], devices: str | None, inbox: SimpleQueue[Any]) -> None:
        self.steps = 0
        self.running = 0
        self._inbox = inbox
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._log: IO[bytes] | None = None
        # The child imports modules from the same places as this process, never from the current folder.
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
                stdout=self._log or 2,  # our standard output is for results
                stderr=self._log or 2,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so Ctrl-C reaches this process alone, which then closes its children
            )
        self._connection = Connection(os.dup(self._socket.fileno()))
        # In threads, because a child that hangs must not block this process in the middle of a message.
        self._threads = [Thread(target=work, daemon=True) for work in (self._receive_all, self._send_all)]
        for thread in self._threads:
            thread.start()
        self.send(options)

    def send(self, message: Any) -> None:
        """Send a message to the child; returns at once."""
        self._outbox.put(message)

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def end(self, patience: float = 0.0) -> str:
        """Wait `patience` seconds for the child to exit, then kill it and its workers; return how it ended."""
        how = ""
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            how = "was killed"
        with suppress(ProcessLookupError):  # all have exited
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        with suppress(OSError):  # some systems report that the other end is closed
            self._socket.shutdown(socket.SHUT_RDWR)
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._connection.close()
        self._socket.close()
        how = how or (f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}")
        return f"{how}; {self._log_end()}"

    def _log_end(self) -> str:
        if self._log is None:
            return "see its output above"
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LOG_TAIL))
        lines = self._log.read().decode(errors="replace").splitlines()
        self._log.close()
        lines = [line.strip()[-300:] for line in lines if line.strip()]
        # If a worker fails, the last line only says so; the first error is the worker's.
        errors = [line for line in lines if re.search(r"\b\w+(Error|Exception): ", line)]
        quoted = dict.fromkeys([*errors[:1], *lines[-1:]])
        return f"its log ends with: {' … '.join(quoted)}" if quoted else "its log is empty"

    def _receive_all(self) -> None:
        try:
            while True:
                kind, *content = pickle.loads(self._connection.recv_bytes())
                if kind == "beat":
                    self.steps, self.running = content
                else:
                    self._inbox.put((self, kind, content[0]))
        except (EOFError, OSError):
            self._inbox.put((self, "ended", None))

    def _send_all(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError:
            pass  # the process has ended, which the other thread reports


class _Engine:
    """One engine of the pool: its GPUs, the child process that runs it now, and its jobs."""

    def __init__(self, number: int, devices: str | None) -> None:
        self.number = number
        self.devices = devices
        self.process: _EngineProcess | None = None
        self.ready = False
        self.jobs: dict[int, EngineJob] = {}
        self.deaths = 0  # consecutive, without a reply between them
        self.idle_s = 0.0  # since its last step
        self._steps = 0
        self._dead_s = 0.0

    def start(self, options: dict[str, Any], inbox: SimpleQueue[Any]) -> None:
        """Start a child process, which loads the model."""
        self.ready, self._steps, self._dead_s = False, 0, 0.0
        self.process = _EngineProcess(options, self.devices, inbox)

    def assign(self, jobs: list[EngineJob]) -> None:
        """Send jobs to the child process."""
        assert self.process is not None
        if not self.jobs:
            self.idle_s = 0.0
        self.jobs |= {job.key: job for job in jobs}
        self.process.send(("add", jobs))

    def is_dead(self, elapsed_s: float) -> bool:
        """Return whether the process died without the end of its messages: its workers still hold the socket open."""
        if self.process is not None and not self.process.alive:
            self._dead_s += elapsed_s
        return self._dead_s > 2 * _TICK_S

    def is_hung(self, elapsed_s: float, stall_s: float) -> bool:
        """Count `elapsed_s` more seconds; return whether it has jobs but made no step for `stall_s` seconds."""
        if self.process is None or not self.ready or not self.jobs:
            return False
        if self.process.steps != self._steps:
            self._steps, self.idle_s = self.process.steps, 0.0
        else:
            self.idle_s += elapsed_s
        return self.idle_s > stall_s


class Pool:
    """One engine per group of GPUs, all with the same options."""

    def __init__(self, options: dict[str, Any], groups: Sequence[str | None], *, stall_s: float) -> None:
        """Start an engine on each of `groups` and wait until all are ready.

        Args:
            options: Keywords of vLLM's EngineArgs.
            groups: CUDA_VISIBLE_DEVICES of each engine's process; None keeps this process's.
            stall_s: Seconds without a step after which an engine with jobs counts as hung.

        Raises:
            ConfigError: vLLM rejects the options.
            EngineError: An engine failed three times in a row.
        """
        self.context = 0
        """Longest prompt plus answer in tokens, as the engines report it."""
        self.vocab_size = 0
        """Rows of the model's embedding. An id beyond them would crash an engine."""
        self._options = options
        self._stall_s = stall_s
        self._engines = [_Engine(number, devices) for number, devices in enumerate(groups)]
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._queue: deque[EngineJob] = deque()
        self._last_check = time.monotonic()
        self._opened = self._busy = False
        try:
            for engine in self._engines:
                engine.start(options, self._inbox)
            while not all(engine.ready for engine in self._engines):
                self._wait()
        except BaseException:
            self.close()
            raise
        self._opened = True

    def run(self, jobs: Iterator[EngineJob]) -> Iterator[EngineReply]:
        """Yield the reply to every job once, as they finish; leaving early drops the remaining jobs.

        Raises EngineError if an engine fails three times in a row without a reply.
        """
        if self._busy or not self._engines:
            raise RuntimeError("the engines are already running jobs" if self._engines else "the engines are closed")
        self._busy = True
        try:
            for engine in self._engines:
                if engine.process is None:  # it failed too often in an earlier call
                    engine.deaths = 0
                    engine.start(self._options, self._inbox)
            replies: list[EngineReply] = []
            while True:
                has_more = self._assign(jobs)
                yield from replies
                if not has_more and not any(engine.jobs for engine in self._engines):
                    return
                replies = self._wait()
        finally:
            self._busy = False
            self._queue.clear()
            for engine in self._engines:
                if engine.process is not None and engine.jobs:
                    engine.process.send(("abort", list(engine.jobs)))
                engine.jobs = {}

    def status(self) -> str:
        """Return how many engines there are, and how many answers they are generating."""
        engines = list(self._engines)
        ready = [engine.process for engine in engines if engine.process is not None and engine.ready]
        words = [f"{len(ready)} vLLM {'engine' if len(ready) == 1 else 'engines'}"]
        words.append(f"{sum(process.running for process in ready)} answers in progress")
        if len(ready) < len(engines):
            words.append(f"{len(engines) - len(ready)} loading")
        return ", ".join(words)

    def close(self) -> None:
        """End all child processes."""
        engines, self._engines = [engine for engine in self._engines if engine.process is not None], []
        deadline = time.monotonic()
        for engine in engines:
            if engine.ready and engine.process is not None:
                engine.process.send(("close",))
                deadline = time.monotonic() + _CLOSE_S
        for engine in engines:
            if engine.process is not None:
                engine.process.end(max(0.0, deadline - time.monotonic()) if engine.ready else 0.0)

    def _assign(self, jobs: Iterator[EngineJob]) -> bool:
        """Give jobs to the engines in turn as far as they have room; return whether the queue still has jobs."""
        ahead = _PORTION * len(self._engines)
        free = [engine for engine in self._engines if engine.ready]
        self._queue.extend(islice(jobs, max(0, ahead - len(self._queue))))
        while free:
            for engine in list(free):
                self._queue.extend(islice(jobs, max(0, ahead - len(self._queue))))
                share = WINDOW
                if len(self._queue) < ahead:  # these are the last jobs: every engine gets the same number
                    num_jobs = len(self._queue) + sum(len(each.jobs) for each in self._engines)
                    share = -(-num_jobs // len(self._engines))
                num = min(_PORTION, len(self._queue), min(WINDOW, share) - len(engine.jobs))
                if num > 0:
                    engine.assign([self._queue.popleft() for _ in range(num)])
                else:
                    free.remove(engine)
        return bool(self._queue)

    def _wait(self) -> list[EngineReply]:
        """Wait for a message, at most one tick; restart engines that died or hang; return the replies that arrived."""
        try:
            sender, kind, content = self._inbox.get(timeout=_TICK_S)
        except Empty:
            sender, kind, content = None, "", None
        now = time.monotonic()
        # Only the time between checks counts: this process may have been stopped itself (Ctrl-Z), or be slow.
        elapsed_s, self._last_check = min(now - self._last_check, 2 * _TICK_S), now
        for engine in self._engines:
            if engine.is_hung(elapsed_s, self._stall_s):
                self._restart(engine, f"made no step for {engine.idle_s:.0f} s and ")
            elif engine.is_dead(elapsed_s):
                self._restart(engine, "")
        senders = [engine for engine in self._engines if sender is not None and engine.process is sender]
        return self._handle(senders[0], kind, content) if senders else []  # no message, or of a process ended since

    def _handle(self, engine: _Engine, kind: str, content: Any) -> list[EngineReply]:
        """Act on a message from an engine's process; return the replies in it."""
        if kind == "done":
            engine.deaths = 0
            # Jobs may have been dropped since, if the caller left early.
            return [reply for reply in content if engine.jobs.pop(reply.key, None) is not None]
        if kind == "ready":
            engine.ready = True
            self.context, self.vocab_size = content
        elif kind == "ended":
            self._restart(engine, "", _CLOSE_S)
        elif self._opened:  # rejected, although it ran before: the memory of its predecessor may not be free yet
            self._restart(engine, f"cannot start ({content}) and ", _CLOSE_S)
        else:
            raise ConfigError(f"vLLM cannot start: {content}")
        return []

    def _restart(self, engine: _Engine, reason: str, patience: float = 0.0) -> None:
        """Replace the process of an engine that died or hangs; its jobs go to the front of the queue."""
        assert engine.process is not None
        how = reason + engine.process.end(patience)
        engine.process, engine.ready = None, False
        engine.deaths += 1
        if engine.deaths == _MAX_DEATHS:
            raise EngineError(f"vLLM: engine {engine.number} failed {_MAX_DEATHS} times without an answer: it {how}")
        num = len(engine.jobs)
        self._queue.extendleft(reversed(engine.jobs.values()))
        engine.jobs = {}
        note(f"vLLM: engine {engine.number} {how}; restarting it and its {num} unfinished answers")
        engine.start(self._options, self._inbox)
