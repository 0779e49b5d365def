"""Weights of answers: how much each of a prompt's kept answers counts in training, by the teacher's probability.

Input: the teacher's mean log-probability of each answer, in nats per token, and the prompt that it answers. Output:
weights with mean 1 within each prompt. Invariant: a prompt counts as much as without weights, only its answers are set
apart; λ = 0, and a prompt with one answer, give exactly 1.

Source: DASD report (arXiv 2601.09088), limitations and future work: reweighting by the teacher's sequence probability.
"""

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dasd_lite.errors import DataError

Favour: TypeAlias = Literal["likely", "unlikely"]

_MAX_LAM = 1e6  # answers that differ by less than its inverse, in nats per token, cannot be set apart: that is noise
_ROUNDING = 1e-4  # a log-probability may be this much above 0


def answer_weights(mean_logprobs: ArrayLike, prompt_index: ArrayLike, lam: float) -> NDArray[np.float32]:
    """Weights in proportion to exp(λ · mean log-probability) among the answers of a prompt, with mean 1.

    It is the mean over an answer's tokens, never their sum. Sums of answers of thousands of tokens differ by hundreds
    of nats, so that weights in proportion to the sequence probability itself are one answer's alone, an effective
    sample size of 1; and the shortest answer would have it.

    Args:
        mean_logprobs: The teacher's mean log-probability of each answer's tokens, natural logarithm; `[num_answers]`.
        prompt_index: Which prompt each answers; answers of one prompt need not stand together; integers
            `[num_answers]`.
        lam: λ, without unit; above 0 favours answers that the teacher finds likely, below 0 the unlikely.

    Returns:
        float32 `[num_answers]`; from 0 to the number of the prompt's answers, and exactly 1 if λ is 0.

    Raises:
        DataError: A mean is not finite or above 0, or the columns are not equally long; names its index.
        ValueError: λ is not finite.
    """
    if not np.isfinite(lam):
        raise ValueError(f"lam is {lam}; it must be a finite number")
    means = _means(mean_logprobs)
    return _weights(lam * means, _prompts(len(means), prompt_index)).astype(np.float32)


def effective_sample_size(weights: ArrayLike, prompt_index: ArrayLike) -> NDArray[np.float64]:
    """So many answers of equal weight say as much as a prompt's weighted ones: (Σw)² / Σw².

    Args:
        weights: Of each answer, at least 0; `[num_answers]`.
        prompt_index: Which prompt each answers; integers `[num_answers]`.

    Returns:
        From 1 to the number of the prompt's answers, prompts by increasing index; float64 `[num_prompts]`.

    Raises:
        DataError: A weight is negative or not finite, a prompt's weights are all 0, or the columns are not equally
            long.

    Source: Kish (1965), the effective sample size of a weighted sample.
    """
    values = np.array(weights, np.float64)
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        raise DataError(f"weights[{bad[0]}] is {values[bad[0]]}; it must be finite and at least 0")
    prompts = _prompts(len(values), prompt_index)
    if (np.bincount(prompts, values) == 0).any():
        raise DataError("the weights of a prompt are all 0; one of them must be above")
    return _effective(values, prompts)


def choose_lam(mean_logprobs: ArrayLike, prompt_index: ArrayLike, share: float, favour: Favour) -> float:
    """The λ at which the effective sample size is on average `share` of a prompt's answers.

    The mean is over the prompts with at least two answers: one answer's share is 1 whatever λ is. It falls as |λ|
    rises, so the λ is found by bisection.

    Args:
        mean_logprobs: The teacher's mean log-probability of each answer's tokens, natural logarithm; `[num_answers]`.
        prompt_index: Which prompt each answers; integers `[num_answers]`.
        share: Above 0 and at most 1.
        favour: Sign of λ: `likely` is above 0, `unlikely` below.

    Returns:
        λ to six digits, with the share within 1e-3; 0.0 for a share of 1.

    Raises:
        DataError: No prompt has two answers; a prompt's answers are too equal or too few for this share; or as
            `answer_weights`.
        ValueError: `share` or `favour` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1")
    if favour not in ("likely", "unlikely"):
        raise ValueError(f"favour is {favour!r}; it must be likely or unlikely")
    means = _means(mean_logprobs)
    prompts = _prompts(len(means), prompt_index)
    if share == 1:
        return 0.0
    several = np.bincount(prompts)[prompts] > 1
    if not several.any():
        raise DataError("no prompt has two answers, so no weight can differ from 1; keep more than one a prompt")
    sign = 1.0 if favour == "likely" else -1.0
    means, prompts = sign * means[several], np.unique(prompts[several], return_inverse=True)[1]
    sizes = np.bincount(prompts)

    def share_at(lam: float) -> float:
        return float((_effective(_weights(lam * means, prompts), prompts) / sizes).mean())

    least = share_at(_MAX_LAM)
    if least > 1 - 1e-6:
        raise DataError("the teacher finds all answers of a prompt equally likely, so no weight can differ from 1")
    if share < least:
        raise DataError(
            f"an effective sample size of {share} of a prompt's answers is out of reach: with all weight on the most"
            f" {favour} one of each prompt it is {least:.3f}; it must be above that, or more answers a prompt"
        )
    low, high = 0.0, _MAX_LAM
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if share_at(middle) > share else (low, middle)
    return sign * float(f"{high:.6g}")  # as a recipe would name it, and the same whatever the last bits of exp


def _weights(exponents: NDArray[np.float64], prompts: NDArray[np.intp]) -> NDArray[np.float64]:
    """Softmax within each prompt, times the number of its answers."""
    sizes = np.bincount(prompts)
    top = np.full(len(sizes), -np.inf)
    np.maximum.at(top, prompts, exponents)
    likelihoods = np.exp(exponents - top[prompts])  # at most 1, and 1 somewhere: neither overflow nor 0 / 0
    return np.asarray(likelihoods * sizes[prompts] / np.bincount(prompts, likelihoods)[prompts])


def _effective(weights: NDArray[np.float64], prompts: NDArray[np.intp]) -> NDArray[np.float64]:
    return np.asarray(np.bincount(prompts, weights) ** 2 / np.bincount(prompts, weights**2))


def _means(values: ArrayLike) -> NDArray[np.float64]:
    array = np.array(values, np.float64)
    if array.ndim != 1:
        raise DataError(f"mean_logprobs has shape {list(array.shape)}; it must be one-dimensional")
    bad = np.flatnonzero(~(np.isfinite(array) & (array <= _ROUNDING)))
    if len(bad):
        raise DataError(f"mean_logprobs[{bad[0]}] is {array[bad[0]]}; it must be finite and at most 0")
    return array


def _prompts(num_answers: int, prompt_index: ArrayLike) -> NDArray[np.intp]:
    """Prompts numbered from 0, whatever they are called."""
    prompts = np.asarray(prompt_index)
    if prompts.shape != (num_answers,):
        raise DataError(f"prompt_index has shape {list(prompts.shape)}; there are {num_answers} answers")
    return np.unique(prompts, return_inverse=True)[1]
