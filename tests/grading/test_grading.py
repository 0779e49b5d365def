"""Graders by name and of one's own; what a stage makes of a grade."""

import importlib
import sys
from functools import partial

import pytest

from dasd_lite.config.extensions import code_hash
from dasd_lite.data.records import Prompt
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.grading import CheckedGrader, open_grader
from dasd_lite.grading.grade import Grade
from dasd_lite.grading.math import grade
from dasd_lite.stages.evaluate import _graded


def test_an_answer_that_was_cut_off_is_never_right():
    """`Answer: 12` may be the beginning of `Answer: 123`."""
    question = Prompt("q", ({"role": "user", "content": "?"},), "all", "12")
    whole = _graded("</think> Answer: 12", "stop", question, grade)
    cut = _graded("</think> Answer: 12", "length", question, grade)
    assert whole == {"grade": "right", "extracted": "12", "reason": None, "vote": "right"}
    assert cut == {"grade": "no_answer", "extracted": None, "reason": None, "vote": None}


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
    question = Prompt("q", ({"role": "user", "content": "?"},), "all", "5")
    assert _graded("I think\n5", "stop", question, grader) == {
        "grade": "right",
        "extracted": "5",
        "reason": None,
        "vote": "right",
    }


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
    assert (grader.name, grader.code) == ("math", None)
    assert grader("Answer: 0.5", "1/2") == Grade("right", "0.5")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("algebra", r"evaluate.grader = 'algebra': use 'math', or package.module:attribute"),
        ("my_graders", r"evaluate.grader = 'my_graders': use 'math', or package.module:attribute"),
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


def test_an_exception_in_a_grader_of_ours_stays_a_traceback():
    with pytest.raises(ZeroDivisionError):
        CheckedGrader(lambda completion, answer: 1 / 0, "math")("5", "5")
