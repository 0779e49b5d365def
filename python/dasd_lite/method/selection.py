"""Selection rules: a score for each candidate, and its rank among the candidates of its prompt.

Input: numbers about each candidate. Output: scores, higher is better, or a mask of those kept. Invariant:
`rank_within_prompts` keeps the best of each prompt, so no score is ever compared with a threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dasd_lite.errors import DataError
from dasd_lite.method.ragged import check_groups

_FROM_SCORES = ("mean_logprob", "student_mean_logprob", "rank_sum", "surprisal_sum")
_LEAST_SURPRISAL = 1e-6  # nats; an answer without any is the worst, not an infinite score


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a selection rule knows about the answers that passed the filters; all arrays are `[num_candidates]`.

    Attributes:
        teacher_counts: Teacher sentences of each candidate, int64; 0 without scores.
        shared_counts: Shared sentences.
        student_counts: Student sentences.
        num_sentences: All sentences, including those without a class.
        num_tokens: Length in the student's tokens, int64.
        prompt_index: The prompt that it answers, int64; numbered from 0.
        seed: Seed for rules that draw random numbers.
        mean_logprob: Mean log-probability by the teacher, float64, NaN if unknown; None if there are neither scores nor
            weights.
        student_mean_logprob: The same by the student before training; None without scores.
        rank_sum: Σ min(rank, 100) over answer and end token by the student, float64, NaN if its engine has no ranks;
            None without scores. A rank is 1 + the number of tokens that are likelier.
        surprisal_sum: Σ −log p of the same tokens by the student, float64; None without scores.

    Raises:
        DataError: The arrays are not equally long, or a count is negative or not a number; names array and index.
    """

    teacher_counts: NDArray[np.int64]
    shared_counts: NDArray[np.int64]
    student_counts: NDArray[np.int64]
    num_sentences: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    prompt_index: NDArray[np.int64]
    seed: int = 0
    mean_logprob: NDArray[np.float64] | None = None
    student_mean_logprob: NDArray[np.float64] | None = None
    rank_sum: NDArray[np.float64] | None = None
    surprisal_sum: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        """Check the arrays."""
        for field in fields(self):
            values = getattr(self, field.name)
            if field.name == "seed" or values is None:
                continue
            if np.shape(values) != (len(self),):
                raise DataError(f"{field.name} has shape {list(np.shape(values))}; there are {len(self)} candidates")
            if field.name not in _FROM_SCORES and len(bad := np.flatnonzero(~(np.asarray(values) >= 0))):
                raise DataError(f"{field.name}[{bad[0]}] is {values[bad[0]]}; it must be at least 0")

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.teacher_counts)

    def known(self, name: str) -> NDArray[np.float64]:
        """Return an optional column; raises DataError naming the first candidate that has no value."""
        values: NDArray[np.float64] | None = getattr(self, name)
        if values is None:
            raise DataError(f"the rule needs {name}, which is not known without scores; run score first")
        if len(unknown := np.flatnonzero(~np.isfinite(values))):
            why = "; only transformers has ranks (score.engine)" if name == "rank_sum" else ""
            raise DataError(f"the rule needs {name}, but candidate {unknown[0]} of {len(values)} has none{why}")
        return values


class SelectionRule(Protocol):
    """Scores candidates; called by position.

    The best-scored of each prompt are kept; of equal scores the earlier is better.
    """

    def __call__(self, candidates: Candidates, /) -> ArrayLike:
        """Return one finite number for each candidate, higher is better."""
        ...


def count(candidates: Candidates) -> NDArray[np.float64]:
    """Score: the number of Teacher sentences. Prefers long answers.

    Source: companion paper of the DASD report (arXiv 2512.20908): of the candidates of one question, the one with the
    largest absolute count.
    """
    return candidates.teacher_counts.astype(np.float64)


def ratio(candidates: Candidates) -> NDArray[np.float64]:
    """Score: the share of Teacher sentences among those that have a class; 0 if none has one.

    Prefers short answers, whose share varies most.
    """
    with_class = candidates.teacher_counts + candidates.shared_counts + candidates.student_counts
    return np.asarray(candidates.teacher_counts / np.maximum(with_class, 1.0))


def length_matched(candidates: Candidates) -> NDArray[np.float64]:
    """Score: Teacher sentences beyond the number expected for an answer of this length, so length alone earns nothing.

    Expected is the rate of the prompt (its Teacher sentences ÷ its tokens, over all candidates) × the length. Counts
    vary with the square root of what is expected, so the difference is divided by it: otherwise the longest and the
    shortest candidate would be chosen more often than others by chance alone. Where the rate itself changes with length
    (an opening counts the same in a short answer), a line in the length relative to the prompt's mean is subtracted,
    one slope for all prompts, by least squares. The score is in standard deviations: +2 is rare by chance.

    Source: ours. If candidates differ by chance alone, each of a prompt is chosen equally often, whatever its length.
    """
    if not len(candidates):
        return np.zeros(0)
    prompts = check_groups("prompt_index", candidates.prompt_index, len(candidates))
    tokens, spread_of_counts = candidates.num_tokens.astype(np.float64), deviation(candidates)
    beyond = candidates.teacher_counts - spread_of_counts**2
    score = np.divide(beyond, spread_of_counts, out=np.zeros(len(tokens)), where=spread_of_counts > 0)
    means = np.maximum(np.bincount(prompts, tokens) / np.bincount(prompts), 1.0)
    line = spread_of_counts * (tokens / means[prompts] - 1)
    spread = float(line @ line)
    return np.asarray(score - (float(line @ score) / spread if spread > 0 else 0.0) * line)


