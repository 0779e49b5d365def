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
        mean_logprob: Mean log-probability by the teacher, float64, NaN if unknown; None if the stage did not need it.

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

    def __post_init__(self) -> None:
        """Check the arrays."""
        for field in fields(self):
            values = getattr(self, field.name)
            if field.name == "seed" or values is None:
                continue
            if np.shape(values) != (len(self),):
                raise DataError(f"{field.name} has shape {list(np.shape(values))}; there are {len(self)} candidates")
            if field.name != "mean_logprob" and len(bad := np.flatnonzero(~(np.asarray(values) >= 0))):
                raise DataError(f"{field.name}[{bad[0]}] is {values[bad[0]]}; it must be at least 0")

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.teacher_counts)


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
    """Score: the share of Teacher sentences; 0 without sentences. Prefers short answers, whose share varies most."""
    return np.asarray(candidates.teacher_counts / np.maximum(candidates.num_sentences, 1.0))


def length_matched(candidates: Candidates) -> NDArray[np.float64]:
    """Score: Teacher sentences beyond the number expected for an answer of this length, so length alone earns nothing.

    It is the residual of a linear regression of count on length. The slope is estimated within prompts (both columns
    minus their mean over the prompt's candidates, all prompts pooled: the fixed-effects estimator), because candidates
    are ranked within prompts: a line through all candidates would also reflect that hard questions have long answers
    and many, or few, Teacher sentences. Within prompts the score is uncorrelated with length. Its unit is sentences:
    +5 means five more than expected. If no prompt has candidates of different lengths, the slope is 0.
    """
    if not len(candidates):
        return np.zeros(0)
    prompts = check_groups("prompt_index", candidates.prompt_index, len(candidates))
    sizes = np.bincount(prompts)
    counts, tokens = (
        values - (np.bincount(prompts, values) / sizes)[prompts]
        for values in (candidates.teacher_counts, candidates.num_tokens)
    )
    spread = float(tokens @ tokens)
    slope = float(tokens @ counts) / spread if spread > 0 else 0.0
    return np.asarray(counts - slope * tokens)


def random(candidates: Candidates) -> NDArray[np.float64]:
    """Score: a random number from 0 to 1, the baseline; that of candidate i depends only on i and the seed."""
    return np.random.Generator(np.random.Philox(candidates.seed)).random(len(candidates))


RULES: dict[str, SelectionRule] = {"count": count, "ratio": ratio, "length_matched": length_matched, "random": random}
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
