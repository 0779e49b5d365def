"""Grading: which answer is found in a completion, and whether it is the right one."""

import pytest

from dasd_lite.data.records import Prompt
from dasd_lite.grading.math import extract, grade
from dasd_lite.inference import Completion
from dasd_lite.stages.evaluate import _graded


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("<think> 1 + 1 </think>\nAnswer: 2", "2"),
        ("Answer: 2", "2"),
        ("The answer is 7.", "7"),
        ("The answer is: 42", "42"),
        ("the final answer is **12**", "12"),
        ("**Answer:** 12", "12"),
        ("**Answer**: 12", "12"),
        ("Answer = 3.5.", "3.5"),
        ("Answer: 5. The rest is prose.", "5"),
        ("Answer: 1\nNo, wait.\nAnswer: 2", "2"),
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{4} Answer: 5", "4"),
        (r"<think>\boxed{9}</think> Answer: 8", "8"),
        ("Answer: `x = 3`", "x = 3"),
        ("Answer: $12$", "12"),
        # nothing found
        ("", None),
        ("I do not know.", None),
        ("<think> Answer: 5 </think>", None),
        ("<think> the answer is 5, or is it", None),
        (r"\boxed{4", None),
        ("Answer:", None),
        ("The answers are 4 and 5", None),
    ],
)
def test_extract(completion, found):
    assert extract(completion) == found


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("5", "5"),
        ("5.0", "5"),
        ("005", "5"),
        ("+5", "5"),
        ("1,234", "1234"),
        ("1 234", "1234"),
        ("50%", "50"),
        ("0.5", "1/2"),
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac{-3}{4}", "-0.75"),
        ("$7$", "7"),
        ("Berlin", "berlin"),
        ("  a   b ", "a b"),
        ("1e3", "1000"),
    ],
)
def test_equal_answers_are_right(said, right):
    assert grade(rf"\boxed{{{said}}}", right).verdict == "right"


@pytest.mark.parametrize(
    ("said", "right"),
    [("5", "6"), ("5", "five"), ("-5", "5"), ("5 apples", "5"), ("0.333", "1/3"), ("1/0", "0"), ("", "0"), ("a", "b")],
)
def test_other_answers_are_wrong(said, right):
    assert grade(rf"\boxed{{{said}}}", right).verdict == "wrong"


def test_no_answer_is_unparseable_and_never_right():
    assert grade("", "").verdict == "unparseable"
    assert grade("no idea", "no idea").verdict == "unparseable"
    assert grade("no idea", "no idea").extracted is None


@pytest.mark.timeout(10)
@pytest.mark.parametrize("said", ["1e999999999", "1e-999999999", "1E+999999999", "9" * 100_000, "{" * 100_000])
def test_monstrous_numbers_are_wrong_at_once(said):
    assert grade(f"Answer: {said}", "5").verdict == "wrong"


def completion(text, finish_reason):
    return Completion(0, text, [1, 2], [0.0, 0.0], [1, 1], finish_reason)


def test_an_answer_that_was_cut_off_is_never_right():
    """`Answer: 12` cut off in `Answer: 123` is no 12."""
    question = Prompt("q", ({"role": "user", "content": "?"},), "all", "12")
    whole = _graded(completion("</think> Answer: 12", "stop"), question, 0, "f")
    cut = _graded(completion("</think> Answer: 12", "length"), question, 0, "f")
    assert (whole["grade"], whole["extracted"]) == ("right", "12")
    assert (cut["grade"], cut["extracted"], cut["finish_reason"]) == ("unparseable", None, "length")
