"""The rules of selection: a score per candidate, and the rank of it among the candidates of one prompt.

Input: numbers per candidate. Output: scores, higher is better, or a mask of those kept. Invariant:
`rank_within_prompts` keeps the best of each prompt, so no score is ever compared with a threshold.
"""

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dasd_lite.errors import DataError

Rule: TypeAlias = Literal["count", "ratio", "length_matched", "random"]
Scores: TypeAlias = NDArray[np.float64]


def select_count(teacher_counts: ArrayLike) -> Scores:
    """Score: the number of Teacher sentences. It prefers long responses.

    Args:
        teacher_counts: Teacher sentences of each candidate; `[num_candidates]`.

    Returns:
        Scores, higher is better; float64 `[num_candidates]`.

    Raises:
        DataError: A value is negative or no number; names its index.

    Source: companion paper of the DASD report (arXiv 2512.20908): of one question's candidates the one with the largest
    absolute count.
    """
    return _numbers("teacher_counts", teacher_counts)


def select_ratio(teacher_counts: ArrayLike, num_sentences: ArrayLike) -> Scores:
    """Score: the share of sentences that are Teacher sentences. It prefers short responses, whose share varies most.

    Args:
        teacher_counts: Teacher sentences of each candidate; `[num_candidates]`.
        num_sentences: All sentences of each candidate; one without any scores 0; `[num_candidates]`.

    Returns:
        Scores, higher is better; float64 `[num_candidates]`.

    Raises:
        DataError: The columns are not equally long, or a value is negative or no number.
    """
    counts, sentences = _equally_many(teacher_counts=teacher_counts, num_sentences=num_sentences)
    return np.asarray(counts / np.maximum(sentences, 1.0))


def select_length_matched(
    teacher_counts: ArrayLike, num_tokens: ArrayLike, prompt_index: ArrayLike | None = None
) -> Scores:
    """Score: Teacher sentences beyond what a response of this length has, so that length alone earns nothing.

    It is the residual of a straight line of count on length. The slope is that *within* prompts (both columns less
    their mean over the prompt's candidates, all prompts pooled: the fixed-effects estimator), because ranks are taken
    within prompts: a line through all candidates would also see that hard questions have long answers and many, or few,
    Teacher sentences. Over all candidates the score is uncorrelated with length within prompts. It is in sentences:
    +5 means five more than expected.

    Args:
        teacher_counts: Teacher sentences of each candidate; `[num_candidates]`.
        num_tokens: Length of each candidate, in tokens; `[num_candidates]`.
        prompt_index: Which prompt each candidate answers; `[num_candidates]`. None: all the same one.

    Returns:
        Scores, higher is better, 0 on the mean of each prompt; float64 `[num_candidates]`. If no prompt has candidates
        of different length the slope is 0.

    Raises:
        DataError: The columns are not equally long, or a value is negative or no number.
    """
    counts, tokens = _equally_many(teacher_counts=teacher_counts, num_tokens=num_tokens)
    if len(counts) == 0:
        return counts
    prompts = _prompts(len(counts), np.zeros(len(counts), np.int64) if prompt_index is None else prompt_index)
    sizes = np.bincount(prompts)
    counts, tokens = (values - (np.bincount(prompts, values) / sizes)[prompts] for values in (counts, tokens))
    spread = float(tokens @ tokens)
    slope = float(tokens @ counts) / spread if spread > 0 else 0.0
    return np.asarray(counts - slope * tokens)


def select_random(num_candidates: int, seed: int) -> Scores:
    """Score: a random number from 0 to 1, the baseline.

    Args:
        num_candidates: Number of candidates.
        seed: At least 0. Candidate i has the same score for every number of candidates above i.

    Returns:
        Scores; float64 `[num_candidates]`.

    Raises:
        ValueError: A negative number.
    """
    return np.random.Generator(np.random.Philox(seed)).random(num_candidates)


def score_candidates(
    rule: Rule,
    *,
    teacher_counts: ArrayLike,
    num_sentences: ArrayLike,
    num_tokens: ArrayLike,
    prompt_index: ArrayLike,
    seed: int,
) -> Scores:
    """The score of each candidate by the rule of this name: one signature for all rules.

    Args:
        rule: `count`, `ratio`, `length_matched` or `random`; see the function `select_…` of each.
        teacher_counts: Teacher sentences of each candidate; `[num_candidates]`.
        num_sentences: All sentences of each candidate; `[num_candidates]`.
        num_tokens: Length of each candidate, in tokens; `[num_candidates]`.
        prompt_index: Which prompt each candidate answers; `[num_candidates]`.
        seed: Of `random`; at least 0.

    Returns:
        Scores, higher is better; float64 `[num_candidates]`.

    Raises:
        DataError: As the rule.
        ValueError: There is no such rule.
    """
    match rule:
        case "count":
            return select_count(teacher_counts)
        case "ratio":
            return select_ratio(teacher_counts, num_sentences)
        case "length_matched":
            return select_length_matched(teacher_counts, num_tokens, prompt_index)
        case "random":
            return select_random(np.size(teacher_counts), seed)
        case _:
            raise ValueError(f"rule is {rule!r}; it must be one of count, ratio, length_matched, random")


def rank_within_prompts(score: ArrayLike, prompt_index: ArrayLike, keep: int) -> NDArray[np.bool_]:
    """Marks the best candidates of each prompt; of equal scores the earlier candidate is the better one.

    Args:
        score: Higher is better; `[num_candidates]`.
        prompt_index: Which prompt each candidate answers; candidates of one prompt need not stand together; integers
            `[num_candidates]`.
        keep: How many per prompt, at least 0; all if it has fewer.

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
    prompts = _prompts(len(scores), prompt_index)
    order = np.lexsort((-scores, prompts))  # stable: equal scores stay in order
    starts = np.searchsorted(prompts[order], prompts[order])
    kept = np.zeros(len(scores), np.bool_)
    kept[order] = np.arange(len(scores)) - starts < keep
    return kept


def _numbers(name: str, values: ArrayLike) -> Scores:
    array = np.array(values, np.float64)
    if array.ndim != 1:
        raise DataError(f"{name} has shape {list(array.shape)}; it must be one-dimensional")
    bad = np.flatnonzero(~(array >= 0))  # NaN is bad as well
    if len(bad):
        raise DataError(f"{name}[{bad[0]}] is {array[bad[0]]}; it must be at least 0")
    return array


def _equally_many(**columns: ArrayLike) -> tuple[Scores, Scores]:
    (left, a), (right, b) = ((name, _numbers(name, values)) for name, values in columns.items())
    if len(a) != len(b):
        raise DataError(f"{left} has {len(a)} elements and {right} {len(b)}; they must be equally many")
    return a, b


def _prompts(num_candidates: int, prompt_index: ArrayLike) -> NDArray[np.intp]:
    """Prompts numbered from 0, whatever they are called."""
    prompts = np.asarray(prompt_index)
    if prompts.shape != (num_candidates,):
        raise DataError(f"prompt_index has shape {list(prompts.shape)}; there are {num_candidates} candidates")
    return np.unique(prompts, return_inverse=True)[1]
