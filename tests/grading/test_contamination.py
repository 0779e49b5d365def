"""Questions in training prompts: shares by hand and by brute force, scripts without spaces, false alarms."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dasd_lite.data.prompts import read_prompts
from dasd_lite.grading.contamination import LISTED, Overlap, overlaps, words

QUESTION = "Let x be the number of ways in which 12 red and 7 blue marbles lie in a row."
OTHER = "A train leaves the station at noon and meets another one after forty minutes of steady travel."


def test_words():
    assert words("Find $x^2$, IF it’s “FULL”: １２ naïve") == ["find", "x", "2", "if", "it", "s", "full", "12", "naïve"]
    assert words("求3的倍数ABC") == ["求", "3", "的", "倍", "数", "abc"]
    assert words("…!") == []


def test_the_same_words_are_exact_whatever_the_marks():
    same = QUESTION.upper().replace(" ", "  ").replace(".", "!\n")
    assert overlaps([OTHER, QUESTION], ["x", same]) == [Overlap(1, 1, 1.0, True)]


def test_a_question_inside_a_longer_prompt_is_flagged_and_not_exact():
    (own,) = overlaps([QUESTION], [f"Solve this. {QUESTION} Put the answer in a box."])
    assert (own.share, own.exact, own.is_flagged) == (1.0, False, True)


def test_the_share_by_hand():
    """19 words have 12 8-grams; the first 13 words have 6 of them, the first 10 have 3, the first 9 two."""
    text = words(QUESTION)
    assert len(text) == 19
    for kept, share in ((13, 6 / 12), (12, 5 / 12), (10, 3 / 12)):
        (own,) = overlaps([QUESTION], [" ".join(text[:kept]) + " and then something else entirely happens"])
        assert own.share == pytest.approx(share)
        assert own.is_flagged == (share >= 0.5)
    assert overlaps([QUESTION], [" ".join(text[:9])]) == []
    assert overlaps([QUESTION], [" ".join(reversed(text))]) == []


def test_a_share_is_that_of_one_prompt():
    text = words(QUESTION)
    halves = [" ".join(text[:10]), " ".join(text[9:])]
    assert [own.share for own in overlaps([QUESTION], halves)] == [pytest.approx(3 / 12)] * 2


def test_short_questions_are_found_whole():
    found = overlaps(["What is 2+2?", "Name it"], ["So what is 2 + 2 then", "what is 2", "name", "Name it!"])
    assert found == [Overlap(1, 3, 1.0, True), Overlap(0, 0, 1.0, False)]


def test_scripts_without_spaces_are_compared_by_characters():
    question = "已知数列的前几项和为一百求第十项的值是多少"
    (own,) = overlaps([question], [f"请回答。{question[:18]}吗"])
    assert own.share == pytest.approx(11 / 14)
    assert overlaps([question], ["今天天气很好我们一起去公园散步吧"]) == []


def test_the_wording_of_a_task_flags_nobody():
    ask = "Think step by step and put your final answer into a box at the very end of it"
    names = ["ann", "bob", "cid", "dan", "eve", "fay"]
    questions = [f"{name} has {i} apples and gives away two more than {name} ate on day {i}. {ask}"
                 for i, name in enumerate(names)]  # fmt: skip
    prompts = [f"{OTHER} {ask}", questions[2]]
    (own,) = overlaps(questions, prompts)
    assert (own.question, own.prompt, own.exact) == (2, 1, True)
    assert overlaps(questions[:1], prompts[:1])[0].share > LISTED, "a single question cannot tell"


def test_the_demo_has_like_questions_and_no_equal_ones():
    demo = Path(__file__).parents[2] / "python" / "dasd_lite" / "demo"
    texts = [[p.messages[-1]["content"] for p in read_prompts(demo / f"{n}.jsonl")] for n in ("heldout", "train")]
    found = overlaps(*texts)
    assert not any(own.exact for own in found)
    flagged = [own for own in found if own.is_flagged]
    assert len(flagged) == 5
    for own in flagged:  # they begin alike: the same swaps
        first, second = texts[0][own.question], texts[1][own.prompt]
        assert set(first.split(": ")[1].split(", ")[:2]) & set(second.split(": ")[1].split(", ")), (first, second)
    assert overlaps(texts[0], [*texts[1], texts[0][7]])[0] == Overlap(7, 400, 1.0, True)


TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=14).map(" ".join), max_size=5)


@given(TEXTS, TEXTS)
def test_against_brute_force(questions, prompts):
    def grams(text, length):
        return {tuple(text[i : i + length]) for i in range(len(text) - length + 1)}

    every = [words(question) for question in questions]
    expected = {}
    for i, own in enumerate(every):
        length = min(len(own), 8)
        if not length:
            continue
        # of questions of one length: an 8-gram in more than three of them is the task's
        alike = [grams(text, length) for text in every if min(len(text), 8) == length]
        left = {gram for gram in grams(own, length) if sum(gram in text for text in alike) <= 3}
        for j, prompt in enumerate(prompts):
            exact = own == words(prompt)
            share = len(left & grams(words(prompt), length)) / len(left) if left else 0.0
            if 2 * len(left) < len(grams(own, length)) or not share:
                share = 1.0 if exact else 0.0
            if share >= 0.2:
                expected[i, j] = (pytest.approx(share), exact)
    found = overlaps(questions, prompts)
    assert {(own.question, own.prompt): (own.share, own.exact) for own in found}.items() <= expected.items()
    for side in (0, 1):
        assert {pair[side] for pair in expected} == {(own.question, own.prompt)[side] for own in found}
    for own in found:
        rivals = [s for (i, j), (s, _) in expected.items() if i == own.question or j == own.prompt]
        assert rivals
    assert found == sorted(found, key=lambda own: (not own.exact, -own.share, own.question, own.prompt))
