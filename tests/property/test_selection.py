"""The rules of selection against the plain-Python reference; what bad columns get."""

import math
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from dasd_lite.errors import DataError
from dasd_lite.method import selection
from dasd_lite.method.selection import Candidates

CANDIDATES = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 2000), st.integers(0, 5)), max_size=30)


def candidates_of(
    counts: Any, sentences: Any = None, tokens: Any = None, prompts: Any = None, seed: int = 0
) -> Candidates:
    """Candidates with these columns; what is not given is 1 sentence, 1 token, and all of one prompt."""
    column = lambda values, default: np.array([default] * len(counts) if values is None else values, np.int64)  # noqa: E731
    zeros = np.zeros(len(counts), np.int64)
    return Candidates(
        teacher_counts=column(counts, 0),
        shared_counts=zeros,
        student_counts=zeros,
        num_sentences=column(sentences, 1),
        num_tokens=column(tokens, 1),
        prompt_index=column(prompts, 0),
        seed=seed,
    )


@given(candidates=CANDIDATES)
def test_length_matched_of_the_reference(candidates: list[tuple[int, int, int]]) -> None:
    counts, tokens, prompts = ([row[column] for row in candidates] for column in range(3))
    score = selection.length_matched(candidates_of(counts, tokens=tokens, prompts=prompts))
    np.testing.assert_allclose(score, reference.length_matched(counts, tokens, prompts), atol=1e-9)
    assert abs(float(score @ np.array(tokens, np.float64))) < 1e-3 * (1 + sum(tokens)), "uncorrelated with length"
    for prompt in set(prompts):
        assert abs(score[np.array(prompts) == prompt].sum()) < 1e-9


def test_length_earns_nothing_in_itself() -> None:
    # Long ones have more Teacher sentences, all at the same rate, but for one short candidate that has twice as many.
    tokens = np.array([100, 200, 400, 800])
    counts = np.array([20, 20, 40, 80])
    assert selection.count(candidates_of(counts)).argmax() == 3
    assert selection.length_matched(candidates_of(counts, tokens=tokens)).argmax() == 0


@given(
    score=st.lists(st.one_of(st.integers(0, 3), st.sampled_from([-math.inf, 0.5])), max_size=30),
    keep=st.integers(0, 5),
    data=st.data(),
)
def test_rank_of_the_reference(score: list[float], keep: int, data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.integers(-2, 4), min_size=len(score), max_size=len(score)))
    kept = selection.rank_within_prompts(score, np.array(prompts, np.int64), keep)
    assert kept.dtype == np.bool_
    assert kept.tolist() == reference.rank_within_prompts(score, prompts, keep)


@given(candidates=CANDIDATES, seed=st.integers(0, 2**63))
def test_built_in_rules_by_name(candidates: list[tuple[int, int, int]], seed: int) -> None:
    counts, tokens, prompts = ([row[column] for row in candidates] for column in range(3))
    given_ = candidates_of(counts, [count + 1 for count in counts], tokens, prompts, seed)
    for name, rule in selection.RULES.items():
        scores = selection.score_candidates(name, given_)
        assert scores.dtype == np.float64
        assert scores.tolist() == np.asarray(rule(given_)).tolist() == selection.score_candidates(rule, given_).tolist()
    assert selection.score_candidates("count", given_).tolist() == counts
    assert selection.score_candidates("ratio", given_).tolist() == [count / (count + 1) for count in counts]


def test_random_scores_do_not_depend_on_what_follows() -> None:
    three, nine = (selection.random(candidates_of([0] * number, seed=7)) for number in (3, 9))
    assert three.tolist() == nine[:3].tolist()
    assert three.tolist() != selection.random(candidates_of([0] * 3, seed=8)).tolist()


def test_a_rule_of_the_users_own() -> None:
    given_ = candidates_of([3, 1, 2], tokens=[5, 9, 7])
    assert selection.score_candidates(lambda candidates: candidates.num_tokens, given_).tolist() == [5.0, 9.0, 7.0]
    assert selection.score_candidates(lambda candidates: [1, 2, 3], given_).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], r"selection rule own returned shape \[2\]; it must be \[3\], a score for each candidate"),
        ([[1.0, 2.0, 3.0]], r"selection rule own returned shape \[1, 3\]; it must be \[3\]"),
        (4.0, r"selection rule own returned shape \[\]; it must be \[3\]"),
        ([1.0, math.nan, 2.0], "selection rule own gave candidate 1 the score nan; it must be finite"),
        ([1.0, 2.0, math.inf], "selection rule own gave candidate 2 the score inf; it must be finite"),
        (None, "selection rule own returned "),
        ("abc", "selection rule own returned str; it must be 3 numbers"),
    ],
)
def test_results_that_are_no_scores(returned: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        selection.score_candidates(lambda candidates: returned, candidates_of([1, 2, 3]), "own")


def test_bad_values() -> None:
    with pytest.raises(DataError, match=r"score\[1\] is NaN; it must be a number"):
        selection.rank_within_prompts([1.0, math.nan], [0, 0], 1)
    with pytest.raises(DataError, match=r"prompt_index has shape \[1\]; it must be \[2\]"):
        selection.rank_within_prompts([1.0, 2.0], [0], 1)
    with pytest.raises(ValueError, match="keep is -1; it must be at least 0"):
        selection.rank_within_prompts([1.0], [0], -1)
    with pytest.raises(DataError, match=r"teacher_counts\[1\] is -1; it must be at least 0"):
        candidates_of([1, -1])
    with pytest.raises(DataError, match=r"num_sentences has shape \[2\]; there are 1 candidates"):
        candidates_of([1], [1, 2])
    with pytest.raises(ValueError, match="rule is 'best'; it must be one of count, ratio, length_matched, random"):
        selection.score_candidates("best", candidates_of([1]))
