"""How often a 95 % interval holds the accuracy over all questions of a kind: 30 questions drawn anew each time.

Goal: 95 % ± 1 at k = 1, 4 and 64 answers to each question. Beside ours stand mean ± t · standard error, the same with
the normal quantile, and Wilson's interval over all answers as if they were independent. `--runs 2000` is quicker.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dasd_lite.grading.statistics import Accuracy, compare_accuracies, t_quantile

Floats = npt.NDArray[np.float64]
Interval = Callable[[Accuracy], tuple[float, float]]
NUM_QUESTIONS = 30
DIFFICULTIES = {  # of the distribution from which each question's chance of a right answer is drawn
    "like AIME, mean 0.76": (1.3, 0.42),
    "easy or hard, 0.50": (0.5, 0.5),
    "any, 0.50": (1.0, 1.0),
    "medium, 0.50": (4.0, 4.0),
    "rather hard, 0.25": (2.0, 6.0),
    "mostly hard, 0.20": (0.3, 1.2),
    "nearly all hard, 0.10": (0.3, 2.7),
    "nearly all easy, 0.90": (0.9, 0.1),
}


def by_quantile(quantile: float) -> Interval:
    """Return mean ± quantile · standard error."""
    return lambda own: (own.mean - quantile * own.standard_error, own.mean + quantile * own.standard_error)


def as_if_independent(own: Accuracy) -> tuple[float, float]:
    """Return Wilson's interval over all answers."""
    squared = 1.959964**2 / own.num_answers
    middle = (own.mean + squared / 2) / (1 + squared)
    half = math.sqrt(squared * own.mean * (1 - own.mean) + squared**2 / 4) / (1 + squared)
    return middle - half, middle + half


INTERVALS: dict[str, Interval] = {
    "ours": Accuracy.interval,
    "± t · error": by_quantile(t_quantile(0.95, NUM_QUESTIONS - 1)),
    "± 1.96 · error": by_quantile(1.959964),
    "answers independent": as_if_independent,
}


def evaluated(chances: Floats, k: int, rng: np.random.Generator) -> Accuracy:
    """Return the accuracy on questions that are answered rightly with these chances."""
    right = rng.binomial(k, chances)
    none = np.zeros_like(right)
    return Accuracy([(str(i),) for i in range(len(right))], none + k, right, none)


def main() -> None:
    """Print how often each interval holds the truth, and ours of a paired difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40_000)
    runs = parser.parse_args().runs
    print(f"| chance of a right answer | k | {' | '.join(INTERVALS)} | paired difference |")
    print(f"|---|---:|{'---:|' * (len(INTERVALS) + 1)}")
    for name, (a, b) in DIFFICULTIES.items():
        truth, easier = a / (a + b), math.exp(sum(math.lgamma(x) for x in (a + 0.7, a + b)))
        easier /= math.exp(sum(math.lgamma(x) for x in (a, a + b + 0.7)))  # the mean of p^0.7
        for k in (1, 4, 64):
            rng = np.random.default_rng(k)
            held, paired = dict.fromkeys(INTERVALS, 0), 0
            for _ in range(runs):
                chances = rng.beta(a, b, NUM_QUESTIONS)
                first, second = evaluated(chances, k, rng), evaluated(chances**0.7, k, rng)
                for kind, interval in INTERVALS.items():
                    low, high = interval(first)
                    held[kind] += low <= truth <= high
                low, high = compare_accuracies(first, second).interval()
                paired += low <= easier - truth <= high
            shares = " | ".join(f"{number / runs:.1%}" for number in (*held.values(), paired))
            print(f"| {name} | {k} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
