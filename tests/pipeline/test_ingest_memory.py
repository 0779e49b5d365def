"""ingest holds a batch of answers and their log-probabilities, never the files."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ANSWERS, TOKENS = 2_000, 2_000


def test_memory_does_not_grow_with_the_answers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_ingest_logprobs as bench

    bench.write(tmp_path, ANSWERS, TOKENS)
    command = [sys.executable, str(BENCHMARKS / "bench_ingest_logprobs.py"), "--measure", "--folder", str(tmp_path)]
    done = subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["counts"]["logprobs"] == {"aligned": ANSWERS, "reasons": {}, "without_answer": 0}
    memory = measured["memory"]
    assert len(memory) == 8, "batches"
    # What the later answers would take as arrays: ids, log-probabilities and lengths, without their text.
    held = (ANSWERS * 6 // 8) * TOKENS * 12
    assert memory[-1] - max(memory[:2]) < held / 2, memory
    assert measured["peak"] < 1.5e9
