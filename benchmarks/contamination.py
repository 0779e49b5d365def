"""Time to look for evaluation questions in training prompts: words that follow each other as in a language.

Goal: 100,000 prompts of 500 words against 1,000 questions in about a minute, and the time grows with the words.
`python benchmarks/contamination.py` prints a table; `--prompts 10000` is quicker.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Iterator

from dasd_lite.grading.contamination import overlaps

VOCABULARY = [f"word{i}" for i in range(30_000)]
WEIGHTS = [1 / (i + 3) for i in range(len(VOCABULARY))]  # as in a language: the commonest is a tenth of a text


def texts(number: int, length: int, seed: int) -> Iterator[str]:
    """Yield texts of so many words."""
    draw = random.Random(seed)
    stock = draw.choices(VOCABULARY, WEIGHTS, k=400_000)  # drawing each word anew would take longer than the search
    for _ in range(number):
        at = draw.randrange(len(stock) - length)
        text = stock[at : at + length]
        for _ in range(length // 8):
            text[draw.randrange(length)] = draw.choice(VOCABULARY)
        yield " ".join(text)


def main() -> None:
    """Print the seconds for three sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100_000)
    largest = parser.parse_args().prompts
    questions = list(texts(1000, 60, seed=1))
    print("| prompts of 500 words | words | processor seconds | million words/s | listed |")
    print("|---:|---:|---:|---:|---:|")
    for number in (largest // 100, largest // 10, largest):
        prompts = list(texts(number, 500, seed=2)) + questions[:10]
        start = time.process_time()
        found = overlaps(questions, prompts)
        seconds = time.process_time() - start
        assert sum(own.exact for own in found) >= 10
        words = 500 * number
        print(f"| {number:,} | {words:,} | {seconds:.2f} | {words / seconds / 1e6:.1f} | {len(found):,} |", flush=True)
    print(f"peak of memory, the texts included: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