def deviation(candidates: Candidates) -> NDArray[np.float64]:
    """Return the square root of the Teacher sentences that the rate of its prompt lets expect of each candidate."""
    prompts = check_groups("prompt_index", candidates.prompt_index, len(candidates))
    counts, tokens = np.bincount(prompts, candidates.teacher_counts), np.bincount(prompts, candidates.num_tokens)
    return np.asarray(np.sqrt((counts / np.maximum(tokens, 1.0))[prompts] * candidates.num_tokens))


def random(candidates: Candidates) -> NDArray[np.float64]:
    """Score: a random number from 0 to 1, the baseline; that of candidate i depends only on i and the seed."""
    return np.random.Generator(np.random.Philox(candidates.seed)).random(len(candidates))


def longest(candidates: Candidates) -> NDArray[np.float64]:
    """Score: the length. A control: a rule that does no better chooses by length."""
    return candidates.num_tokens.astype(np.float64)


def shortest(candidates: Candidates) -> NDArray[np.float64]:
    """Score: the length with its sign turned. A control."""
    return -candidates.num_tokens.astype(np.float64)


def fewest(candidates: Candidates) -> NDArray[np.float64]:
    """Score: the number of Teacher sentences with its sign turned. A control: the opposite of `count`."""
    return -candidates.teacher_counts.astype(np.float64)


def likelihood(candidates: Candidates) -> NDArray[np.float64]:
    """Score: the mean log-probability by the student before training: what fits it best already.

    Source: GRAPE (arXiv 2502.04194), with the mean over tokens, so that length alone costs nothing.
    """
    return candidates.known("student_mean_logprob")


def rsr(candidates: Candidates) -> NDArray[np.float64]:
    """Score: minus the rank-surprisal ratio, Σ min(rank, 100) ÷ Σ −log p by the student, over answer and end token.

    A low ratio: the student finds the tokens unlikely, but has them near the top of its list.

    Source: arXiv 2601.14249, where lower is better.
    """
    surprisals = np.maximum(candidates.known("surprisal_sum"), _LEAST_SURPRISAL)
    return np.asarray(-candidates.known("rank_sum") / surprisals)


RULES: dict[str, SelectionRule] = {
    "count": count,
    "ratio": ratio,
    "length_matched": length_matched,
    "rsr": rsr,
    "likelihood": likelihood,
    "longest": longest,
    "shortest": shortest,
    "fewest": fewest,
    "random": random,
}
"""The built-in rules. `all`, which keeps every candidate, ranks nothing."""


def score_candidates(rule: str | Callable[..., Any], candidates: Candidates, name: str = "") -> NDArray[np.float64]:
    """Score candidates by a built-in rule or one of the user's own.

    Args:
        rule: A name in `RULES`, or a `SelectionRule`.
        candidates: The candidates.
        name: The name of the rule in error messages; "": its own.

    Returns:
        Scores, higher is better; float64 `[num_candidates]`.

    Raises:
        DataError: The rule returned another shape, or something that is not a finite number.
        ValueError: There is no rule of this name.
    """
    if isinstance(rule, str) and rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
    name = name or (rule if isinstance(rule, str) else getattr(rule, "__qualname__", type(rule).__qualname__))
    returned = (RULES[rule] if isinstance(rule, str) else rule)(candidates)
    try:
        scores = np.asarray(returned, np.float64)
    except (TypeError, ValueError):
        raise DataError(
            f"selection rule {name} returned {type(returned).__name__}; it must be {len(candidates)} numbers"
        ) from None
    if scores.shape != (len(candidates),):
        raise DataError(
            f"selection rule {name} returned shape {list(scores.shape)}; it must be [{len(candidates)}], a score for"
            " each candidate"
        )
    if len(bad := np.flatnonzero(~np.isfinite(scores))):
        raise DataError(f"selection rule {name} gave candidate {bad[0]} the score {scores[bad[0]]}; it must be finite")
    return scores


def rank_within_prompts(score: ArrayLike, prompt_index: ArrayLike, keep: int) -> NDArray[np.bool_]:
    """Mark the best candidates of each prompt; of equal scores the earlier candidate is better.

    Args:
        score: Higher is better; `[num_candidates]`.
        prompt_index: The prompt that each candidate answers; candidates of one prompt need not be adjacent; integers
            `[num_candidates]`.
        keep: How many to keep per prompt, at least 0; all if there are fewer.

    Returns:
        True for those kept; bool `[num_candidates]`.

    Raises:
        DataError: A score is NaN, or the columns are not equally long.
        ValueError: `keep` is negative.
    """
    if keep < 0:
        raise ValueError(f"keep is {keep}; it must be at least 0")
    scores = np.asarray(score, np.float64)
    if np.isnan(scores).any():
        raise DataError(f"score[{int(np.flatnonzero(np.isnan(scores))[0])}] is NaN; it must be a number")
    prompts = check_groups("prompt_index", prompt_index, len(scores))
    order = np.lexsort((-scores, prompts))  # stable: equal scores stay in order
    starts = np.searchsorted(prompts[order], prompts[order])
    kept = np.zeros(len(scores), np.bool_)
    kept[order] = np.arange(len(scores)) - starts < keep
    return kept
