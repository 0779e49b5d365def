"""The cost of committing every finished answer to disk, journal and shards, as a share of sampling time.

    python benchmarks/bench_journal.py [--answers 3000] [--tokens 2000] [--rate 5000]

Commits synthetic answers one by one, as sampling does, and writes the shards, on one core and on the disk of --folder.
Compares the time with what a teacher that writes --rate tokens per second needs for the same answers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import harness
import numpy as np

from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import identify
from dasd_lite.data.records import ROLLOUT
from dasd_lite.inference import Completion
from dasd_lite.inference.collect import token_columns


def answers(number: int, tokens: int) -> list[Completion]:
    """Make answers that compress no better than real ones; the benchmark uses them in turn."""
    rng = np.random.default_rng(0)
    words = [f"{w:x}" for w in rng.integers(0, 1 << 16, 4096)]
    completions = []
    for position in range(number):
        text = " ".join(words[i] for i in rng.integers(0, len(words), tokens))
        completions.append(
            Completion(
                position=position,
                text=text,
                token_ids=rng.integers(0, 150_000, tokens, dtype=np.int32),
                logprobs=-rng.exponential(0.3, tokens).astype(np.float32),
                token_bytes=np.full(tokens, 4, dtype=np.int32),
                finish_reason="stop",
            )
        )
    return completions


def main() -> None:
    """Fill a journal, publish it, and print the share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=5000.0, help="tokens per second of the teacher")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    completions = answers(200, options.tokens)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        identity = identify("sample", 1, {}, {})
        start = time.perf_counter()
        with Journal(Path(name) / "sample", identity, ROLLOUT, options.answers) as journal:
            for position in range(options.answers):
                completion = completions[position % len(completions)]
                row = {
                    "uid": f"{position:016x}",
                    "prompt_uid": f"p{position // 4}",
                    "messages": [{"role": "user", "content": "How much is it?"}],
                    "index": position % 4,
                    "completion": completion.text,
                    "finish_reason": completion.finish_reason,
                    "prefix_bytes": 0,
                    **token_columns(completion),
                }
                usage = {"prompt_tokens": 100, "completion_tokens": options.tokens}
                journal.commit({position: row}, usage)
            journal.publish({"rollouts": options.answers})
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in (Path(name) / "sample").glob("*.parquet"))
    each = seconds / options.answers
    sampling = options.tokens / options.rate
    print(
        f"{options.answers:,} answers of {options.tokens:,} tokens: {1000 * each:.2f} ms each, {size / 1e6:,.0f} MB;"
        f" {each / sampling:.2%} of the {sampling:.2f} s per answer of a teacher at {options.rate:,.0f} tokens/s"
    )


if __name__ == "__main__":
    assert harness  # importing it pinned this process to one core
    main()
