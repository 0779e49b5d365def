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

CANDIDATES = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 2000), st.integers(0, 5)), max_size=30)


@given(candidates=CANDIDATES)
def test_length_matched_of_the_reference(candidates: list[tuple[int, int, int]]) -> None:
    counts, tokens, prompts = ([row[column] for row in candidates] for column in range(3))
    score = selection.select_length_matched(counts, tokens, prompts)
    np.testing.assert_allclose(score, reference.length_matched(counts, tokens, prompts), atol=1e-9)
    assert abs(float(score @ np.array(tokens, np.float64))) < 1e-3 * (1 + sum(tokens)), "uncorrelated with length"
    for prompt in set(prompts):
        assert abs(score[np.array(prompts) == prompt].sum()) < 1e-9


def test_length_earns_nothing_in_itself() -> None:
    # Long ones have more Teacher sentences, all at the same rate, but for one short candidate that has twice as many.
    tokens = np.array([100, 200, 400, 800])
    counts = np.array([20, 20, 40, 80])
    assert selection.select_count(counts).argmax() == 3
    assert selection.select_length_matched(counts, tokens).argmax() == 0


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
def test_one_signature_for_all_rules(candidates: list[tuple[int, int, int]], seed: int) -> None:
    counts, tokens, prompts = ([row[column] for row in candidates] for column in range(3))
    sentences = [count + 1 for count in counts]
    columns: dict[str, Any] = {"teacher_counts": counts, "num_sentences": sentences, "num_tokens": tokens}
    expected = {
        "count": selection.select_count(counts),
        "ratio": selection.select_ratio(counts, sentences),
        "length_matched": selection.select_length_matched(counts, tokens, prompts),
        "random": selection.select_random(len(counts), seed),
    }
    for rule, scores in expected.items():
        found = selection.score_candidates(rule, **columns, prompt_index=prompts, seed=seed)  # type: ignore[arg-type]
        assert found.dtype == np.float64
        assert found.tolist() == scores.tolist()
    assert expected["ratio"].tolist() == [count / (count + 1) for count in counts]


def test_random_scores_do_not_depend_on_what_follows() -> None:
    assert selection.select_random(3, 7).tolist() == selection.select_random(9, 7)[:3].tolist()
    assert selection.select_random(3, 7).tolist() != selection.select_random(3, 8).tolist()


def test_bad_values() -> None:
    with pytest.raises(DataError, match=r"score\[1\] is NaN; it must be a number"):
        selection.rank_within_prompts([1.0, math.nan], [0, 0], 1)
    with pytest.raises(DataError, match=r"prompt_index has shape \[1\]; there are 2 candidates"):
        selection.rank_within_prompts([1.0, 2.0], [0], 1)
    with pytest.raises(ValueError, match="keep is -1; it must be at least 0"):
        selection.rank_within_prompts([1.0], [0], -1)
    with pytest.raises(DataError, match=r"teacher_counts\[1\] is -1.0; it must be at least 0"):
        selection.select_count([1, -1])
    with pytest.raises(DataError, match="teacher_counts has 1 elements and num_sentences 2; they must be equally many"):
        selection.select_ratio([1], [1, 2])
    with pytest.raises(ValueError, match="rule is 'best'; it must be one of count, ratio, length_matched, random"):
        selection.score_candidates(
            "best",  # type: ignore[arg-type]
            teacher_counts=[1],
            num_sentences=[1],
            num_tokens=[1],
            prompt_index=[0],
            seed=0,
        )
