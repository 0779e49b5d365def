"""Comparisons that hang, fill memory or die: the verdict is unknown, and the next grade works."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dasd_lite.grading import math
from dasd_lite.grading.math import algebra, grade
from dasd_lite.grading.math import worker as program
from dasd_lite.grading.math.algebra import Budget, Unknown, Unparseable

pytestmark = [
    pytest.mark.skipif(not algebra.is_available(), reason="math-verify is not installed"),
    pytest.mark.timeout(600),
]

HANGS = r"(10^9)!"


@pytest.fixture(autouse=True)
def little_time(monkeypatch):
    """What hangs, hangs for ever: half a second shows it as well as five."""
    monkeypatch.setattr(algebra, "SECONDS", 0.5)
    monkeypatch.setattr(math, "_cache", {})


def boxed(stated, reference):
    return grade(rf"\boxed{{{stated}}}", reference)


def works():
    math._cache.clear()
    return boxed(r"\sqrt{8}", r"2\sqrt{2}").verdict == "right"


def children_of(pid):
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def worker():
    """The process that the next grade asks."""
    assert works()
    return algebra._pool._free[-1].process.pid


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    "stated",
    [
        r"(x+1)^1000000",
        "9^9^9^9",
        HANGS,
        r"10^{10^{10}}",
        r"2^{2^{100}}",
        r"\binom{10^9}{5\cdot10^8}",
        "(" * 60 + "1" + ")" * 59,
    ],
)
def test_after_a_formula_that_hangs_the_next_grade_works(stated):
    assert boxed(stated, "5x").verdict in ("unknown", "wrong", "unparseable")
    assert works()


def test_too_much_time_is_unknown():
    graded = boxed(HANGS, "7")
    assert (graded.verdict, graded.reason) == ("unknown", "took more than 5 s")


def test_the_time_is_that_of_a_whole_grade():
    """Two items that hang take as long as one."""
    budget = Budget()
    with pytest.raises(Unknown):
        budget.equal(HANGS, "7")
    with pytest.raises(Unknown):
        budget.equal("x+1", "1+x")


def loops(reference, stated):
    while True:
        pass


ACTS = {
    "equal": lambda reference, stated: reference == stated,
    "loops": loops,
    "sleeps": lambda reference, stated: time.sleep(1_000),
    "fills memory": lambda reference, stated: bool(bytearray(3 << 30)),
    "crashes": lambda reference, stated: os.kill(os.getpid(), signal.SIGKILL),
    "raises": lambda reference, stated: 1 / 0,
    "recurses": lambda reference, stated: ACTS["recurses"](reference, stated),
    "does not know": lambda reference, stated: None,
}


@pytest.fixture
def ask(monkeypatch):
    """A supervisor whose comparisons do what the reference says."""
    monkeypatch.setattr(program, "WALL_SECONDS", 2.0)
    here_in, there_out = os.pipe()
    there_in, here_out = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(here_out)
        with os.fdopen(there_out, "w") as replies:
            program.Supervisor(lambda reference, stated: ACTS[reference](reference, stated), there_in, replies).serve()
        os._exit(0)
    os.close(there_in)
    os.close(there_out)
    with os.fdopen(here_in) as replies, os.fdopen(here_out, "w") as requests:

        def one(act):
            print(json.dumps([act, "equal", 0.3]), file=requests, flush=True)
            return json.loads(replies.readline())[:2]

        yield one
    assert os.waitpid(pid, 0)[1] == 0, "it ends when nobody asks any more"


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # the fixture forks
@pytest.mark.parametrize(
    ("act", "reply"),
    [
        ("loops", [None, "took more than 5 s"]),
        ("sleeps", [None, "took more than 30 s on the clock"]),
        ("crashes", [None, "the process that compared died of SIGKILL"]),
        ("raises", [None, "cannot be compared (ZeroDivisionError)"]),
        ("does not know", [None, "cannot be compared: math-verify reads no formula"]),
        pytest.param(
            *("fills memory", [None, "ran out of memory"]),
            marks=pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is limited on Linux only"),
        ),
    ],
)
def test_whatever_a_comparison_does_the_next_one_works(ask, act, reply):
    for _ in range(2):
        assert ask("equal") == [True, ""]
        assert ask(act) == reply


def test_what_recurses_without_end_is_not_known(ask):
    """An error of Python's, or the death of the process: it depends on the size of the stack."""
    for _ in range(2):
        assert ask("recurses")[0] is None
        assert ask("equal") == [True, ""]


