"""How far an accuracy can be trusted, and what several answers to each question say beyond it.

Input: for each question, how many answers there are and which are right. Output: plain numbers. Invariants: an error is
over questions unless its name says otherwise; what the answers cannot tell is NaN, never 0 or 1.

A model answers n questions, k times each. x_ij is 1 if answer j to question i is right, else 0; m_i is the mean of x_ij
over j. Two errors are told apart. The standard error over questions asks: would other questions of this kind give the
same accuracy? The error of re-sampling asks: would new answers to the same questions?

Sources: arXiv 2411.00640 (error over questions, paired comparison), arXiv 2107.03374 (pass@k), Wilson 1927 (interval).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Vote = str | Literal[True] | None
"""What an answer stands for in a vote: True if it is right, else a text that is the same for the same answer; None if
it states none."""

_DRAWS = 200  # random subsets over which maj@k is averaged


# --- one accuracy -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Accuracy of one model on one set of questions.

    Attributes:
        questions: What identifies each question: its uid, and more where that is not enough; `[num_questions]`.
        samples: Number of answers to each, at least 1; int64 `[num_questions]`.
        right: Number of right answers to each; int64 `[num_questions]`.
        undecided: Number of answers to each that could not be compared with the reference (unparseable, unknown). They
            count as not right; int64 `[num_questions]`.
        votes: What each answer stands for in a vote; `[num_questions][samples]`, or empty if that is not needed.
        verdicts: Number of answers with each verdict, without those that were cut off.
        truncated: Number of answers that were cut off at the length limit.
        tokens: Tokens of all answers together.
    """

    questions: Sequence[tuple[str, ...]]
    samples: Integers
    right: Integers
    undecided: Integers
    votes: Sequence[Sequence[Vote]] = ()
    verdicts: Mapping[str, int] = field(default_factory=dict)
    truncated: int = 0
    tokens: int = 0

    @property
    def num_questions(self) -> int:
        """Number of questions, n."""
        return len(self.questions)

    @property
    def num_answers(self) -> int:
        """All answers to all questions."""
        return int(self.samples.sum())

    @property
    def k(self) -> int:
        """Number of answers to each question; the smallest, if questions differ."""
        return int(self.samples.min())

    @cached_property
    def by_question(self) -> Floats:
        """Share of right answers to each question, m_i; float64 `[num_questions]`."""
        return self.right / self.samples

    @property
    def mean(self) -> float:
        """avg@k, 0 to 1: the mean of all x_ij, which is the mean of the m_i if each question has k answers."""
        return int(self.right.sum()) / self.num_answers

    @property
    def bounds(self) -> tuple[float, float]:
        """The accuracy if every undecided answer were wrong, and if every one were right."""
        return self.mean, self.mean + int(self.undecided.sum()) / self.num_answers

    @cached_property
    def standard_error(self) -> float:
        """Standard error of the mean over questions; NaN for a single question.

        √(n/(n−1) · Σ_i (Σ_j (x_ij − mean))²) / N for N answers in all: answers to one question are a cluster. With k
        answers to each question it is sd(m_i)/√n, where sd divides by n − 1.
        """
        n = self.num_questions
        if n < 2:
            return math.nan
        residuals = self.right - self.samples * self.mean
        return math.sqrt(n / (n - 1) * float(residuals @ residuals)) / self.num_answers

    @property
    def resampling_error(self) -> float:
        """Standard error of the mean over new answers to the same questions; NaN if a question has a single answer.

        √(Σ_i k_i² m_i (1 − m_i) / (k_i − 1)) / N, which is unbiased for the variance. It is the smaller of the two
        errors, and what it says about other questions is nothing.
        """
        if self.k < 2:
            return math.nan
        spread = self.by_question * (1 - self.by_question) / (self.samples - 1)
        return math.sqrt(float(self.samples**2 @ spread)) / self.num_answers

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the mean over questions; NaN for a single question.

        Wilson's interval on the number of independent answers that has the same standard error,
        mean (1 − mean) / standard_error², with Student's t of n − 1. It stays within 0 and 1 and is lopsided near
        them, where mean ± t · standard_error leaves out the truth too often (docs/statistics.md). If each question is
        answered always or never, that number is n, and the quantile is the normal one.
        """
        if self.num_questions < 2:
            return math.nan, math.nan
        mean, number = self.mean, self.num_answers**2 / float(self.samples @ self.samples)
        quantile = NormalDist().inv_cdf((1 + level) / 2)
        if np.any((self.right > 0) & (self.right < self.samples)):
            error, quantile = self.standard_error, t_quantile(level, self.num_questions - 1)
            number = float(self.num_answers)
            if mean * (1 - mean) < number * error**2:
                number = mean * (1 - mean) / error**2
        squared = quantile**2 / number
        middle = (mean + squared / 2) / (1 + squared)
        half = math.sqrt(squared * mean * (1 - mean) + squared**2 / 4) / (1 + squared)
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def pass_at(self, k: int) -> float:
        """pass@k: the probability that at least one of k answers is right, over questions; see `pass_at_k`."""
        return float(pass_at_k(self.samples, self.right, k).mean())

    def pass_all(self, k: int) -> float:
        """pass^k: the probability that all of k answers are right, over questions; see `pass_all_k`."""
        return float(pass_all_k(self.samples, self.right, k).mean())

    def majority_at(self, k: int, seed: int = 0) -> float:
        """maj@k: the probability that the most frequent of k answers is right, over questions; see `majority_at_k`."""
        return float(majority_at_k(self.votes, k, seed=seed).mean()) if self.votes else math.nan


def standard_error(by_question: Floats) -> float:
    """Return the standard error of a mean over questions: sd/√n with n − 1, or NaN for fewer than two.

    Args:
        by_question: Share of right answers to each question, or the difference of two; float64 `[num_questions]`.

    Source: arXiv 2411.00640, equation 1.
    """
    number = len(by_question)
    return float(by_question.std(ddof=1) / math.sqrt(number)) if number > 1 else math.nan


# --- several answers to a question ------------------------------------------------------------------


def pass_at_k(samples: Integers, right: Integers, k: int) -> Floats:
    """Return the probability that at least one of k answers to a question is right.

    1 − C(n−c, k) / C(n, k) for c right ones of n answers, as a product, which neither overflows nor cancels.

    Args:
        samples: Number of answers to each question, n; int64 `[num_questions]`.
        right: Number of right ones among them, c; int64 `[num_questions]`.
        k: Number of answers that count, at least 1.

    Returns:
        float64 `[num_questions]`; NaN where a question has fewer than k answers.

    Source: arXiv 2107.03374, section 2.1.
    """
    return 1 - pass_all_k(samples, samples - right, k)


def pass_all_k(samples: Integers, right: Integers, k: int) -> Floats:
    """Return the probability that all of k answers to a question are right: C(c, k) / C(n, k), as a product.

    Arguments and result are those of `pass_at_k`.
    """
    drawn = np.arange(k)
    factors = np.maximum(right[:, None] - drawn, 0) / np.maximum(samples[:, None] - drawn, 1)
    return np.where(samples >= k, factors.prod(axis=1), np.nan)


def majority_at_k(votes: Sequence[Sequence[Vote]], k: int, *, draws: int = _DRAWS, seed: int = 0) -> Floats:
    """Return the probability that the most frequent of k answers to a question is right.

    The mean over random subsets of k answers. All right answers are one candidate, those that state nothing abstain,
    and candidates with equally many votes share the credit.

    Args:
        votes: What each answer stands for; `[num_questions][samples]`.
        k: Number of answers that vote, at least 1.
        draws: Number of subsets; if k is the number of answers, there is one.
        seed: Seed of the subsets.

    Returns:
        float64 `[num_questions]`; NaN where a question has fewer than k answers.
    """
    generator = np.random.default_rng(seed)
    credits = np.full(len(votes), np.nan)
    for i, own in enumerate(votes):
        if len(own) < k:
            continue
        counted = Counter(own)
        rivals = [number for vote, number in counted.items() if vote is not True and vote is not None]
        candidates = np.array([counted[True], *rivals, counted[None]])
        subsets = generator.multivariate_hypergeometric(candidates, k, size=draws if k < len(own) else 1)[:, :-1]
        most = subsets.max(axis=1)
        wins = (subsets[:, 0] == most) & (most > 0)
        credits[i] = np.mean(wins / (subsets == most[:, None]).sum(axis=1))
    return credits


# --- two accuracies ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How much more accurate a second evaluation is than a first, on the questions that both have.

    Attributes:
        difference: Mean of d_i = m_i of the second − m_i of the first, −1 to 1; NaN without a shared question.
        standard_error: Of the difference, over questions: sd(d_i)/√n. Which questions are hard is the same for both
            and cancels, so it is smaller than the error of two accuracies taken apart.
        wins: Questions on which the second has the larger share of right answers.
        ties: Questions on which both have the same.
        losses: The others.
        only_first: Questions that only the first evaluation has; they do not count.
        only_second: Questions that only the second has.
    """

    difference: float
    standard_error: float
    wins: int
    ties: int
    losses: int
    only_first: int
    only_second: int

    @property
    def shared(self) -> int:
        """Questions that both evaluations have."""
        return self.wins + self.ties + self.losses

    @property
    def in_errors(self) -> float | None:
        """The difference in standard errors; None if the error is unknown or zero."""
        return self.difference / self.standard_error if self.standard_error > 0 else None

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the difference: ± Student's t of n − 1 · standard error.

        NaN if all d_i are equal: how rarely they would differ cannot be told from them.
        """
        if not self.standard_error > 0:
            return math.nan, math.nan
        half = t_quantile(level, self.shared - 1) * self.standard_error
        return max(self.difference - half, -1.0), min(self.difference + half, 1.0)


def compare_accuracies(first: Accuracy, second: Accuracy) -> Comparison:
    """Compare two accuracies question by question.

    Source: arXiv 2411.00640, section 4.
    """
    place = {question: i for i, question in enumerate(first.questions)}
    pairs = [(place[question], j) for j, question in enumerate(second.questions) if question in place]
    own, other = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    differences = second.by_question[other] - first.by_question[own]
    # Exact, where a difference of two shares may not be zero.
    sides = np.sign(second.right[other] * first.samples[own] - first.right[own] * second.samples[other])
    return Comparison(
        difference=float(differences.mean()) if pairs else math.nan,
        standard_error=standard_error(differences),
        wins=int((sides > 0).sum()),
        ties=int((sides == 0).sum()),
        losses=int((sides < 0).sum()),
        only_first=first.num_questions - len(pairs),
        only_second=second.num_questions - len(pairs),
    )


# --- Student's t ------------------------------------------------------------------------------------


@lru_cache
def t_quantile(level: float, degrees: int) -> float:
    """Return the t that Student's distribution exceeds in size with probability 1 − level.

    Args:
        level: Probability of −t to t, above 0 and below 1.
        degrees: Degrees of freedom, at least 1.
    """
    high = 1.0
    while _within(high, degrees) < level:
        high *= 2
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """Return the probability of −t to t: a finite sum for whole degrees (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    odd = degrees % 2
    above = np.arange(1 + odd, degrees - 1, 2, dtype=np.float64)  # 1, 3 … for even degrees, 2, 4 … for odd ones
    series = 1 + float(np.cumprod(above / (above + 1) * math.cos(angle) ** 2).sum())
    if not odd:
        return math.sin(angle) * series
    tail = math.sin(angle) * math.cos(angle) * series if degrees > 1 else 0.0
    return 2 / math.pi * (angle + tail)
