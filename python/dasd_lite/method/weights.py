"""Weights of answers: how much each of a prompt's kept answers counts in training, by the teacher's probability.

Input: the teacher's mean log-probability of each answer, in nats per token, and the prompt that it answers. Output:
weights with mean 1 within each prompt. Invariant: each prompt counts as much as without weights; λ = 0, or a prompt
with a single answer, gives exactly 1.

Source: DASD report (arXiv 2601.09088), limitations and future work: reweighting by the teacher's sequence probability.
"""

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dasd_lite.errors import DataError
from dasd_lite.method.divergence import TOLERANCE
from dasd_lite.method.ragged import check_groups

Favor: TypeAlias = Literal["likely", "unlikely"]

_MAX_LAM = 1e6  # differences below its inverse, in nats per token, are noise


def answer_weights(mean_logprobs: ArrayLike, prompt_index: ArrayLike, lam: float) -> NDArray[np.float32]:
    """Return weights proportional to exp(λ · mean log-probability) among the answers of a prompt, with mean 1.

    The mean is over an answer's tokens. Sums over thousands of tokens differ by hundreds of nats, so weights
    proportional to the probability of the whole sequence would all go to one answer, usually the shortest: an effective
    sample size of 1.

    Args:
        mean_logprobs: The teacher's mean log-probability of each answer's tokens, natural logarithm; `[num_answers]`.
        prompt_index: The prompt of each answer; answers of one prompt need not be adjacent; integers `[num_answers]`.
        lam: λ, without unit; above 0 it favors answers that the teacher finds likely, below 0 unlikely ones.

    Returns:
        float32 `[num_answers]`; from 0 to the number of the prompt's answers, and exactly 1 if λ is 0.

    Raises:
        DataError: A mean is above 0 or not finite, or the columns are not equally long; names its index.
        ValueError: λ is not finite.
    """
    if not np.isfinite(lam):
        raise ValueError(f"lam is {lam}; it must be a finite number")
    means = _means(mean_logprobs)
    return _weights(lam * means, check_groups("prompt_index", prompt_index, len(means))).astype(np.float32)


def effective_sample_size(weights: ArrayLike, prompt_index: ArrayLike) -> NDArray[np.float64]:
    """Return the number of equally weighted answers that carry as much information as a prompt's: (Σw)² / Σw².

    Args:
        weights: The weight of each answer, at least 0; `[num_answers]`.
        prompt_index: The prompt of each answer; integers `[num_answers]`.

    Returns:
        From 1 to the number of the prompt's answers, prompts in increasing order; float64 `[num_prompts]`.

    Raises:
        DataError: A weight is negative or not finite, a prompt's weights are all 0, or the columns are not equally
            long.

    Source: Kish (1965), the effective sample size of a weighted sample.
    """
    values = np.array(weights, np.float64)
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        raise DataError(f"weights[{bad[0]}] is {values[bad[0]]}; it must be finite and at least 0")
    prompts = check_groups("prompt_index", prompt_index, len(values))
    if (np.bincount(prompts, values) == 0).any():
        raise DataError("the weights of a prompt are all 0; at least one must be above 0")
    return _effective(values, prompts)


def choose_lam(mean_logprobs: ArrayLike, prompt_index: ArrayLike, share: float, favor: Favor) -> float:
    """Return the λ at which the effective sample size is on average `share` of a prompt's answers.

    The average is over the prompts with at least two answers, since the share of a single answer is always 1. It falls
    as |λ| rises, so λ is found by bisection.

    Args:
        mean_logprobs: The teacher's mean log-probability of each answer's tokens, natural logarithm; `[num_answers]`.
        prompt_index: The prompt of each answer; integers `[num_answers]`.
        share: Above 0 and at most 1.
        favor: The sign of λ: above 0 for `likely`, below 0 for `unlikely`.

    Returns:
        λ to six digits, with the share within 1e-3; 0.0 for a share of 1.

    Raises:
        DataError: No prompt has two answers; the answers are too similar or too few for this share; or as
            `answer_weights`.
        ValueError: `share` or `favor` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1")
    if favor not in ("likely", "unlikely"):
        raise ValueError(f"favor is {favor!r}; it must be likely or unlikely")
    means = _means(mean_logprobs)
    prompts = check_groups("prompt_index", prompt_index, len(means))
    if share == 1:
        return 0.0
    several = np.bincount(prompts)[prompts] > 1
    if not several.any():
        raise DataError("every prompt has a single answer, so all weights would be 1; raise select.keep")
    sign = 1.0 if favor == "likely" else -1.0
    means, prompts = sign * means[several], np.unique(prompts[several], return_inverse=True)[1]
    sizes = np.bincount(prompts)

    def share_at(lam: float) -> float:
        return float((_effective(_weights(lam * means, prompts), prompts) / sizes).mean())

    least = share_at(_MAX_LAM)
    if least > 1 - 1e-6:
        raise DataError("the teacher finds all answers of each prompt equally likely, so all weights would be 1")
    if share < least:
        raise DataError(
            f"an effective sample size of {share} of a prompt's answers cannot be reached: with all weight on the most"
            f" {favor} answer of each prompt it is {least:.3f}; raise it above that, or keep more answers per prompt"
        )
    low, high = 0.0, _MAX_LAM
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if share_at(middle) > share else (low, middle)
    return sign * float(f"{high:.6g}")  # short enough for a recipe, and independent of the last bits of exp


def _weights(exponents: NDArray[np.float64], prompts: NDArray[np.intp]) -> NDArray[np.float64]:
    """Softmax within each prompt, times the number of its answers."""
    sizes = np.bincount(prompts)
    top = np.full(len(sizes), -np.inf)
    np.maximum.at(top, prompts, exponents)
    likelihoods = np.exp(exponents - top[prompts])  # at most 1, and 1 for the largest: neither overflow nor 0 / 0
    return np.asarray(likelihoods * sizes[prompts] / np.bincount(prompts, likelihoods)[prompts])


def _effective(weights: NDArray[np.float64], prompts: NDArray[np.intp]) -> NDArray[np.float64]:
    return np.asarray(np.bincount(prompts, weights) ** 2 / np.bincount(prompts, weights**2))


def _means(values: ArrayLike) -> NDArray[np.float64]:
    array = np.array(values, np.float64)
    if array.ndim != 1:
        raise DataError(f"mean_logprobs has shape {list(array.shape)}; it must be one-dimensional")
    bad = np.flatnonzero(~(np.isfinite(array) & (array <= TOLERANCE)))
    if len(bad):
        raise DataError(f"mean_logprobs[{bad[0]}] is {array[bad[0]]}; it must be finite and at most 0")
    return array
