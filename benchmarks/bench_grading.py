"""The grader for mathematics on the golden pairs, beside graders that can be installed: errors, and milliseconds.

    python benchmarks/bench_grading.py

Installs each peer into an environment of its own (`.venv-answers-*`) on the first run: lm-eval needs another version of
antlr than math-verify and TRL. Every pair is graded once, in order, without a cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from harness import HERE, machine, table

GOLDEN = HERE.parent / "tests" / "golden"
MATH_VERIFY = "math-verify==0.9.0"
# Grader -> (packages with what they need, packages alone). Their graders import nothing else.
PEERS = {
    "math-verify": ([MATH_VERIFY, "antlr4-python3-runtime==4.13.2"], []),
    "trl": ([MATH_VERIFY, "antlr4-python3-runtime==4.13.2", "packaging", "transformers==5.19.0"], ["trl==1.16.0"]),
    "lm-eval": ([MATH_VERIFY, "antlr4-python3-runtime==4.11.0"], ["lm-eval==0.4.13"]),
}


def main() -> None:
    """Print the table of errors and times."""
    pairs = [
        line for name in ("answers", "answers_heldout") for line in (GOLDEN / f"{name}.jsonl").open(encoding="utf-8")
    ]
    rows = [json.loads(line) for line in pairs]
    results = {"ours": ours(rows), "ours, without math-verify": ours(rows, extra=False)}
    for grader, (packages, alone) in PEERS.items():
        python = environment(grader, packages, alone)
        done = subprocess.run(
            [python, "-E", HERE / "peers" / "answers.py", grader],
            input="".join(pairs),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results |= json.loads(done.stdout)
    print(machine(), end="\n\n")
    print(f"{len(rows)} pairs, {sum(row['right'] for row in rows)} of them right.\n")
    in_box = [row["completion"].startswith(r"\boxed{") and "\n" not in row["completion"] for row in rows]
    table(
        ["", "false right in a box", "false wrong in a box", "false right elsewhere", "false wrong elsewhere"],
        (
            [name, *errors(rows, one["right"], in_box), *errors(rows, one["right"], [not each for each in in_box])]
            for name, one in results.items()
        ),
    )
    table(
        ["ms per grade", "median", "p99", "median of integers", "p99 of integers"],
        ([name, *times(rows, one["ms"])] for name, one in results.items()),
    )
    for name in list(results)[:2]:
        verdicts = Counter(zip([row["right"] for row in rows], results[name]["verdicts"], strict=True))
        print(f"{name}: of the right ones {listed(verdicts, True)}; of the others {listed(verdicts, False)}")


def listed(verdicts: Counter[tuple[bool, str]], is_right: bool) -> str:
    """Format the numbers of verdicts."""
    return ", ".join(f"{number} {verdict}" for (right, verdict), number in verdicts.most_common() if right is is_right)


def ours(rows: list[dict[str, Any]], *, extra: bool = True) -> dict[str, Any]:
    """Grade every pair with ours."""
    from time import perf_counter

    from dasd_lite.grading import math

    if extra and not math.is_available():
        sys.exit("math-verify is not installed; run: pip install 'dasd-lite[eval]'")
    available = math.is_available
    math.is_available = lambda: extra  # type: ignore[assignment]
    math.grade(r"\boxed{(x+1)^2}", "x^2+2x+1")  # starts the worker
    verdicts, ms = [], []
    for row in rows:
        math._cache.clear()
        start = perf_counter()
        verdicts.append(math.grade(row["completion"], row["reference"]).verdict)
        ms.append((perf_counter() - start) * 1e3)
    math.is_available = available
    return {"right": [verdict == "right" for verdict in verdicts], "ms": ms, "verdicts": verdicts}


def errors(rows: list[dict[str, Any]], said: list[bool], chosen: list[bool]) -> Iterable[str]:
    """Format both kinds of errors among the chosen pairs."""
    pairs = [(row["right"], right) for row, right, is_one in zip(rows, said, chosen, strict=True) if is_one]
    for is_right in (False, True):
        judged = [right for expected, right in pairs if expected is is_right]
        yield f"{sum(right is not is_right for right in judged)} of {len(judged)}"


def times(rows: list[dict[str, Any]], ms: list[float]) -> Iterable[str]:
    """Format median and 99th percentile of all pairs, and of those whose reference is an integer."""
    integers = [each for row, each in zip(rows, ms, strict=True) if row["reference"].lstrip("-").isdigit()]
    for values in (ms, integers):
        yield f"{median(values):.3f}"
        yield f"{quantiles(values, n=100)[98]:.3f}"


def environment(name: str, packages: list[str], alone: list[str]) -> Path:
    """Return the interpreter that has a peer; installs it on the first call."""
    folder = HERE / f".venv-answers-{name}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        uv = HERE.parent / ".venv" / "bin" / "uv"
        uv = uv if uv.exists() else Path(sys.executable).with_name("uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *packages], check=True)
        if alone:
            subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "--no-deps", *alone], check=True)
        ready.touch()
    return python


if __name__ == "__main__":
    main()
