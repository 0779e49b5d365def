"""Weights of answers: properties, the choice of λ for a given effective sample size, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_lite.errors import DataError
from dasd_lite.method.weights import answer_weights, choose_lam, effective_sample_size

MEANS = st.floats(-20, 0)
ANSWERS = st.lists(st.tuples(MEANS, st.integers(-2, 5)), min_size=1, max_size=40)
LAMS = st.floats(-50, 50)


def columns(answers):
    means, prompts = zip(*answers, strict=True)
    return np.array(means), np.array(prompts)


def sizes_of(prompts):
    return np.unique(prompts, return_counts=True)[1]


def share_of(means, prompts, lam):
    """Effective sample size ÷ number of answers, mean over prompts with several answers, in plain Python."""
    shares = []
    for prompt in set(prompts.tolist()):
        exponents = [lam * x for x, p in zip(means.tolist(), prompts.tolist(), strict=True) if p == prompt]
        if len(exponents) > 1:
            w = [math.exp(x - max(exponents)) for x in exponents]
            shares.append(sum(w) ** 2 / sum(x * x for x in w) / len(w))
    return sum(shares) / len(shares)


@given(answers=ANSWERS, lam=LAMS)
def test_weights_are_proportional_to_the_exponential_and_have_mean_1(answers, lam):
    means, prompts = columns(answers)
    weights = answer_weights(means, prompts, lam)
    assert weights.dtype == np.float32
    for prompt, size in zip(*np.unique(prompts, return_counts=True), strict=True):
        of_prompt = weights[prompts == prompt].astype(np.float64)
        assert of_prompt.mean() == pytest.approx(1, abs=1e-6)
        assert (of_prompt >= 0).all() and (of_prompt <= size).all()
        exponents = lam * means[prompts == prompt]
        np.testing.assert_allclose(
            of_prompt / of_prompt.max(), np.exp(exponents - exponents.max()), rtol=1e-6, atol=1e-38
        )


@given(answers=ANSWERS)
def test_lambda_0_gives_weights_of_exactly_1(answers):
    assert set(answer_weights(*columns(answers), 0.0).tolist()) == {1.0}


@given(means=st.lists(MEANS, min_size=1, max_size=20), lam=LAMS)
def test_the_only_answer_of_a_prompt_has_weight_exactly_1(means, lam):
    assert set(answer_weights(means, np.arange(len(means)), lam).tolist()) == {1.0}


@given(answers=ANSWERS, lam=LAMS, data=st.data())
def test_the_weights_follow_the_order_of_the_data(answers, lam, data):
    means, prompts = columns(answers)
    order = np.array(data.draw(st.permutations(range(len(means)))))
    weights = answer_weights(means, prompts, lam)
    np.testing.assert_allclose(answer_weights(means[order], prompts[order], lam), weights[order], rtol=1e-6)


@given(answers=ANSWERS, lam=st.floats(-1e300, 1e300))
def test_any_lambda_gives_finite_weights(answers, lam):
    weights = answer_weights(*columns(answers), lam)
    assert np.isfinite(weights).all()


@given(answers=ANSWERS, lam=LAMS)
def test_the_effective_sample_size_is_from_1_to_the_number_of_answers(answers, lam):
    means, prompts = columns(answers)
    ess = effective_sample_size(answer_weights(means, prompts, lam), prompts)
    assert ess.dtype == np.float64
    assert ess.shape == sizes_of(prompts).shape
    assert (ess >= 1 - 1e-6).all() and (ess <= sizes_of(prompts) + 1e-6).all()


@given(answers=ANSWERS, lam=LAMS, less=st.floats(0, 1))
def test_the_effective_sample_size_falls_as_lambda_moves_away_from_0(answers, lam, less):
    means, prompts = columns(answers)
    nearer, farther = (effective_sample_size(answer_weights(means, prompts, x), prompts) for x in (less * lam, lam))
    assert (nearer >= farther - 1e-5).all()


def test_effective_sample_sizes_computed_by_hand():
    sizes = effective_sample_size([1, 1, 1, 2, 0, 3, 1], [7, 7, 7, 8, 8, 9, 9])
    assert sizes.tolist() == [3.0, 1.0, 1.6]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    k=st.integers(2, 6),
    share=st.floats(0.55, 0.999),
    favor=st.sampled_from(["likely", "unlikely"]),
    scale=st.sampled_from([0.003, 0.1, 2.0]),
)
def test_the_given_share_is_reached(seed, k, share, favor, scale):
    rng = np.random.default_rng(seed)
    prompts = np.concatenate([np.repeat(np.arange(20), k), np.arange(100, 110)])  # ten with one answer
    means = -np.abs(rng.normal(3, 1, len(prompts)) * scale)
    lam = choose_lam(means, prompts, share, favor)
    assert (lam > 0) == (favor == "likely") and lam != 0
    assert share_of(means, prompts, lam) == pytest.approx(share, abs=1e-3)
    order = rng.permutation(len(prompts))
    assert choose_lam(means[order], prompts[order], share, favor) == pytest.approx(lam, rel=1e-5)
    best = np.argmax(means[:k]) if favor == "likely" else np.argmin(means[:k])
    assert answer_weights(means, prompts, lam)[:k].argmax() == best


def test_likely_and_unlikely_have_opposite_lambdas_on_a_symmetric_scale():
    means, prompts = [-1.0, -1.5, -2.0], [0, 0, 0]
    assert choose_lam(means, prompts, 0.7, "likely") == -choose_lam(means, prompts, 0.7, "unlikely")


def test_a_share_of_1_gives_lambda_0():
    assert choose_lam([-1.0, -2.0], [0, 0], 1.0, "likely") == 0.0
    assert choose_lam([-1.0], [0], 1.0, "unlikely") == 0.0


def test_means_are_used_because_sums_would_leave_a_single_answer():
    """Answers of 2,000 tokens whose means differ by a hundredth of a nat."""
    means, prompts = np.array([-0.50, -0.51, -0.52, -0.53]), np.zeros(4, int)
    assert effective_sample_size(answer_weights(means, prompts, 1.0), prompts)[0] > 3.99
    assert effective_sample_size(answer_weights(2000 * means, prompts, 1.0), prompts)[0] < 1 + 1e-6


# --- what is refused ----------------------------------------------------------------------------------


def test_a_share_needs_two_answers_that_differ():
    with pytest.raises(
        DataError, match=r"every prompt has a single answer, so all weights would be 1; raise select\.keep"
    ):
        choose_lam([-1.0, -2.0], [0, 1], 0.7, "likely")
    with pytest.raises(DataError, match="every prompt has a single answer"):
        choose_lam([], np.array([], int), 0.7, "likely")
    with pytest.raises(DataError, match="finds all answers of each prompt equally likely"):
        choose_lam([-1.0, -1.0, -2.0], [0, 0, 1], 0.7, "likely")
    with pytest.raises(DataError, match="finds all answers of each prompt equally likely"):
        choose_lam([-1.0, -1.0 - 1e-12], [0, 0], 0.7, "likely")


@pytest.mark.parametrize(
    ("means", "share", "favor", "least"),
    [
        ([-1.0, -2.0], 0.4, "likely", "0.500"),  # below 1/k
        ([-1.0, -1.0, -2.0], 0.6, "likely", "0.667"),  # two share the top
        ([-1.0, -2.0, -2.0, -2.0], 0.6, "unlikely", "0.750"),
    ],
)
def test_a_share_out_of_reach_is_refused_with_the_smallest_possible_one(means, share, favor, least):
    message = rf"size of {share} of a prompt's answers cannot be reached: .* most {favor} answer .* it is {least};"
    with pytest.raises(DataError, match=message):
        choose_lam(means, [0] * len(means), share, favor)
    assert choose_lam(means, [0] * len(means), float(least) + 0.01, favor) != 0


def test_values_out_of_range_are_refused():
    with pytest.raises(DataError, match=r"mean_logprobs\[1\] is nan; it must be finite and at most 0"):
        answer_weights([-1.0, math.nan], [0, 0], 1.0)
    with pytest.raises(DataError, match=r"mean_logprobs\[0\] is 0.5; it must be finite and at most 0"):
        choose_lam([0.5, -1.0], [0, 0], 0.7, "likely")
    with pytest.raises(DataError, match=r"mean_logprobs\[0\] is -inf"):
        answer_weights([-math.inf], [0], 1.0)
    with pytest.raises(DataError, match=r"mean_logprobs has shape \[1, 1\]; it must be one-dimensional"):
        answer_weights([[-1.0]], [0], 1.0)
    with pytest.raises(DataError, match=r"prompt_index has shape \[1\]; it must be \[2\]"):
        answer_weights([-1.0, -2.0], [0], 1.0)
    with pytest.raises(DataError, match=r"weights\[1\] is -1.0; it must be finite and at least 0"):
        effective_sample_size([1.0, -1.0], [0, 0])
    with pytest.raises(DataError, match="the weights of a prompt are all 0"):
        effective_sample_size([1.0, 0.0], [0, 1])
    with pytest.raises(ValueError, match="lam is inf; it must be a finite number"):
        answer_weights([-1.0], [0], math.inf)
    with pytest.raises(ValueError, match=r"share is 0; it must be above 0 and at most 1"):
        choose_lam([-1.0], [0], 0, "likely")
    with pytest.raises(ValueError, match="favor is 'best'; it must be likely or unlikely"):
        choose_lam([-1.0], [0], 0.5, "best")
