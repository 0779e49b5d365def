"""What a choice says about its rule, against the plain-Python reference and by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from dasd_lite.method import choice, selection
from dasd_lite.method.selection import Candidates

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans(), st.integers(0, 3)), max_size=25)


@given(rows=ROWS)
def test_of_the_reference(rows: list[tuple[int, int, bool, int]]) -> None:
    low, other, kept, prompts = ([row[column] for row in rows] for column in range(4))
    high = [a + b for a, b in zip(low, other, strict=True)]
    mask = np.array(kept, np.bool_)
    same = {"rel": 1e-9, "abs": 1e-9, "nan_ok": True}
    correlation = choice.rank_correlation(low, other, prompts)
    assert correlation == pytest.approx(reference.rank_correlation(low, other, prompts), **same)
    assert choice.could_flip(low, high, mask, prompts) == pytest.approx(
        reference.could_flip(low, high, kept, prompts), **same
    )
    assert choice.tied(low, mask, prompts) == pytest.approx(reference.could_flip(low, low, kept, prompts), **same)
    partly = {p for p in prompts if len({k for k, other in zip(kept, prompts, strict=True) if p == other}) == 2}
    assert choice.num_choices(mask, prompts) == len(partly)


def test_by_hand() -> None:
    # Two questions that order length alike, and one whose two answers are as long.
    score, tokens, prompts = [1, 2, 3, 9, 8, 5, 4], [10, 20, 30, 900, 800, 7, 7], [0, 0, 0, 1, 1, 2, 2]
    assert choice.rank_correlation(score, tokens, prompts) == pytest.approx(2.5 / math.sqrt(3 * 2.5))
    assert math.isnan(choice.rank_correlation([1, 1], [2, 3], [0, 0])), "all are tied"
    kept = np.array([False, False, True, True, False, True, False])
    assert choice.tied(score, kept, prompts) == 0
    assert choice.could_flip(np.array(score) - 0.5, np.array(score) + 0.5, kept, prompts) == 1
    assert choice.could_flip(np.array(score) - 0.4, np.array(score) + 0.4, kept, prompts) == 0


@pytest.mark.parametrize("rule", ["count", "fewest", "ratio", "length_matched", "longest"])
def test_what_one_more_teacher_sentence_changes(rule: str) -> None:
    rng = np.random.default_rng(0)
    column = lambda low, high: rng.integers(low, high, 400)  # noqa: E731
    given_ = Candidates(
        teacher_counts=column(40, 60),
        shared_counts=column(40, 60),
        student_counts=column(0, 5),
        num_sentences=column(200, 300),
        num_tokens=column(900, 1100),
        prompt_index=np.arange(400) // 4,
    )
    size = choice.per_sentence(rule, given_)
    if rule == "longest":
        assert size is None
        return
    assert size is not None
    counts = given_.teacher_counts.copy()
    counts[0] += 1
    shared = given_.shared_counts.copy()
    shared[0] -= 1
    more = replace(given_, teacher_counts=counts, shared_counts=shared)
    change = selection.score_candidates(rule, more)[0] - selection.score_candidates(rule, given_)[0]
    # What is expected of the prompt rises a little as well.
    assert change == pytest.approx(size[0], rel=0.3 if rule == "length_matched" else 1e-9)
