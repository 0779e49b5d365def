"""Gather rows: the tokens of packed rows out of one long column, against numpy, TRL, LLaMA-Factory and axolotl.

    python benchmarks/bench_gather.py

8,000 sequences, 100M int32 tokens, all rows of their plan in random order: at once (into a buffer that was written
before, and into fresh memory) and 8 rows at a time (one buffer); out of memory and out of a mapped file, which the
system holds in memory; bare, with position ids, and with labels too. Prints tokens per second. Limits: memcpy of as
many bytes. The collators of the trainers write position ids and labels as well; they get ready examples, which in their
programs lie in an Arrow file, and so are read from there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness  # first: it pins this process to one core
import numpy as np
from data import SEQ_LEN, long_lengths, offsets_of

from dasd_lite.method.packing import gather_rows, pack_rows

NUM = 8_000
CHUNK = 8


def main() -> None:
    """Measure and print."""
    print(f"## Gather rows\n\n{harness.machine()}\n")
    lengths = long_lengths(NUM)
    offsets = offsets_of(lengths)
    plan = pack_rows(lengths, SEQ_LEN)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 150_000, offsets[-1], dtype=np.int32)
    order = rng.permutation(plan.num_rows).astype(np.uint32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, array in {"tokens": tokens, "offsets": offsets, "items": plan.items, "rows": plan.offsets}.items():
            np.save(folder / f"{file}.npy", array)
        np.save(folder / "order.npy", order)
        expected = np.concatenate(
            [tokens[offsets[item] : offsets[item + 1]] for row in order for item in plan.row(row)]
        )
        runs = our_runs(folder, tokens, offsets, plan, order, expected)

        def ours_and_limits() -> harness.Measured:
            measured = {}
            for label, run in runs.items():
                seconds, _ = harness.best(run)
                measured[label] = {"seconds": seconds, "num": len(tokens)}
            limits = harness.native("copy", tokens.nbytes, CHUNK * SEQ_LEN * 4)
            return measured | {label: one | {"num": len(tokens)} for label, one in limits.items()}

        ours, peers = harness.around(ours_and_limits, lambda: harness.peers("gather", folder, CHUNK))
    show(len(tokens), plan.num_rows, ours, peers)


def our_runs(
    folder: Path, tokens: Any, offsets: Any, plan: Any, order: Any, expected: Any
) -> dict[str, Callable[[], object]]:
    """What is measured of ours, by name; each was checked once against a plain gather."""
    mask = np.random.default_rng(2).random(len(tokens)) < 0.9
    everything: dict[str, Any] = {"position_ids": True, "loss_mask": mask}
    bare = gather_rows(tokens, offsets, plan, order, position_ids=False)
    assert np.array_equal(bare.ids, expected), "the tokens of the rows"
    full = gather_rows(tokens, offsets, plan, order, **everything)
    assert np.array_equal(full.ids, expected) and full.position_ids[0] == 0, "the same with all columns"
    mapped = lambda: np.load(folder / "tokens.npy", mmap_mode="r")  # noqa: E731

    def in_chunks(column: Any, out: Any, **columns: Any) -> None:
        for at in range(0, len(order), CHUNK):
            gather_rows(column, offsets, plan, order[at : at + CHUNK], out=out, **columns)

    return {
        "at once, touched": lambda: gather_rows(tokens, offsets, plan, order, out=bare, position_ids=False),
        "at once, fresh": lambda: gather_rows(tokens, offsets, plan, order, position_ids=False),
        "at once, touched, position ids": lambda: gather_rows(
            tokens, offsets, plan, order, out=full, position_ids=True
        ),
        "at once, touched, position ids and labels": lambda: gather_rows(
            tokens, offsets, plan, order, out=full, **everything
        ),
        "at once, fresh, position ids and labels": lambda: gather_rows(tokens, offsets, plan, order, **everything),
        "8 rows at a time": lambda: in_chunks(tokens, bare, position_ids=False),
        "8 rows at a time, position ids and labels": lambda: in_chunks(tokens, full, **everything),
        "at once, touched, file mapped again": lambda: gather_rows(
            mapped(), offsets, plan, order, out=bare, position_ids=False
        ),
        "8 rows at a time, file mapped again": lambda: in_chunks(mapped(), bare, position_ids=False),
    }


def show(num_tokens: int, num_rows: int, ours: harness.Measured, peers: harness.Measured) -> None:
    """Print both tables."""
    print(f"{num_tokens / 1e6:.1f}M tokens in {num_rows:,} rows.\n")
    limits = {"touched": ours["memcpy, touched"], "fresh": ours["memcpy, fresh"], "time": ours["memcpy, in pieces"]}
    rows = []
    for name, one in ours.items():
        share = "–"
        if not name.startswith("memcpy"):
            limit = limits["time" if "at a time" in name else "fresh" if "fresh" in name else "touched"]
            share = f"{limit['seconds'] / one['seconds']:.2f}"
        rows.append((name, harness.speed(one, "M tokens"), share))
    harness.table(("gather_rows", "", "of memcpy"), rows)
    rows = []
    for name, one in peers.items():
        alike = one.get("like", "at once, fresh")
        rows.append((name, harness.speed(one, "M tokens"), harness.faster(ours[alike], one), alike))
    harness.table(("peers", "", "ours is as fast", "which of ours"), rows)


if __name__ == "__main__":
    main()
