"""Peak memory of select and pack on 100,000 synthetic rollouts of 5,000 tokens.

    python benchmarks/bench_memory.py [--rollouts 100000] [--tokens 5000] [--folder DIR]

Writes the rollouts and their scores (a few GB, removed afterwards), then runs each stage in a process of its own on one
core, and prints its processor time and peak memory as the system counts it (which includes reclaimable memory that is
mapped from disk). tests/pipeline/test_scale.py checks both against their limits.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

import dasd_lite
from dasd_lite.chat.chat import Chat
from dasd_lite.config.stages import PackConfig, SelectConfig
from dasd_lite.data.manifest import identify
from dasd_lite.data.records import ROLLOUT, SCORE
from dasd_lite.data.writer import ShardWriter
from dasd_lite.stages.pack import pack
from dasd_lite.stages.select import select

STUDENT = Path(dasd_lite.__file__).parent / "demo" / "student"
CANDIDATES = 4
BATCH = 250


def main() -> None:
    """Write the data, then measure both stages."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rollouts", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=5_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stage", choices=("select", "pack"))
    options = parser.parse_args()
    if options.stage:
        measure(options.folder, options.stage)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        write(folder, options.rollouts, options.tokens)
        size = sum(p.stat().st_size for p in folder.rglob("*.parquet"))
        print(f"written: {options.rollouts:,} rollouts, {size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s")
        one_core = os.environ | dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
        for stage in ("select", "pack"):
            command = [sys.executable, __file__, "--folder", str(folder), "--stage", stage]
            subprocess.run(command, check=True, env=one_core)


def measure(folder: Path, stage: str) -> None:
    """Run one stage and print what it took."""
    if stage == "select":
        config = SelectConfig(max_repeated_ngrams=1.0, max_duplicate_sentences=1.0, max_duplicate_lines=1.0)
        counts = select(
            folder / "rollouts",
            str(folder / "student"),
            config,
            out=folder / "select",
            seq_len=1 << 20,
            scores=folder / "scores",
        ).counts
        done = f"kept {counts['kept']:,} of {counts['rollouts']:,}"
    else:
        counts = pack(folder / "select", PackConfig(seq_len=65536), out=folder / "pack").counts
        done = f"{counts['tokens'] / 1e6:,.0f}M tokens in {counts['rows']:,} rows, {counts['fill']:.2%} full"
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime
    print(f"{stage}: {done}, {seconds:.1f} s of one core, peak memory {used.ru_maxrss / 1e6:.2f} GB")


def write(folder: Path, num_rollouts: int, num_tokens: int) -> None:
    """Write rollouts of about `num_tokens` student tokens, and scores for them."""
    shutil.copytree(STUDENT, folder / "student")
    config = json.loads((STUDENT / "config.json").read_text()) | {"max_position_embeddings": 1 << 20}
    (folder / "student" / "config.json").write_text(json.dumps(config))
    chat = Chat(STUDENT)
    sentence = "Cid up 3 from 9 is 2. Dan down 1 from 2 is 1.\n"
    repeats = num_tokens // len(chat.encode(sentence))
    rng = np.random.default_rng(0)
    rollouts = ShardWriter(folder / "rollouts", identify("sample", 1, {}, {}), {"rollouts": ROLLOUT}, shard_rows=5000)
    scores = ShardWriter(folder / "scores", identify("score", 1, {}, {}), {"scores": SCORE}, shard_rows=5000)
    for first in range(0, num_rollouts, BATCH):
        rows, scored = [], []
        for number in range(first, min(first + BATCH, num_rollouts)):
            uid = f"{number:08d}"
            text = "<think> " + sentence * repeats + f"It is {number}.</think>\nAnswer: {number}"
            num_sentences = 2 * repeats + 4
            ids = rng.integers(16, chat.vocab_size, num_tokens, dtype=np.int32)  # no end token among them
            rows.append(
                {
                    "uid": uid,
                    "prompt_uid": f"q{number // CANDIDATES}",
                    "messages": [{"role": "user", "content": f"Question {number // CANDIDATES}?"}],
                    "domain": "all",
                    "index": number % CANDIDATES,
                    "completion": text,
                    "finish_reason": "stop",
                    "prefix_bytes": 0,
                }
            )
            scored.append(
                {
                    "uid": uid,
                    "p_teacher": rng.random(num_sentences, dtype=np.float32),
                    "p_student": rng.random(num_sentences, dtype=np.float32),
                    "ids": ids,
                    "num_context_tokens": 20,
                }
            )
        rollouts.write("rollouts", pa.RecordBatch.from_pylist(rows, schema=ROLLOUT))
        scores.write("scores", pa.RecordBatch.from_pylist(scored, schema=SCORE))
    rollouts.publish({})
    scores.publish({})


if __name__ == "__main__":
    main()
