r"""The program that asks math-verify whether two formulas are equal: it may hang, fill memory or die without harm.

    python -P worker.py          (algebra.py starts it; it knows nothing of the package, so that it starts quickly)

Input: one request a line, `[reference, stated, seconds]`. Output: one reply a line, `[verdict, reason, seconds]`: the
verdict is true, false, or null with the reason, and the seconds are processor time. The first line is "ready", or why
it cannot work. It imports math-verify once, which takes two seconds, and forks a child that does the work.

The kernel keeps the limits: a timer of the child's processor time, one of the time on the wall, and the size of its
address space (macOS does not enforce that one). A child that reached one is gone, and the next request gets a new one.
The program ends when its standard input closes, so whoever started it can just die.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

MEMORY = 2 << 30  # bytes
WALL_SECONDS = 30.0  # so that a busy machine does not make a slow comparison unknown
_LIMITS = {
    signal.SIGPROF: "took more than 5 s",
    signal.SIGXCPU: "took more than 5 s",
    signal.SIGALRM: "took more than 30 s on the clock",
}


def main() -> None:
    """Answer requests until the standard input closes."""
    requests, replies = os.dup(0), os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # a library may print
        os.dup2(null, descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of whoever started it
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if whoever started it ignores it, no child leaves its status
    try:
        equal = _load()
    except Exception as error:
        _write(replies, [None, f"math-verify cannot be loaded: {type(error).__name__}: {error}", 0.0])
        return
    _write(replies, "ready")
    Supervisor(equal, requests, replies).serve()


def _load() -> Callable[[str, str], bool | None]:
    """Import math-verify and use it once, so that every child has its tables."""
    from functools import partial

    from latex2sympy2_extended import NormalizationConfig
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify import LatexExtractionConfig, parse, parser, verify
    from sympy import Expr, Float, I, N

    # Its default reads R as r; there is no other way to say so.
    parser.latex2sympy = partial(latex2sympy, conversion_config=ConversionConfig(lowercase_symbols=False))
    config = LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="all", equations=False
        ),
    )

    def read(formula: str) -> list[Any]:
        text = rf"$\boxed{{{formula}}}$"
        found: list[Any] = parse(text, [config], fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
        return found

    def equal(reference: str, stated: str) -> bool | None:
        gold, target = read(reference), read(stated)
        if not gold or not target:
            return None
        # The default of 6 decimals calls 0.6666666 two thirds.
        is_equal = verify(gold, target, float_rounding=15, timeout_seconds=None, raise_on_error=True)
        return confirmed(is_equal, gold[0], target[0])

    def confirmed(is_equal: bool, a: Any, b: Any) -> bool | None:
        """Compare two constants, exact ones to 900 digits; math-verify takes 1e-20 for 0, and i for a variable."""
        if not isinstance(a, Expr) or not isinstance(b, Expr):  # an equation or a set
            return None if not is_equal and isinstance(a, Expr) != isinstance(b, Expr) else is_equal
        a, b = (each.subs({symbol: I for symbol in each.free_symbols if symbol.name == "i"}) for each in (a, b))
        difference, is_rounded = a - b, a.has(Float) or b.has(Float)
        if not is_equal and bool(a.free_symbols) != bool(b.free_symbols):  # 5 V and 5: the symbol may be a unit
            x, y = (N(each.subs(dict.fromkeys(each.free_symbols, 1))) for each in (a, b))
            return None if abs(x - y) <= abs(y) * 1e-9 else False
        if is_equal and not is_rounded and difference.is_Rational:
            return bool(difference == 0)
        if a.free_symbols or b.free_symbols or (not is_equal and is_rounded):
            return is_equal
        x, y, far = (abs(N(each, 30, maxn=1_000)) for each in (a, b, difference))
        if not all(each.is_Float or each.is_Rational for each in (x, y, far)):
            return is_equal  # infinite, or left as it was
        if is_rounded:
            return bool(far <= max(x, y) * Float("1e-9"))
        return bool(far <= max(x, y, 1) * Float("1e-900"))

    equal(r"\frac{\sqrt{2}}{2}", r"\sin(\frac{\pi}{4})")
    equal("(x+1)^2", "x^2+2x+1")
    return equal


class Supervisor:
    """Hands requests to a child, and replaces a child that died."""

    def __init__(self, equal: Callable[[str, str], bool | None], requests: int, replies: TextIO) -> None:
        """Prepare to answer."""
        self._equal, self._requests, self._replies = equal, requests, replies
        self._parent = os.getppid()
        self._child: int | None = None
        self._to_child = self._from_child = -1

    def serve(self) -> None:
        """Answer until the requests end."""
        waiting = b""
        while True:
            while b"\n" not in waiting:
                more = os.read(self._requests, 1 << 16)
                if not more:
                    return self._end()
                waiting += more
            request, _, waiting = waiting.partition(b"\n")
            reply = self._ask(request)
            if reply is None:
                return self._end()
            self._replies.write(reply.decode() + "\n")
            self._replies.flush()

    def _ask(self, request: bytes) -> bytes | None:
        """Return the child's reply; None if nobody waits for it any more."""
        if self._child is None:
            self._fork()
        try:
            os.write(self._to_child, request + b"\n")
        except BrokenPipeError:  # it died while it had nothing to do
            self._bury()
            self._fork()
            os.write(self._to_child, request + b"\n")
        reply = b""
        while not reply.endswith(b"\n"):
            # Requests come one at a time: what can be read from there now is the end of them.
            ready, _, _ = select.select([self._from_child, self._requests], [], [], 1.0)
            if self._requests in ready or os.getppid() != self._parent:
                return None
            if self._from_child in ready:
                more = os.read(self._from_child, 1 << 16)
                if not more:
                    return json.dumps([None, self._bury(), 5.0]).encode()
                reply += more
        if b'"ran out of memory"' in reply:
            self._bury()
        return reply.strip()

    def _fork(self) -> None:
        theirs_in, self._to_child = os.pipe()
        self._from_child, theirs_out = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            for descriptor in (self._to_child, self._from_child, self._requests, self._replies.fileno()):
                os.close(descriptor)
            try:
                _work(self._equal, theirs_in, theirs_out)
            finally:
                os._exit(0)
        os.close(theirs_in)
        os.close(theirs_out)

    def _bury(self) -> str:
        """Wait for a child that is dead or not needed, and return why it died."""
        child, self._child = self._child, None
        os.close(self._to_child)
        os.close(self._from_child)
        assert child is not None
        status = 0
        with suppress(ChildProcessError):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return "ran out of memory"
        number = os.WTERMSIG(status)
        return _LIMITS.get(signal.Signals(number), f"the process that compared died of {signal.Signals(number).name}")

    def _end(self) -> None:
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)


def _work(equal: Callable[[str, str], bool | None], requests: int, replies: int) -> None:
    """Compare, in the child, until the requests end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: die with the supervisor, even in the midst of work
    with suppress(ValueError, OSError):  # macOS
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM))
    with os.fdopen(requests, encoding="utf-8") as lines, os.fdopen(replies, "w", encoding="utf-8") as out:
        for line in lines:
            reference, stated, seconds = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, max(seconds, 0.01))
            signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
            begin = sum(os.times()[:2])
            verdict, reason = _verdict(equal, reference, stated)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _write(out, [verdict, reason, sum(os.times()[:2]) - begin])
            if reason == "ran out of memory":
                return


def _verdict(equal: Callable[[str, str], bool | None], reference: str, stated: str) -> tuple[bool | None, str]:
    try:
        verdict = equal(reference, stated)
    except MemoryError:
        return None, "ran out of memory"
    except (Exception, RecursionError) as error:  # whatever sympy makes of it, the answers cannot be compared
        return None, f"cannot be compared ({type(error).__name__})"
    return verdict, "" if verdict is not None else "cannot be compared: math-verify reads no formula"


def _write(out: TextIO, message: object) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
