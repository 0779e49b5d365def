"""Which tokens the transformers sampler may draw."""

import numpy as np
import pytest
import torch

from dasd_lite.inference import SamplingParams
from dasd_lite.inference.draw import draw_tokens

PROBS = np.array([0.4, 0.3, 0.2, 0.08, 0.02])


def drawn(params, vocab_size=5):
    """Return every token that some uniform number draws, and their frequencies."""
    uniform = torch.arange(0.0005, 1, 0.001)
    logits = torch.from_numpy(np.log(PROBS)).float().expand(len(uniform), -1)
    tokens, logprobs = draw_tokens(logits, uniform, params, vocab_size)
    np.testing.assert_allclose(logprobs, np.log(PROBS)[tokens], rtol=1e-5)
    return sorted(set(tokens.tolist())), np.bincount(tokens, minlength=5) / len(uniform)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [0, 1, 2, 3, 4]),
        (SamplingParams(min_p=0.1), [0, 1, 2, 3]),
        (SamplingParams(min_p=0.6), [0, 1]),
        (SamplingParams(min_p=1.0), [0]),
        (SamplingParams(min_p=0.1, top_k=2), [0, 1]),
        (SamplingParams(min_p=0.6, top_k=4), [0, 1]),
        (SamplingParams(top_p=0.55), [0, 1]),
        (SamplingParams(min_p=0.6, top_p=0.55), [0]),  # the likeliest has 4/7 of what min_p keeps
        (SamplingParams(temperature=2.0, min_p=0.6), [0, 1, 2]),  # applies to the tempered probabilities
        (SamplingParams(temperature=0.0, min_p=0.1), [0]),
    ],
)
def test_which_tokens_may_be_drawn(params, expected):
    assert drawn(params)[0] == expected


def test_min_p_keeps_proportions():
    np.testing.assert_allclose(drawn(SamplingParams(min_p=0.4))[1], [4 / 9, 3 / 9, 2 / 9, 0, 0], atol=0.002)
