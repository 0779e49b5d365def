"""Graders by name and of one's own; what a stage makes of a grade."""

import importlib
import sys
import threading
from functools import partial

import pytest

from dasd_lite.config.extensions import code_hash
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.grading import CheckedGrader, grade_answer, open_grader
from dasd_lite.grading.grade import Grade

# --- graders of one's own -----------------------------------------------------------------------------


MY_GRADERS = """
import functools
from dasd_lite import Grade

def last_line(completion, answer):
    said = completion.splitlines()[-1]
    return Grade("right" if said == answer else "wrong", said)

class Contains:
    def __call__(self, completion, answer):
        return Grade("right" if answer in completion else "unparseable", None)

contains = Contains()
three = lambda completion, answer, language: None
number = 3
in_english = functools.partial(three, language="en")
english, german = Contains(), Contains()
english.language, german.language = "en", "de"
"""


@pytest.fixture
def my_graders(tmp_path, monkeypatch):
    """A module outside of the package."""
    (tmp_path / "my_graders.py").write_text(MY_GRADERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("my_graders")
    del sys.modules["my_graders"]


def test_a_grader_from_another_file(my_graders):
    grader = open_grader("my_graders:last_line")
    assert grader("I think\n5", "5") == Grade("right", "5")
    assert grader("I think\n5", "6") == Grade("wrong", "5")
    assert grader == open_grader(my_graders.last_line), "named in a recipe or passed as a function"
    assert (grader.name, grader.code) == ("my_graders:last_line", code_hash(my_graders.last_line))


def test_a_grader_may_be_an_object(my_graders):
    grader = open_grader("my_graders:contains")
    assert grader("It is 5.", "5") == Grade("right", None)
    assert grader("It is 6.", "5") == Grade("unparseable", None)


def test_what_a_grader_was_made_with_is_part_of_its_code(my_graders):
    first, second = open_grader("my_graders:english"), open_grader("my_graders:german")
    assert (first.name, second.name) == ("my_graders:english", "my_graders:german")
    assert first.code != second.code == open_grader(my_graders.german).code
    assert open_grader(partial(my_graders.three, language="de")).code != open_grader(my_graders.in_english).code


def test_a_built_in_grader_is_known_by_its_name():
    grader = open_grader("math")
    assert (grader.name, grader.is_own) == ("math", False)
    assert grader("Answer: 0.5", "1/2") == Grade("right", "0.5")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "algebra",
            r"evaluate.grader = 'algebra': use 'auto', 'math', 'choice', 'code', or package.module:attribute",
        ),
        (
            "my_graders",
            r"evaluate.grader = 'my_graders': use 'auto', 'math', 'choice', 'code', or package.module:attribute",
        ),
        ("gone_module:grade", r"evaluate.grader = 'gone_module:grade': the grader cannot be imported"),
        ("my_graders:gone", r"evaluate.grader = 'my_graders:gone': module 'my_graders' has no attribute 'gone'"),
        ("my_graders:number", r"a grader is called with \(completion, answer\)"),
        ("my_graders:Contains", r"my_graders:Contains is a class; a grader is an instance or a function"),
        ("my_graders:three", r"\(completion, answer, language\) cannot be a grader"),
    ],
)
def test_what_is_not_a_grader_is_refused(my_graders, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_grader(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "returned",
    [
        True,
        None,
        "right",
        1.0,
        ("right", "5"),
        Grade("correct", "5"),
        Grade("right", "\ud800"),
        Grade(True, None),
        Grade("right", 5),
        "a\nb" * 99,
    ],
)
def test_a_grader_that_returns_anything_but_a_grade_is_named(returned):
    def mine(completion, answer):
        return returned

    with pytest.raises(DataError, match=r"^grader .*mine returned .*; it must return Grade\(verdict, ") as caught:
        open_grader(mine)("5", "5")
    assert repr(returned)[:20] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_exception_in_a_grader_is_one_line_with_its_place():
    def mine(completion, answer):
        return int(completion) == int(answer)

    with pytest.raises(
        DataError, match=r"mine failed: ValueError: invalid literal .* \(\S+test_grading\.py:\d+\)$"
    ) as error:
        open_grader(mine)("five", "5")
    assert "\n" not in str(error.value)


def test_a_grader_that_hangs_is_given_up_and_named():
    grader = CheckedGrader(lambda completion, answer: threading.Event().wait(), "mine:waits", "", True, seconds=0.01)
    for _ in range(3):
        grade = grader("It is 5.", "5")
        assert grade == Grade("unknown", None, "the grader did not return within 0.01 s")
    with pytest.raises(DataError, match=r"^grader mine:waits did not return within 0.01 s on 4 answers; give it"):
        grader("It is 6.", "5")


def test_a_grader_that_exits_is_an_error():
    grader = CheckedGrader(lambda completion, answer: sys.exit(0), "mine:exits", "", True)
    with pytest.raises(DataError, match=r"^grader mine:exits called sys.exit\(0\); it must return$"):
        grader("5", "5")


def test_an_exception_in_a_grader_of_ours_stays_a_traceback():
    with pytest.raises(ZeroDivisionError):
        CheckedGrader(lambda completion, answer: 1 / 0, "math", "")("5", "5")


# --- one answer ---------------------------------------------------------------------------------------


def test_one_answer_is_graded_by_the_kind_of_its_reference():
    assert grade_answer(r"<think>9</think> \boxed{0.5}", r"\frac12") == Grade("right", "0.5")
    assert grade_answer("Answer: (B)", "B") == Grade("right", "B")
    assert grade_answer("Answer: B", "7").verdict == "wrong"
    with pytest.raises(DataError, match=r"answer = ' ': "):
        grade_answer("Answer: B", " ")
