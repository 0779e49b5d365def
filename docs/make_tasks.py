"""Write the table of benchmarks into docs/benchmarks.md, and with --hub fill in what only the hub knows.

    python docs/make_tasks.py [--hub] [--check] [NAME ...]

The table is between two comments and is made from `data/tasks/tasks.toml`; the rest of the page is not touched. `--hub`
loads each benchmark (or those that are named) from the hub first, at its commit or, where the table has none, the
newest, and writes commit and checksum of the rows into tasks.toml; one that cannot be had is named and stays as it is.
`--check` writes nothing and fails if anything would be written; a test runs it without --hub.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from dasd_lite.data.tasks.load import load_task
from dasd_lite.data.tasks.table import FILE, Benchmark, read_table
from dasd_lite.errors import DataError

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
PAGE = Path(__file__).parent / "benchmarks.md"


def main() -> None:
    """Write table and page, or compare them with what would be written."""
    check, names = "--check" in sys.argv, [each for each in sys.argv[1:] if not each.startswith("--")]
    written = FILE.read_text(encoding="utf-8")
    toml = from_hub(written, names) if "--hub" in sys.argv else written
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page = f"{before}{BEGIN}\n{table(read_table(toml))}{END}{rest.split(END)[1]}"
    for path, old, new in ((FILE, written, toml), (PAGE, text, page)):
        if new != old and check:
            sys.exit(f"{path} is not up to date; run: python docs/make_tasks.py")
        if new != old:
            path.write_text(new, encoding="utf-8")


def from_hub(toml: str, names: Iterable[str] = ()) -> str:
    """Return the text of tasks.toml with commits and checksums filled in, as the hub has them."""
    benchmarks = read_table(toml)
    for name in names or benchmarks:
        # Neither the pinned checksum nor a folder may stand in for what the hub has.
        asked = {name: replace(benchmarks[name], checksum="")}
        try:
            task = load_task(name, folder=FILE.parent, table=asked)
        except DataError as error:
            print(error, file=sys.stderr)
            continue
        for key, value in (("revision", task.revision), ("checksum", task.checksum)):
            toml = re.sub(rf'(?ms)(^\[{re.escape(name)}\]$.*?^{key} = )"[^"]*"', rf'\g<1>"{value}"', toml, count=1)
    return toml


def table(benchmarks: Mapping[str, Benchmark]) -> str:
    """Return the table of the page."""
    head = (
        "name",
        "benchmark",
        "questions",
        "graded as",
        "file on the hub",
        "commit",
        "checksum",
        "tokens",
        "k",
        "license",
    )
    lines = [head, ("---",) * len(head), *(_cells(each) for each in benchmarks.values())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(benchmark: Benchmark) -> tuple[str, ...]:
    return (
        f"`{benchmark.name}`",
        benchmark.title + (", gated" if benchmark.gated else ""),
        f"{benchmark.rows:,}",
        benchmark.kind,
        f"`{benchmark.repo}` `{benchmark.file}`",
        f"`{benchmark.revision[:7]}`" if benchmark.revision else "newest",
        f"`{benchmark.checksum[:7]}`" if benchmark.checksum else "–",
        f"{benchmark.max_tokens:,}",
        str(benchmark.num_samples),
        benchmark.license,
    )


if __name__ == "__main__":
    main()
