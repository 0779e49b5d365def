"""The standard error of an accuracy."""

import math

import numpy as np
from numpy.typing import NDArray


def standard_error(by_question: NDArray[np.float64]) -> float:
    """Return the standard error of the mean over questions, whose samples are not independent of each other.

    Args:
        by_question: Share of right answers to each question, or the difference of two; float64 `[num_questions]`.

    Returns:
        Standard deviation over the questions (n - 1) / √n; NaN for fewer than two questions.
    """
    number = len(by_question)
    return float(by_question.std(ddof=1) / math.sqrt(number)) if number > 1 else math.nan
