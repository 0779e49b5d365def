"""What it costs that no finished answer is ever only in memory: journal and shards, as a share of sampling's time.

    python benchmarks/bench_journal.py [--answers 3000] [--tokens 2000] [--rate 5000]

Commits synthetic answers one by one, as sampling does, shards included, on one core and on the disk that the folder
lies on, and holds the time against the time that a teacher needs who writes --rate tokens a second.
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
    """Make some answers that do not compress better than real ones; they are used in turn."""
    rng = np.random.default_rng(0)
    words = [f"{w:x}" for w in rng.integers(0, 1 << 16, 4096)]
    made = []
    for position in range(number):
        text = " ".join(words[i] for i in rng.integers(0, len(words), tokens))
        made.append(
            Completion(
                position=position,
                text=text,
                token_ids=rng.integers(0, 150_000, tokens, dtype=np.int32),
                logprobs=-rng.exponential(0.3, tokens).astype(np.float32),
                token_bytes=np.full(tokens, 4, dtype=np.int32),
                finish_reason="stop",
            )
        )
    return made


def main() -> None:
    """Fill a journal, publish it, and print the share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=5000.0, help="tokens a second of the teacher")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    made = answers(200, given.tokens)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        identity = identify("sample", 1, {}, {})
        start = time.perf_counter()
        with Journal(Path(name) / "sample", identity, ROLLOUT, given.answers) as journal:
            for position in range(given.answers):
                completion = made[position % len(made)]
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
                took = {"prompt_tokens": 100, "completion_tokens": given.tokens}
                journal.commit({position: row}, took)
            journal.publish({"rollouts": given.answers})
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in (Path(name) / "sample").glob("*.parquet"))
    each = seconds / given.answers
    writing = given.tokens / given.rate
    print(
        f"{given.answers:,} answers of {given.tokens:,} tokens: {1000 * each:.2f} ms each, {size / 1e6:,.0f} MB;"
        f" {each / writing:.2%} of the {writing:.2f} s that a teacher of {given.rate:,.0f} tokens/s writes one in"
    )


if __name__ == "__main__":
    assert harness  # it has pinned this process to one core
    main()
