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
    counts: Any, shared: Any = None, tokens: Any = None, prompts: Any = None, seed: int = 0, **known: Any
) -> Candidates:
    """Candidates with these columns; what is not given is no Shared sentence, 1 token, and all of one prompt."""
    column = lambda values, default: np.array([default] * len(counts) if values is None else values, np.int64)  # noqa: E731
    return Candidates(
        teacher_counts=column(counts, 0),
        shared_counts=column(shared, 0),
        student_counts=np.ones(len(counts), np.int64),
        num_sentences=column(counts, 0) + column(shared, 0) + 3,  # two have no class
        num_tokens=column(tokens, 1),
        prompt_index=column(prompts, 0),
        seed=seed,
        **{name: np.array(values, np.float64) for name, values in known.items()},
    )


@given(candidates=CANDIDATES)
def test_length_matched_of_the_reference(candidates: list[tuple[int, int, int]]) -> None:
    counts, tokens, prompts = ([row[column] for row in candidates] for column in range(3))
    score = selection.length_matched(candidates_of(counts, tokens=tokens, prompts=prompts))
    np.testing.assert_allclose(score, reference.length_matched(counts, tokens, prompts), atol=1e-9)
    for prompt in set(prompts):
        if prompts.count(prompt) == 1:
            assert abs(score[prompts.index(prompt)]) < 1e-12, "an answer alone is as expected"


@pytest.mark.parametrize("num_answers", [2, 4, 8])
@pytest.mark.parametrize(("opening", "tolerance"), [(0, 0.12), (4, 0.4)])
def test_chance_chooses_no_length(num_answers: int, opening: int, tolerance: float) -> None:
    """Teacher sentences come at one rate in all answers of a prompt, beside a few that every answer has."""
    rng = np.random.default_rng(num_answers)
    shape = (8000, num_answers)
    tokens = np.exp(rng.normal(7.5, 0.5, (shape[0], 1)) + rng.normal(0, 0.3, shape)).astype(int)
    rates = np.clip(rng.normal(0.3, 0.1, (shape[0], 1)), 0.05, 0.9)
    counts = opening + rng.binomial(tokens // 20, rates)
    prompts = np.repeat(np.arange(shape[0]), num_answers)
    given_ = candidates_of(counts.ravel(), tokens=tokens.ravel(), prompts=prompts)

    def chosen(rule: str) -> tuple[float, float, float]:
        kept = selection.rank_within_prompts(selection.score_candidates(rule, given_), prompts, 1).reshape(shape)
        length = tokens[kept].mean() / tokens.mean()
        best = kept.argmax(1)
        shares = (np.mean(best == tokens.argmax(1)), np.mean(best == tokens.argmin(1)))
        return length, *(float(share) * num_answers for share in shares)

    length, longest, shortest = chosen("length_matched")
    assert length == pytest.approx(1, abs=0.015)
    assert [longest, shortest] == pytest.approx([1, 1], abs=tolerance), "times as often as by chance"
    assert chosen("count")[1] > 1.5 > 0.5 > chosen("count")[2], "which the count does not manage"


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
    sums = {"rank_sum": [c + 7.0 for c in counts], "surprisal_sum": [n / 3 for n in tokens]}
    means = {"student_mean_logprob": [-c / 9 for c in counts]}
    given_ = candidates_of(counts, [count + 1 for count in counts], tokens, prompts, seed, **sums, **means)
    for name, rule in selection.RULES.items():
        scores = selection.score_candidates(name, given_)
        assert scores.dtype == np.float64
        assert scores.tolist() == np.asarray(rule(given_)).tolist() == selection.score_candidates(rule, given_).tolist()
    assert selection.score_candidates("count", given_).tolist() == counts
    scores = {name: selection.score_candidates(name, given_).tolist() for name in selection.RULES}
    assert scores["ratio"] == [count / (count + count + 1 + 1) for count in counts], "of those that have a class"
    assert scores["fewest"] == [-count for count in counts]
    assert (scores["longest"], scores["shortest"]) == (tokens, [-length for length in tokens])
    assert scores["likelihood"] == means["student_mean_logprob"]
    assert scores["rsr"] == [-r / s for r, s in zip(sums["rank_sum"], sums["surprisal_sum"], strict=True)]


def test_rsr_by_hand_and_of_the_reference() -> None:
    # Ranks 1 and 2 of p = 1/2 and 1/4: 3 / (ln 2 + ln 4).
    tokens = [[0.5, 0.3, 0.2], [0.5, 0.25, 0.25]]
    assert reference.rank_surprisal_ratio(tokens, [0, 1]) == pytest.approx(3 / (3 * np.log(2)))
    certain = candidates_of([0, 0], rank_sum=[3, 2], surprisal_sum=[3 * np.log(2), 0])
    low, none = selection.rsr(certain).tolist()
    assert low == pytest.approx(-1 / np.log(2)) and none == -2e6, "no surprisal at all is the worst"


@pytest.mark.parametrize(
    ("rule", "known", "message"),
    [
        ("likelihood", {}, "the rule needs student_mean_logprob, which is not known without scores; run score first"),
        (
            "rsr",
            {"rank_sum": [4, math.nan], "surprisal_sum": [1, 1]},
            r"the rule needs rank_sum, but candidate 1 of 2 has none; only transformers has ranks \(score.engine\)",
        ),
        (
            "likelihood",
            {"student_mean_logprob": [math.nan, -1]},
            "the rule needs student_mean_logprob, but candidate 0 of 2 has none",
        ),
    ],
)
def test_what_a_rule_needs_must_be_known(rule: str, known: dict[str, list[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        selection.score_candidates(rule, candidates_of([0, 0], **known))


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
    with pytest.raises(DataError, match=r"shared_counts has shape \[2\]; there are 1 candidates"):
        candidates_of([1], [1, 2])
    with pytest.raises(
        ValueError, match="rule is 'best'; it must be one of count, ratio, length_matched, rsr, likelihood"
    ):
        selection.score_candidates("best", candidates_of([1]))
