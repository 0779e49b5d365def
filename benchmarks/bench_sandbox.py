"""Programs in the sandbox: runs per second beside a process without one, and what attacks come to.

    python benchmarks/bench_sandbox.py

Each run is one test of a small program that reads a number and prints another. Compared with the same program in a
plain process of the same Python. All are measured in turn, several times, and the best round counts. The attacks are
those of tests/grading/attacks.py.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CORES = os.sched_getaffinity(0)
import harness  # noqa: E402  it pins this process to one core

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import platform  # noqa: E402

from tests.grading.attacks import ATTACKS, Attack, every_denied_call, result  # noqa: E402

from dasd_lite.errors import ConfigError  # noqa: E402
from dasd_lite.grading.code.sandbox import BACKENDS, Sandbox, open_sandbox  # noqa: E402

CODE = "import sys\nfrom collections import deque\n\nnumbers = deque(map(int, sys.stdin))\nprint(sum(numbers))"
GIVEN = "".join(f"{number}\n" for number in range(100))
ROUNDS, RUNS = 8, 40


def in_sandbox(sandbox: Sandbox) -> Callable[[], object]:
    """Return a run in this sandbox."""

    def run() -> None:
        ended = sandbox.run_program(CODE, GIVEN)
        assert ended.output == b"4950\n", ended

    return run


def in_process(python: str) -> Callable[[], object]:
    """Return a run in a plain process."""

    def run() -> None:
        subprocess.run([python, "-c", CODE], input=GIVEN, capture_output=True, check=True, encoding="utf-8")

    return run


def used() -> float:
    """Return the processor time of this process and of those that have ended."""
    both = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)


def runs_per_second(work: Callable[[], object], num_threads: int) -> tuple[float, float]:
    """Return runs per second and per processor second, in as many threads on as many cores."""
    os.sched_setaffinity(0, set(sorted(CORES)[-num_threads:]))
    with ThreadPoolExecutor(num_threads) as pool:
        begin, used_before = time.perf_counter(), used()
        list(pool.map(lambda _: work(), range(RUNS)))
        return RUNS / (time.perf_counter() - begin), RUNS / (used() - used_before)


def main() -> None:
    """Measure and print."""
    sandboxes: dict[str, Sandbox] = {}
    for backend in BACKENDS:
        try:
            sandboxes[backend] = open_sandbox(backend)
        except ConfigError as error:
            print(f"{backend}: {error}\n")
    first = next(iter(sandboxes.values()))
    works = {"plain process": in_process(first.python[0])}
    works |= {f"{backend}: {sandbox.name}": in_sandbox(sandbox) for backend, sandbox in sandboxes.items()}
    best: dict[str, list[tuple[float, float]]] = {name: [(0.0, 0.0)] * 2 for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            for index, num_threads in enumerate((1, 2)):
                now = runs_per_second(work, num_threads)
                best[name][index] = tuple(map(max, best[name][index], now))  # type: ignore[assignment]
    print(f"## Programs in the sandbox\n\n{harness.machine().replace('of which one is used, ', '')}\n")
    plain = best["plain process"][0][1]
    rows = [
        (name, f"{one[0]:.0f}", f"{two[0]:.0f}", f"{one[1]:.0f}", f"{plain / one[1]:.2f} ×")
        for name, (one, two) in best.items()
    ]
    harness.table(
        ("", "runs/s, one thread", "two threads, two cores", "runs per CPU second", "CPU time beside a plain process"),
        rows,
    )
    attacks = ATTACKS | {"every system call of the filter's table": Attack(every_denied_call(platform.machine()))}
    rows = [(name, *(result(sandbox, attack) for sandbox in sandboxes.values())) for name, attack in attacks.items()]
    harness.table(("attack", *sandboxes), rows)


if __name__ == "__main__":
    main()
