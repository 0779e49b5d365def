"""What a choice says about the rule that made it: does it follow length, does it decide anything, does noise decide?

Input: the scores of candidates, their prompts, and which were kept. Output: one number for each question, NaN where
there is nothing to measure. Invariant: candidates are compared only with those of their own prompt.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dasd_lite.method.ragged import check_groups
from dasd_lite.method.selection import Candidates, deviation

Floats = NDArray[np.float64]


def rank_correlation(score: ArrayLike, other: ArrayLike, prompt_index: ArrayLike) -> float:
    """Return Spearman's correlation of two columns within prompts, all prompts pooled.

    Values become ranks among the candidates of their prompt (equal values share the mean of theirs), less the prompt's
    mean rank; the result is the correlation of these. 1: the rule orders every prompt as `other` does.

    Args:
        score: What the rule ranks by; `[num_candidates]`.
        other: What it is compared with, such as the length; `[num_candidates]`.
        prompt_index: The prompt that each candidate answers; integers `[num_candidates]`.
    """
    values = np.asarray(score, np.float64)
    prompts = check_groups("prompt_index", prompt_index, len(values))
    one, two = (_centered_ranks(np.asarray(column, np.float64), prompts) for column in (values, other))
    size = math.sqrt(float(one @ one) * float(two @ two))
    return float(one @ two) / size if size > 0 else math.nan


def tied(score: ArrayLike, kept: NDArray[np.bool_], prompt_index: ArrayLike) -> float:
    """Return the share of prompts with a choice in which a rejected candidate has the same score as a kept one.

    There the rule decided nothing: the earlier candidate was kept. A prompt has a choice if something was rejected.
    """
    return could_flip(score, score, kept, prompt_index)


def could_flip(low: ArrayLike, high: ArrayLike, kept: NDArray[np.bool_], prompt_index: ArrayLike) -> float:
    """Return the share of prompts with a choice in which a rejected candidate could be as good as a kept one.

    Args:
        low: The least that each score could be, given its noise; `[num_candidates]`.
        high: The most.
        kept: Those that were kept.
        prompt_index: The prompt that each candidate answers.
    """
    prompts = check_groups("prompt_index", prompt_index, len(kept))
    number = int(prompts.max(initial=-1)) + 1
    worst, best = np.full(number, np.inf), np.full(number, -np.inf)
    np.minimum.at(worst, prompts[kept], np.asarray(low, np.float64)[kept])
    np.maximum.at(best, prompts[~kept], np.asarray(high, np.float64)[~kept])
    has_choice = np.isfinite(worst) & np.isfinite(best)
    return float(np.mean(best[has_choice] >= worst[has_choice])) if has_choice.any() else math.nan


def num_choices(kept: NDArray[np.bool_], prompt_index: ArrayLike) -> int:
    """Return the number of prompts with a choice: a candidate was kept, and another one rejected."""
    prompts = np.asarray(prompt_index)
    return len(np.intersect1d(prompts[kept], prompts[~kept]))


def per_sentence(rule: Any, candidates: Candidates) -> Floats | None:
    """Return how much a score of a rule changes with one more Teacher sentence; None if it does not count them."""
    match rule:
        case "count":
            return np.ones(len(candidates))
        case "fewest":
            return -np.ones(len(candidates))
        case "ratio":
            counts = (candidates.teacher_counts, candidates.shared_counts, candidates.student_counts)
            return np.asarray(1 / np.maximum(sum(counts), 1.0))
        case "length_matched":
            spread = deviation(candidates)
            return np.divide(1, spread, out=np.zeros(len(spread)), where=spread > 0)
    return None


def _centered_ranks(values: Floats, prompts: NDArray[np.intp]) -> Floats:
    """Return the rank of each value within its prompt less the mean rank there."""
    order = np.lexsort((values, prompts))
    ordered, groups = values[order], prompts[order]
    is_new = np.ones(len(values), np.bool_)
    is_new[1:] = (np.diff(ordered) != 0) | (np.diff(groups) != 0)
    equal = np.cumsum(is_new) - 1
    ranks = np.empty(len(values))
    ranks[order] = (np.bincount(equal, np.arange(len(values))) / np.bincount(equal))[equal]
    return np.asarray(ranks - (np.bincount(prompts, ranks) / np.bincount(prompts))[prompts])
