"""Sentence ends: 100 MB of reasoning-like text, against pySBD, NLTK's Punkt and BlingFire.

    python benchmarks/bench_sentences.py

The text is made from templates (make_text.py): prose with LaTeX, decimals, abbreviations, lists, code fences,
some Chinese. Prints bytes per second and sentences per 1,000 bytes: the splitters have rules of their own, so these
differ. The peers get the first 2 MB, the slow ones of them as much as they manage in some seconds. Limit: to find every
full stop.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import harness  # first: it pins this process to one core
import numpy as np
import pyarrow as pa
from data import offsets_of
from make_text import reasoning

from dasd_lite.method.sentences import sentence_ends

NUM_BYTES = 100_000_000
SAMPLE = 2_000_000


def main() -> None:
    """Measure and print."""
    print(f"## Sentence ends\n\n{harness.machine()}\n")
    texts = reasoning(NUM_BYTES)
    column = pa.array([text.decode() for text in texts], pa.large_string())
    text = b"".join(texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").write_bytes(text)
        offsets = offsets_of(np.array([len(one) for one in texts]))
        np.save(folder / "offsets.npy", offsets[: np.searchsorted(offsets, SAMPLE) + 1])

        def ours_and_limit() -> harness.Measured:
            seconds, ends = harness.best(lambda: sentence_ends(column))
            limits = harness.native("find", folder / "text")
            return {"sentence_ends": {"seconds": seconds, "sentences": len(ends.values)}} | limits

        ours, peers = harness.around(ours_and_limit, lambda: harness.peers("sentences", folder))
    print(f"{len(text) / 1e6:.1f} MB in {len(texts):,} texts.\n")
    rows = []
    for label, one in (ours | peers).items():
        one.setdefault("num", len(text))
        each = f"{one['sentences'] / one['num'] * 1e3:.2f}" if "sentences" in one else "–"
        rows.append((label, harness.speed(one, "MB"), each, harness.faster(ours["sentence_ends"], one)))
    harness.table(("", "", "sentences in 1,000 bytes", "ours is as fast"), rows)


if __name__ == "__main__":
    main()