@pytest.mark.parametrize("formula", ["9" * 300, "(" * 100 + "1" + ")" * 100])
def test_what_is_too_large_is_not_even_tried(formula, monkeypatch):
    monkeypatch.setattr(algebra, "_pool", None)
    with pytest.raises(Unparseable, match="has more than 256 digits or 64 nested brackets"):
        Budget().equal(formula + "x", "5")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("which", ["the child", "the supervisor"])
def test_a_process_killed_at_work_makes_one_grade_unknown(which, monkeypatch):
    monkeypatch.setattr(algebra, "SECONDS", 60.0)
    pid = worker()
    (child,) = children_of(pid)
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(boxed(HANGS, "7")))
    begin = sum(map(int, Path(f"/proc/{child}/stat").read_text().split()[13:15]))
    thread.start()
    until(lambda: sum(map(int, Path(f"/proc/{child}/stat").read_text().split()[13:15])) > begin + 2)  # it is at work
    os.kill(child if which == "the child" else pid, signal.SIGKILL)
    thread.join()
    assert verdicts[0].verdict == "unknown"
    assert "died" in verdicts[0].reason
    assert works()
    until(lambda: not Path(f"/proc/{child}").exists())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("which", ["the child", "the supervisor"])
def test_a_process_killed_while_idle_is_replaced(which):
    pid = worker()
    victim = children_of(pid)[0] if which == "the child" else pid
    os.kill(victim, signal.SIGKILL)
    until(lambda: Path(f"/proc/{victim}/stat").read_text().split()[2] == "Z")  # dead, and not yet buried
    assert works()


def test_a_worker_that_cannot_start_is_said(monkeypatch):
    monkeypatch.setattr(algebra, "_pool", algebra._Pool())
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    graded = boxed(r"\sqrt{8}+1", r"1+2\sqrt{2}")
    assert graded.verdict == "unknown"
    assert "/nowhere/python" in graded.reason


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of threads, which is what is tried
def test_a_forked_process_has_workers_of_its_own():
    assert works()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if works() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert works()


SCRIPT = """
import os, sys, threading
from dasd_lite.grading.math import algebra
from dasd_lite.grading.math import grade
assert grade(r"\\boxed{\\sqrt{8}}", r"2\\sqrt{2}").verdict == "right"
print(algebra._pool._free[0].process.pid, flush=True)
if sys.argv[1] == "at work":
    algebra.SECONDS = 60
    threading.Thread(target=grade, args=(r"\\boxed{(10^9)!}", "7")).start()
sys.stdin.read() if sys.argv[1] != "the end" else None
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("when", ["idle", "at work", pytest.param("the end", marks=pytest.mark.slow)])
def test_no_process_is_left_behind(when):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, when], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as client:
        pid = int(client.stdout.readline())
        if when == "at work":
            (child,) = children_of(pid)
            until(lambda: int(Path(f"/proc/{child}/stat").read_text().split()[13]) > 5)
        if when != "the end":
            client.send_signal(signal.SIGKILL)
        client.wait()
    until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.fixture
def new_pool(monkeypatch):
    monkeypatch.setattr(algebra, "_pool", algebra._Pool())
    yield
    algebra.close()


def test_a_math_verify_that_cannot_be_loaded_is_said_once(new_pool, monkeypatch, tmp_path, capsys):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    graded = [boxed(rf"\sqrt{{8}}+{n}", rf"{n}+2\sqrt{{2}}") for n in range(3)]
    assert {each.verdict for each in graded} == {"unparseable"}
    assert {each.reason for each in graded} == {"math-verify cannot be loaded: ImportError: no antlr"}
    assert capsys.readouterr().err.count("no antlr") == 1


def test_the_limits_hold_whatever_the_caller_does_with_signals(new_pool):
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF, signal.SIGALRM})
    ignored = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        graded = boxed(HANGS, "7")
    finally:
        signal.signal(signal.SIGCHLD, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    assert (graded.verdict, graded.reason) == ("unknown", "took more than 5 s")
