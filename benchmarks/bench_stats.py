"""Sentence statistics: token log-probabilities to probabilities, classes and counts, against numpy and others.

    python benchmarks/bench_stats.py

50M tokens per model in sentences of about 22, responses of about 350 sentences. Ours does it in one pass; the peers
are what one would write with numpy, pandas, polars and numba. Tokens per second count both models' tokens. Each is
checked: counts equal to a float64 reference, and the largest error of a probability. Limit: reading the
log-probabilities once.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness  # first: it pins this process to one core
import numpy as np
from data import offsets_of
from numpy.typing import NDArray

from dasd_lite.method.divergence import sentence_stats

NUM_TOKENS = 50_000_000
BETA = 0.1
COLUMNS = ("teacher_logprobs", "teacher_spans", "student_logprobs", "student_spans", "response_offsets")
PATHS = ("portable", "avx2", "avx512")


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--ours"]:
        print(json.dumps(ours(Path(sys.argv[2]), sys.argv[3])))
        return
    print(f"## Sentence statistics\n\n{harness.machine()}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num, num_sentences = write(folder)

        def ours_and_limit() -> harness.Measured:
            # What the processor lacks is an error there, and then has no row.
            measured = {}
            for path in ("", *PATHS):
                if path != "avx512" or "avx512bw" in Path("/proc/cpuinfo").read_text():
                    environment = {"DASD_LITE_SIMD": path} if path else {}
                    measured |= harness.again(__file__, "--ours", folder, path or "its own choice", **environment)
            files = [folder / f"{model}_logprobs.npy" for model in ("teacher", "student")]
            return measured | harness.native("read", *files)

        measured, peers = harness.around(ours_and_limit, lambda: harness.peers("stats", folder, BETA))
    print(f"{num / 1e6:.0f}M tokens of both models, {num_sentences:,} sentences.\n")
    first = measured["sentence_stats, its own choice"]
    rows = []
    for label, one in (measured | peers).items():
        one.setdefault("num", num)
        checked = (f"{one['error']:.1e}", f"{one['differing']:,}") if "error" in one else ("–", "–")
        rows.append((label, harness.speed(one, "G tokens", 1e9), *checked, harness.faster(first, one)))
    harness.table(("", "", "largest error", "sentences of another class", "ours is as fast"), rows)


def write(folder: Path) -> tuple[int, int]:
    """Write the columns and the float64 reference; return the numbers of tokens and of sentences."""
    rng = np.random.default_rng(0)
    num = NUM_TOKENS // 22
    lengths = np.exp(rng.normal(np.log(18), 0.6, num)).clip(1, 400).astype(np.int32)  # mean about 22
    # The other tokenizer has more tokens, or fewer.
    others = np.maximum(1, np.rint(lengths * rng.uniform(0.8, 1.2, num))).astype(np.int32)
    scale = np.exp(rng.normal(-1.2, 0.8, num)).astype(np.float32)
    apart = np.exp(rng.normal(0, 0.5, num)).astype(np.float32)
    responses = np.exp(rng.normal(np.log(300), 0.5, num // 350)).clip(1).astype(np.int64)
    response_offsets = np.unique(np.minimum(offsets_of(responses), num))
    response_offsets[-1] = num
    probabilities = []
    for model, sizes, scales in (("teacher", lengths, scale), ("student", others, scale * apart)):
        spans = offsets_of(sizes)
        logprobs = -rng.standard_exponential(spans[-1], np.float32) * np.repeat(scales, sizes)
        np.save(folder / f"{model}_logprobs.npy", logprobs)
        np.save(folder / f"{model}_spans.npy", spans)
        probabilities.append(np.exp(np.add.reduceat(logprobs, spans[:-1], dtype=np.float64) / sizes))
    np.save(folder / "response_offsets.npy", response_offsets)
    np.save(folder / "reference.npy", np.stack(probabilities))
    return int(lengths.sum() + others.sum()), num


def ours(folder: Path, label: str) -> harness.Measured:
    """Measure and check ours."""
    columns = [np.load(folder / f"{column}.npy") for column in COLUMNS]
    seconds, stats = harness.best(lambda: sentence_stats(*columns, beta=BETA))
    checked = check(np.load(folder / "reference.npy"), stats.p_teacher, stats.p_student, stats.classes)
    counted = [np.add.reduceat(stats.classes == kind, columns[4][:-1], dtype=np.int64) for kind in range(3)]
    assert np.array_equal(np.stack(counted, 1), stats.counts), "counts are those of the classes"
    return {f"sentence_stats, {label}": {"seconds": seconds} | checked}


def check(reference: NDArray[np.float64], p_teacher: Any, p_student: Any, classes: Any) -> dict[str, Any]:
    """Largest error of a probability, and in how many sentences the class is another than in float64."""
    error = max(float(np.abs(reference[0] - p_teacher).max()), float(np.abs(reference[1] - p_student).max()))
    apart = reference[0] - reference[1]
    expected = np.where(apart > BETA, 1, np.where(apart < -BETA, 2, 0))
    return {"error": error, "differing": int((expected != classes).sum())}


if __name__ == "__main__":
    main()
