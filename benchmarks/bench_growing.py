"""Growing a folder of answers by one question: the time until the first request, against making the folder.

    python benchmarks/bench_growing.py [--answers 100000] [--tokens 300]

A sampler that writes random tokens at once makes --answers answers, four to a question, through the stage itself. Then
the same call with one question more: how long until the sampler gets its four requests, and how long in all.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
import numpy as np

import dasd_lite as dl
from dasd_lite.inference import Completion, Request, SamplingParams

ASKED: list[tuple[float, float, int]] = []
"""When the sampler was asked, the processor time until then, and for how many answers."""


class Instant:
    """A sampler that answers at once."""

    def __init__(self, tokens: int) -> None:
        """Make up an answer of this many tokens."""
        rng = np.random.default_rng(0)
        self.words = [f"{w:x} " for w in rng.integers(0x100, 0xFFF, tokens)]
        self.text = "<think>\n" + "".join(self.words) + "</think>\n\n4"
        self.token_bytes = np.array([8, *(len(w) for w in self.words), 11, 0], np.int32)
        self.logprobs = -rng.exponential(0.3, len(self.token_bytes)).astype(np.float32)
        self.ids = rng.integers(0, 150_000, len(self.token_bytes), dtype=np.int32)

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Answer every request with the same text."""
        ASKED.append((time.perf_counter(), time.process_time(), len(requests)))
        for request in requests:
            yield Completion(request.position, self.text, self.ids, self.logprobs, self.token_bytes, "stop")

    def status(self) -> str:
        """Return nothing."""
        return ""

    def close(self) -> None:
        """Do nothing."""


def main() -> None:
    """Make a folder, grow it, and print the times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    prompts = [
        dl.Prompt(f"q{n}", ({"role": "user", "content": f"How much is {n} + {n}?"},), "all", None)
        for n in range(options.answers // 4 + 1)
    ]
    sampler = Instant(options.tokens)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        out = Path(name) / "low" / "sample"
        start = time.perf_counter()
        dl.sample(prompts[:-1], sampler, num_samples=4, max_tokens=4096, out=out)
        made = time.perf_counter() - start
        size = sum(path.stat().st_size for path in out.glob("*.parquet"))
        start, cpu = time.perf_counter(), time.process_time()
        grown = dl.sample(prompts, sampler, num_samples=4, max_tokens=4096, out=out)
        total = time.perf_counter() - start
        before, cpu = ASKED[-1][0] - start, ASKED[-1][1] - cpu
    assert (ASKED[-1][2], grown.counts["rollouts"]) == (4, len(prompts) * 4)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{options.answers:,} answers, {size / 1e6:,.0f} MB, made in {made:.1f} s; one question more: {before:.2f} s"
        f" until the first request ({cpu:.2f} s of processor time), {total:.2f} s in all, {total / made:.2%} of making"
        f" it; peak {peak:,.0f} MB"
    )


if __name__ == "__main__":
    assert harness  # importing it pinned this process to one core
    main()
