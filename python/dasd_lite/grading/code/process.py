"""One process: its input from a file, its output up to a limit, its life up to a deadline.

Input: a command and what it reads. Output: what it printed and how it ended. Invariant: when the call returns, the
process has been waited for. It is a child of the calling thread, and dies with that thread if the thread is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_ERROR_TAIL = 1 << 16
"""How many bytes are kept of the end of what a program writes to its standard error."""
_MAX_ERROR = 8 << 20
"""How many bytes it may write there."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Exit code; negative: the signal that ended it.
        stopped: The limit for which we ended it, "time limit" or "output limit"; "" for none.
        output: What it printed, at most the limit.
        report: What it wrote to the pipe of the driver, at most the limit.
        error: The end of what it wrote to its standard error.
        cpu_seconds: Processor time that it used, with what it has waited for; incomplete if we ended it.
        memory_short: The kernel killed a process in the meantime because memory was short: this one or another.
    """

    code: int
    stopped: str
    output: bytes
    report: bytes
    error: bytes
    cpu_seconds: float
    memory_short: bool


def run_process(
    command: Callable[[list[int], int], list[str]],
    files: list[bytes],
    given: bytes,
    *,
    wall_seconds: float,
    max_output: int,
    identity: dict[str, Any],
    environment: dict[str, str],
) -> Ended:
    """Run one process to its end.

    Args:
        command: Makes the command, from the file descriptors of `files` and of the pipe for the report.
        files: Contents that the process reads from descriptors of its own.
        given: Its standard input, a file: all of it can be read at once, and nobody has to feed it.
        wall_seconds: It is killed after this time.
        max_output: It is killed after this many bytes of output, and of the report.
        identity: `user`, `group` and `extra_groups` of subprocess.Popen.
        environment: All of its environment.

    Raises:
        OSError: It could not be started.
    """
    with contextlib.ExitStack() as stack:
        standard_input = stack.enter_context(_sealed(given))
        descriptors = [stack.enter_context(_sealed(content)) for content in files]
        receive, send = os.pipe()
        report = stack.enter_context(open(receive, "rb", buffering=0))
        sender = stack.enter_context(open(send, "wb", buffering=0))
        deadline = time.monotonic() + wall_seconds
        num_killed = _num_killed_for_memory()
        process = subprocess.Popen(
            command(descriptors, send),
            stdin=standard_input,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=[*descriptors, send],
            cwd="/",
            env=environment,
            start_new_session=True,
            **identity,
        )
        stack.enter_context(process)
        stack.callback(_kill, process)  # whatever happens here, Ctrl-C included
        sender.close()
        assert process.stdout is not None and process.stderr is not None, "both are pipes"
        streams = {process.stdout: max_output, report: max_output, process.stderr: _MAX_ERROR}
        stopped, contents = _read(streams, deadline, only_end=process.stderr)
        cpu_seconds = None if stopped else _wait(process, deadline)
        if cpu_seconds is None:
            stopped, cpu_seconds = stopped or "time limit", 0.0
        _kill(process)
        output, reported, error = contents
        is_short = _num_killed_for_memory() > num_killed
        return Ended(process.returncode, stopped, output, reported, error, cpu_seconds, is_short)


def _read(streams: dict[Any, int], deadline: float, *, only_end: Any) -> tuple[str, list[bytes]]:
    """Read all streams to their end, the limit of one in bytes, or the deadline.

    Returns:
        The limit that was reached ("" for none), and what was read of each; of the stream `only_end` the end.
    """
    sizes = dict.fromkeys(streams, 0)
    contents = {stream: bytearray() for stream in streams}
    stopped = ""
    with selectors.DefaultSelector() as selector:
        for each in streams:
            selector.register(each, selectors.EVENT_READ)
        while selector.get_map() and not stopped:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready and time.monotonic() >= deadline:
                stopped = "time limit"
            for key, _ in ready:
                stream: Any = key.fileobj
                piece = os.read(stream.fileno(), 65536)
                if not piece:
                    selector.unregister(stream)
                    continue
                sizes[stream] += len(piece)
                contents[stream] += piece
                if stream is only_end:
                    del contents[stream][:-_ERROR_TAIL]
                if sizes[stream] > streams[stream]:
                    stopped = "output limit"
            if time.monotonic() >= deadline:
                stopped = "time limit"
    return stopped, [bytes(content) for content in contents.values()]


def _wait(process: subprocess.Popen[bytes], deadline: float) -> float | None:
    """Wait for the end of a process; return the processor time that it used, or None if it runs at the deadline."""
    pause = 0.0005
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime
        if time.monotonic() >= deadline:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _num_killed_for_memory() -> int:
    """Return how many processes the kernel has killed since its start because memory was short."""
    try:
        with open("/proc/vmstat", "rb") as file:
            return int(file.read().partition(b"\noom_kill ")[2].split(maxsplit=1)[0])
    except (OSError, IndexError):  # before Linux 4.13
        return 0


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process if it runs, and wait for it."""
    if process.poll() is None:
        process.kill()
    process.wait()


@contextlib.contextmanager
def _sealed(content: bytes) -> Iterator[int]:
    """Hold `content` as a file in memory that nobody can change."""
    descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield descriptor
    finally:
        os.close(descriptor)
