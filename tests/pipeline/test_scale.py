"""Nothing in select and pack walks over tokens in Python: select reads 500M of them, pack the 125M that it kept.

The limits are on processor time and memory, which other work on the machine does not change much.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_memory.py"


@pytest.mark.slow
def test_100k_rollouts_of_5k_tokens(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--rollouts", "100000", "--tokens", "5000", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "written: 100,000 rollouts" in done.stdout
    assert "kept 25,000 of 100,000" in done.stdout
    found = re.findall(r"(\w+): .* ([\d.]+) s of one core, peak memory ([\d.]+) GB", done.stdout)
    assert [stage for stage, _, _ in found] == ["select", "pack"]
    assert sum(float(seconds) for _, seconds, _ in found) < 120, done.stdout  # 47 to 90 s by processor
    assert all(float(gigabytes) < 2 for _, _, gigabytes in found), done.stdout
