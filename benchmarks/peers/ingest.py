"""Other ways to read a file of questions and answers.

    python benchmarks/peers/ingest.py FILE.jsonl

`load_dataset` reads the file into Arrow and writes that to its cache, which is new in each round.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

from timing import measure

PATH = sys.argv[1]


def main() -> None:
    """Measure datasets."""
    measure({"datasets.load_dataset": load_dataset})


def load_dataset() -> dict[str, Any]:
    """Read the file with datasets."""
    import datasets

    def read() -> int:
        with tempfile.TemporaryDirectory() as cache:
            return int(datasets.load_dataset("json", data_files=PATH, split="train", cache_dir=cache).num_rows)

    rows, seconds = read(), []
    for _ in range(3):
        start = time.process_time()
        read()
        seconds.append(time.process_time() - start)
    return {"seconds": min(seconds), "num": os.path.getsize(PATH), "rows": rows}


if __name__ == "__main__":
    main()
