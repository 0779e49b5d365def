"""Statistics of accuracies against brute force, values by hand and from tables, and intervals that cover."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dasd_lite.grading.statistics import (
    Accuracy,
    compare_accuracies,
    majority_at_k,
    pass_all_k,
    pass_at_k,
    standard_error,
    t_quantile,
)


def accuracy(right, samples, undecided=None, questions=None, votes=()):
    right = np.array(right, np.int64)
    samples = np.broadcast_to(np.array(samples, np.int64), right.shape)
    undecided = np.zeros_like(right) if undecided is None else np.array(undecided, np.int64)
    return Accuracy(tuple(range(len(right)) if questions is None else questions), samples, right, undecided, votes)


ANSWERS = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=2, max_size=8)
"""Whether each answer to each question is right; the numbers of answers differ."""


@given(ANSWERS)
def test_the_error_over_questions_is_that_of_clusters(answers):
    """The formula of arXiv 2411.00640, appendix A, with C/(C − 1): pairs of answers to the same question."""
    flat = [float(x) for own in answers for x in own]
    mean, n = sum(flat) / len(flat), len(answers)
    pairs = sum((x - mean) * (y - mean) for own in answers for x, y in itertools.product(own, own))
    own = accuracy([sum(own) for own in answers], [len(own) for own in answers])
    assert own.mean == pytest.approx(mean)
    assert own.standard_error == pytest.approx(math.sqrt(max(pairs, 0) * n / (n - 1)) / len(flat), abs=1e-7)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12))
def test_with_equal_numbers_it_is_the_deviation_of_the_means(right):
    own = accuracy(right, 5)
    assert own.standard_error == pytest.approx(np.std(own.by_question, ddof=1) / math.sqrt(len(right)))
    assert own.standard_error == pytest.approx(standard_error(own.by_question))
    assert own.mean == pytest.approx(own.by_question.mean())


def test_the_error_of_resampling_is_what_resampling_shows():
    rng = np.random.default_rng(0)
    p = rng.beta(1.5, 0.5, 30)
    drawn = [accuracy(rng.binomial(4, p), 4) for _ in range(4000)]
    seen = np.std([own.mean for own in drawn])
    assert math.sqrt(np.mean([own.resampling_error**2 for own in drawn])) == pytest.approx(seen, rel=0.03)


def test_the_errors_of_an_examination_of_thirty_questions():
    """64 answers each, three quarters right: the error over questions is seven times that of re-sampling."""
    own = accuracy([8] * 4 + [44] * 10 + [61] * 16, 64)
    assert own.mean == pytest.approx(0.754, abs=5e-4)
    assert own.standard_error == pytest.approx(0.0510, abs=5e-4)
    assert own.resampling_error == pytest.approx(0.0076, abs=5e-5)
    naive = math.sqrt(own.mean * (1 - own.mean) / own.num_answers)  # as if all 1,920 answers were independent
    assert naive == pytest.approx(0.0098, abs=5e-5), "neither of the two"


def test_what_cannot_be_known_is_not_a_number():
    single = accuracy([1], 2)
    assert math.isnan(single.standard_error) and math.isnan(single.interval()[0])
    assert math.isnan(accuracy([1, 0], 1).resampling_error)
    assert math.isnan(accuracy([1, 2], [1, 2]).pass_at(2))
    assert math.isnan(accuracy([1, 0], 1).majority_at(1)), "no votes were given"


def test_undecided_answers_widen_to_all_wrong_and_all_right():
    own = accuracy([1, 0], 4, undecided=[1, 2])
    assert own.bounds == (1 / 8, 4 / 8)
    assert own.mean == 1 / 8


# --- intervals --------------------------------------------------------------------------------------


def test_wilson_where_each_question_is_always_or_never_right():
    """27 of 30: [0.7438, 0.9654] (Wilson's formula); with more answers each, it stays as wide."""
    for k in (1, 64):
        assert accuracy([k] * 27 + [0] * 3, k).interval() == pytest.approx((0.7438, 0.9654), abs=1e-4)
    assert accuracy([0] * 30, 4).interval() == pytest.approx((0, 0.1135), abs=1e-4)
    assert accuracy([4] * 30, 4).interval() == pytest.approx((0.8865, 1), abs=1e-4)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=10), st.sampled_from([0.5, 0.9, 0.95]))
def test_an_interval_is_a_range_around_the_mean(right, level):
    own = accuracy(right, 4)
    low, high = own.interval(level)
    assert 0 <= low <= own.mean + 1e-12 and own.mean - 1e-12 <= high <= 1
    narrow = own.interval(level / 2)
    assert low <= narrow[0] + 1e-12 and narrow[1] <= high + 1e-12
    mirrored = accuracy([4 - number for number in right], 4).interval(level)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))


@pytest.mark.parametrize("k", [1, 4, 64])
def test_intervals_cover(k):
    """Questions of mixed difficulty, 30 of them; benchmarks/coverage.py has more of them and other difficulties."""
    rng, p = np.random.default_rng(k), (1.3, 0.42)
    runs, covered, paired = 3000, 0, 0
    for _ in range(runs):
        hard = rng.beta(*p, 30)
        first, second = accuracy(rng.binomial(k, hard), k), accuracy(rng.binomial(k, hard**0.8), k)
        low, high = first.interval()
        covered += low <= p[0] / sum(p) <= high
        low, high = compare_accuracies(first, second).interval()
        paired += low <= DIFFERENCE <= high
    assert covered / runs == pytest.approx(0.95, abs=0.01)
    assert paired / runs == pytest.approx(0.95, abs=0.016)


