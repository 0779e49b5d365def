"""Nothing in select and pack walks over tokens in Python: select reads 500M of them, pack the 125M that it kept.

The limits are on memory, and on processor time in units of a plain Python loop that takes each token out of an
array and adds up its log-probability: less than the least that such a walk could do.
"""

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_memory.py"
ROLLOUTS, TOKENS, KEPT = 100_000, 5_000, 25_000


@pytest.mark.slow
def test_100k_rollouts_of_5k_tokens(tmp_path: Path) -> None:
    size = ["--rollouts", str(ROLLOUTS), "--tokens", str(TOKENS), "--folder", str(tmp_path)]
    loops = [python_loop() for _ in range(5)]
    done = subprocess.run([sys.executable, str(BENCHMARK), *size], capture_output=True, text=True, check=False)
    loops += [python_loop() for _ in range(5)]
    assert done.returncode == 0, done.stderr
    assert f"written: {ROLLOUTS:,} rollouts" in done.stdout
    assert f"kept {KEPT:,} of {ROLLOUTS:,}" in done.stdout
    found = re.findall(r"(\w+): .* ([\d.]+) s of one core, peak memory ([\d.]+) GB", done.stdout)
    assert [stage for stage, _, _ in found] == ["select", "pack"]
    limit = (ROLLOUTS + KEPT) * TOKENS * statistics.median(loops)
    assert sum(float(seconds) for _, seconds, _ in found) < limit, f"{limit:.0f} s is the limit\n{done.stdout}"
    assert all(float(gigabytes) < 2 for _, _, gigabytes in found), done.stdout


def python_loop(tokens: int = 1_000_000) -> float:
    """Return the seconds of processor time that a token costs a loop in Python which does almost nothing."""
    ids, logprobs = np.arange(tokens, dtype=np.int32), np.linspace(-2, 0, tokens, dtype=np.float32)
    row, total = [], 0.0
    began = time.process_time()
    for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
        row.append(token)
        total += logprob
    return (time.process_time() - began) / tokens
