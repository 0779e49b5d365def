"""Nothing in select and pack walks over tokens in Python: select reads 500M of them, pack the 125M that it kept.

Ten times the tokens cost not one line of Python more. At the full size the limits are on memory, and on processor time
in units of a plain Python loop that takes each token out of an array and adds up its log-probability: less than the
least that a walk in the C code of a library could do.
"""

import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROLLOUTS, TOKENS, KEPT = 100_000, 5_000, 25_000


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_memory

    return bench_memory


def test_more_tokens_are_not_more_lines_of_python(bench, tmp_path):
    lines = [lines_of_python(bench, tmp_path / str(tokens), tokens) for tokens in (100, 500, 5000)]
    few, many = lines[1:]  # the first call imports and fills caches
    assert few > 10_000 and abs(many - few) < 1_000, lines


def lines_of_python(bench, folder, tokens):
    """Return how many lines of Python select and pack run for 40 rollouts of `tokens` tokens."""
    num = 0

    def trace(frame, event, argument):
        nonlocal num
        num += event == "line"
        return trace

    folder.mkdir()
    bench.write(folder, 40, tokens)
    before = sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        bench.measure(folder, "select")
        bench.measure(folder, "pack")
    finally:
        sys.settrace(before)
        threading.settrace(before)
    return num


@pytest.mark.slow
def test_100k_rollouts_of_5k_tokens(tmp_path):
    size = ["--rollouts", str(ROLLOUTS), "--tokens", str(TOKENS), "--folder", str(tmp_path)]
    loops = [python_loop() for _ in range(5)]
    command = [sys.executable, str(BENCHMARKS / "bench_memory.py"), *size]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    loops += [python_loop() for _ in range(5)]
    assert done.returncode == 0, done.stderr
    assert f"written: {ROLLOUTS:,} rollouts" in done.stdout
    assert f"kept {KEPT:,} of {ROLLOUTS:,}" in done.stdout
    measured = re.findall(r"(\w+): .* ([\d.]+) s of one core, peak memory ([\d.]+) GB", done.stdout)
    assert [stage for stage, _, _ in measured] == ["select", "pack"]
    limit = (ROLLOUTS + KEPT) * TOKENS * statistics.median(loops)
    assert sum(float(seconds) for _, seconds, _ in measured) < limit, f"{limit:.0f} s is the limit\n{done.stdout}"
    assert all(float(gigabytes) < 2 for _, _, gigabytes in measured), done.stdout


def python_loop(tokens=1_000_000):
    """Return the seconds of processor time that a token costs a loop in Python which does almost nothing."""
    ids, logprobs = np.arange(tokens, dtype=np.int32), np.linspace(-2, 0, tokens, dtype=np.float32)
    row, total = [], 0.0
    began = time.process_time()
    for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
        row.append(token)
        total += logprob
    return (time.process_time() - began) / tokens
