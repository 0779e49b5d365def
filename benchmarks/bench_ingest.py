"""Existing answers → rollouts: a file of questions and answers, against what one would write or call instead.

    python benchmarks/bench_ingest.py [--rows 40000] [--words 600] [--no-peers]

Ours reads, checks, names and counts every row, hashes the file, and writes Parquet. `a script, row by row` only decodes
JSON, renames two columns, and writes Parquet: json.loads, from_pylist, zstd, 256 rows at a time. datasets reads the
file into Arrow without a look at the rows. Prints bytes of the file per CPU second of one core, and the peak of memory
for the file and for one a quarter as long: it must not grow with the file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness  # first: it pins this process to one core
import pyarrow as pa
import pyarrow.parquet as pq

from dasd_lite.config.reading import Reading
from dasd_lite.data.formats.read import RowFiles
from dasd_lite.stages.ingest import ingest

_SCHEMA = pa.schema([("prompt", pa.string()), ("completion", pa.string()), ("domain", pa.string())])


def write_rows(path: Path, rows: int, words: int) -> None:
    """Write rows of a question of 40 words and an answer of `words` words that compress as text does."""
    rng = random.Random(0)
    known = [f"w{rng.randrange(10**6):x}" for _ in range(5_000)]
    with path.open("w") as file:
        for i in range(rows):
            text = f"<think>\n{' '.join(rng.choices(known, k=words))}\n</think>\n\nThe answer is {i}."
            row = {
                "prompt": f"{i}: {' '.join(rng.choices(known, k=40))}",
                "output": text,
                "domain": "math",
                "source": "x",
            }
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> int:
    """Read the rows and no more."""
    files = RowFiles([str(path)], Reading(), answers=True)
    rows = sum(1 for _ in files)
    files.finish()
    return rows


def take(path: Path, out: Path) -> int:
    """Run the stage."""
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()):
        return int(ingest(path, out=out).counts["rollouts"])


def script(path: Path, out: Path) -> int:
    """Do what a short script of one's own does."""
    rows: list[dict[str, Any]] = []
    number = 0
    with path.open() as lines, pq.ParquetWriter(out, _SCHEMA, compression="zstd") as writer:
        for line in lines:
            row = json.loads(line)
            rows.append({"prompt": row["prompt"], "completion": row["output"], "domain": row["domain"]})
            number += 1
            if len(rows) == 256:
                writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    return number


def cpu_seconds(work: Callable[[], int]) -> tuple[float, int]:
    """Return the CPU seconds of the best of three runs after a first one, and the rows."""
    rows, seconds = work(), []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds), rows


def peak(path: Path) -> float:
    """Return the peak of memory in MB of a process that runs the stage."""
    return float(harness.again(__file__, "--peak", path)["peak"]["megabytes"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--words", type=int, default=600)
    parser.add_argument("--no-peers", action="store_true", help="leave out datasets")
    parser.add_argument("--peak", type=Path, help="run the stage on this file and print the peak of memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.peak is not None:
            import resource

            take(options.peak, folder / "out")
            megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            print(json.dumps({"peak": {"megabytes": megabytes}}))
            return
        print(f"## Existing answers\n\n{harness.machine()}\n")
        path, quarter = folder / "rows.jsonl", folder / "quarter.jsonl"
        write_rows(path, options.rows, options.words)
        write_rows(quarter, options.rows // 4, options.words)
        size = os.path.getsize(path)

        def ours() -> harness.Measured:
            work = {
                "ingest": lambda: take(path, folder / "out"),
                "its reading alone": lambda: read(path),
                "a script, row by row": lambda: script(path, folder / "script.parquet"),
            }
            return {
                label: dict(zip(("seconds", "rows"), cpu_seconds(each), strict=True)) for label, each in work.items()
            }

        no_peers: harness.Measured = {}
        mine, peers = harness.around(ours, lambda: no_peers if options.no_peers else harness.peers("ingest", path))
        print(f"{options.rows:,} rows, {size / 1e6:,.0f} MB of JSONL.\n")
        rows = []
        for label, one in (mine | peers).items():
            one.setdefault("num", size)
            rows.append((label, harness.speed(one, "MB"), harness.faster(mine["ingest"], one)))
        harness.table(("", "", "ingest is as fast"), rows)
        print(f"Peak of memory: {peak(path):,.0f} MB, and {peak(quarter):,.0f} MB for a quarter of the rows.")


if __name__ == "__main__":
    sys.exit(main())
