"""Shared by the benchmarks: one pinned core, the best of several runs, peers and limits in processes, one table.

Import this first: it pins the process and the threads of all libraries to one core before any of them is loaded.
`Measured` maps a name to its measurement: `seconds`, and other results such as `rows`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ |= dict.fromkeys(
    ["OMP_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"], "1"
)

HERE = Path(__file__).resolve().parent
PEERS_PYTHON = HERE / ".venv-peers" / "bin" / "python"
NATIVE = HERE / "native" / "target" / "release" / "native-limits"

Measured: TypeAlias = dict[str, dict[str, Any]]


def best(work: Callable[[], Any], *, times: int = 5, patience: float = 20.0) -> tuple[float, Any]:
    """Run once to warm up, then `times` times; return the shortest time in seconds and the last result.

    No run starts later than `patience` seconds after the first. If the warm-up alone takes longer, its time counts.
    """
    begin = start = time.perf_counter()
    result = work()
    seconds = [time.perf_counter() - start]
    if seconds[0] > patience:
        return seconds[0], result
    warm = []
    while len(warm) < times and time.perf_counter() - begin < patience:
        del result  # free its memory before the next run
        start = time.perf_counter()
        result = work()
        warm.append(time.perf_counter() - start)
    return min(warm or seconds), result


def peers(row: str, *arguments: object) -> Measured:
    """Run `peers/ROW.py ARGUMENTS…` in the environment of the peers and return its measurements."""
    if not PEERS_PYTHON.exists():
        sys.exit("the peers are not installed: sh benchmarks/peers/install.sh")
    return _json([PEERS_PYTHON, "-W", "ignore", HERE / "peers" / f"{row}.py", *arguments])


def native(*arguments: object) -> Measured:
    """Run the program in `native/` and return its measurements: seqpacker, and the limits of this core."""
    if not NATIVE.exists():
        sys.exit("the limits are not built: sh benchmarks/peers/install.sh")
    return _json([NATIVE, *arguments])


def again(script: str, *arguments: object, **environment: str) -> Measured:
    """Run one of our scripts in a new process, for settings that are read only once; return its measurements."""
    return _json([sys.executable, script, *arguments], environment)


def _json(command: Iterable[object], environment: Mapping[str, str] | None = None) -> Measured:
    finished = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=os.environ | (environment or {}),
    )
    return json.loads(finished.stdout[finished.stdout.index("{") :])


def around(ours: Callable[[], Measured], theirs: Callable[[], Measured]) -> tuple[Measured, Measured]:
    """Measure ours (and the limits) before and after the peers, so that drift of the machine favors neither side."""
    before = ours()
    peers = theirs()
    after = ours()
    return {name: min(before[name], after[name], key=lambda one: one["seconds"]) for name in before}, peers


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a Markdown table: the first column aligned left, the others right."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for first, *others in lines:
        cells = [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def milliseconds(one: Mapping[str, Any]) -> str:
    """Format the time of a measurement, or why it is missing."""
    return f"{one['seconds'] * 1e3:,.2f} ms" if "seconds" in one else one["missing"]


def speed(one: Mapping[str, Any], unit: str, scale: float = 1e6) -> str:
    """Format items per second of a measurement with `num` items, or why it is missing."""
    return f"{one['num'] / one['seconds'] / scale:,.2f} {unit}/s" if "seconds" in one else one["missing"]


def faster(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Format how many times as fast ours is, per item where a measurement has `num`."""
    if "seconds" not in theirs:
        return "–"
    ratio = theirs["seconds"] / theirs.get("num", 1) / (ours["seconds"] / ours.get("num", 1))
    return f"{ratio:,.2f} ×" if ratio < 100 else f"{ratio:,.0f} ×"


def machine() -> str:
    """Describe the machine and the package versions in one line."""
    import platform

    cpuinfo = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    wide = "AVX-512" if "avx512bw" in fields.get("flags", "") else "no AVX-512"
    import numpy as np
    import pyarrow as pa

    return (
        f"{fields.get('model name', platform.processor())}, family {fields.get('cpu family')} model "
        f"{fields.get('model')}, {os.cpu_count()} cores of which one is used, {wide}, Linux, "
        f"Python {platform.python_version()}, numpy {np.__version__}, pyarrow {pa.__version__}, "
        f"{time.strftime('%Y-%m-%d')}"
    )