# E[p^0.8] − E[p] for p of Beta(1.3, 0.42)
DIFFERENCE = math.gamma(2.1) * math.gamma(1.72) / (math.gamma(1.3) * math.gamma(2.52)) - 1.3 / 1.72


# --- several answers --------------------------------------------------------------------------------


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    any_right = Fraction(sum(map(any, subsets)), len(subsets))
    all_right = Fraction(sum(map(all, subsets)), len(subsets))
    samples, right = np.array([n]), np.array([c])
    assert pass_at_k(samples, right, k)[0] == pytest.approx(float(any_right), abs=1e-12)
    assert pass_all_k(samples, right, k)[0] == pytest.approx(float(all_right), abs=1e-12)


def test_pass_at_more_than_there_are_is_missing_and_large_numbers_do_not_overflow():
    assert np.isnan(pass_at_k(np.array([4, 4]), np.array([4, 0]), 5)).all()
    assert pass_at_k(np.array([5000]), np.array([1]), 2500)[0] == pytest.approx(0.5)


VOTE = st.sampled_from([True, "1", "2", None])


def expected_majority(votes, k):
    """Over all subsets: the credit of the right answer."""
    credits = []
    for subset in itertools.combinations(votes, k):
        counts = {vote: subset.count(vote) for vote in subset if vote is not None}
        winners = [vote for vote, number in counts.items() if number == max(counts.values())]
        credits.append(Fraction(winners.count(True), len(winners)) if winners else Fraction(0))
    return float(sum(credits) / len(credits))


@given(st.lists(VOTE, min_size=1, max_size=7), st.data())
def test_majority_is_expected_over_subsets(votes, data):
    k = data.draw(st.integers(1, len(votes)))
    draws = 1 if k == len(votes) else 20_000
    measured = majority_at_k([votes], k, draws=draws)[0]
    assert measured == pytest.approx(expected_majority(votes, k), abs=1e-9 if draws == 1 else 0.02)


def test_majority_by_hand():
    assert majority_at_k([[True, "7", "7"], [True, "7"], [None, None], [None, True]], 2, draws=1)[1:].tolist() == [
        0.5,
        0.0,
        1.0,
    ]
    # the first answers are all right and the later ones all wrong: their order must not count
    ordered = [True] * 4 + ["7"] * 4
    assert majority_at_k([ordered], 4, draws=4000)[0] == pytest.approx(0.5, abs=0.03)
    assert majority_at_k([ordered], 4).tolist() == majority_at_k([ordered], 4).tolist(), "seeded"
    assert np.isnan(majority_at_k([[True]], 2)[0])


def test_a_wrong_answer_that_says_right_is_no_vote_for_the_right_one():
    assert majority_at_k([["right", "right", True]], 3)[0] == 0


# --- comparisons ------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=2, max_size=9))
def test_a_comparison_is_question_by_question(pairs):
    first, second = accuracy([a for a, _ in pairs], 3), accuracy([b for _, b in pairs], 6)
    own, back = compare_accuracies(first, second), compare_accuracies(second, first)
    d = np.array([b / 6 - a / 3 for a, b in pairs])
    assert own.difference == pytest.approx(d.mean()) == pytest.approx(second.mean - first.mean)
    assert own.standard_error == pytest.approx(np.std(d, ddof=1) / math.sqrt(len(d)))
    sides = [Fraction(b, 6) - Fraction(a, 3) for a, b in pairs]
    assert own.wins == sum(side > 0 for side in sides) == back.losses
    assert own.ties == sum(side == 0 for side in sides) == back.ties
    assert (own.difference, own.wins) == (-back.difference, back.losses)


def test_only_shared_questions_count():
    first = accuracy([4, 0, 2], 4, questions=["a", "b", "c"])
    second = accuracy([1, 4, 3], 4, questions=["c", "d", "b"])
    own = compare_accuracies(first, second)
    assert (own.shared, own.only_first, own.only_second) == (2, 1, 1)
    assert own.difference == pytest.approx((3 / 4 + (1 / 4 - 2 / 4)) / 2)
    assert (own.wins, own.ties, own.losses) == (1, 0, 1)
    nothing = compare_accuracies(first, accuracy([1], 4, questions=["e"]))
    assert nothing.shared == 0 and math.isnan(nothing.difference) and math.isnan(nothing.standard_error)
    assert nothing.in_errors is None and math.isnan(nothing.interval()[0])


def test_equal_differences_are_no_certainty():
    own = compare_accuracies(accuracy([1, 1, 1], 2), accuracy([2, 2, 2], 2))
    assert (own.difference, own.standard_error, own.in_errors) == (0.5, 0.0, None)
    assert math.isnan(own.interval()[0])


def test_a_paired_difference_is_known_better_than_two_accuracies():
    rng = np.random.default_rng(1)
    hard = rng.beta(1.3, 0.42, 30)
    first, second = (accuracy(rng.binomial(64, p), 64) for p in (hard, hard**0.95))
    own = compare_accuracies(first, second)
    assert own.standard_error < math.hypot(first.standard_error, second.standard_error) / 3


@pytest.mark.parametrize(
    ("degrees", "level", "value"),
    [  # from printed tables
        (1, 0.95, 12.706205),
        (2, 0.95, 4.302653),
        (3, 0.99, 5.840909),
        (4, 0.90, 2.131847),
        (29, 0.95, 2.045230),
        (30, 0.99, 2.749996),
        (120, 0.95, 1.979930),
        (10**6, 0.95, 1.959966),
    ],
)
def test_quantiles_of_student(degrees, level, value):
    assert t_quantile(level, degrees) == pytest.approx(value, abs=2e-6)
