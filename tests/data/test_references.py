"""Rows with options or tests: what becomes the reference, what is added to the question, and what is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dasd_lite.data import references
from dasd_lite.data.choices import options_block, shuffled, with_order
from dasd_lite.data.prompts import read_prompts
from dasd_lite.errors import DataError
from dasd_lite.grading.choice import grade


@pytest.fixture
def read(tmp_path):
    """`read(row, …, columns={…})` → the prompts of a file with these rows."""

    def reader(*rows, **options):
        path = tmp_path / "f.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return list(read_prompts(path, **options))

    return reader


@pytest.fixture
def fault(read, tmp_path):
    """`fault(row)` → what is wrong with it, without its place."""

    def refused(row, **options):
        with pytest.raises(DataError) as error:
            read(row, **options)
        (line,) = str(error.value).splitlines()
        assert line.startswith(f"{tmp_path}/f.jsonl:1: ")
        return line.removeprefix(f"{tmp_path}/f.jsonl:1: ")

    return refused


COLORS = ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (COLORS, "B"),
        (COLORS, "b"),
        (COLORS, "(B)"),
        (COLORS, "B."),
        (COLORS, 1),
        (COLORS, "1"),
        (COLORS, "green"),
        (COLORS, " green "),
        ({"A": "red", "B": "green", "C": "blue"}, "B"),
        ({"A": "red", "B": "green", "C": "blue", "D": None}, "green"),
        ({"text": COLORS, "label": ["A", "B", "C"]}, "B"),
        ({"text": COLORS, "label": ["1", "2", "3"]}, "2"),
        ('["red", "green", "blue"]', "B"),
        ('{"A": "red", "B": "green", "C": "blue"}', "green"),
    ],
)
def test_options_of_a_row_in_each_form(read, choices, answer):
    (prompt,) = read({"question": "Which color?", "choices": choices, "answer": answer})
    assert prompt.messages[-1]["content"] == "Which color?\n\nA) red\nB) green\nC) blue"
    assert references.read_choices(prompt.answer) == references.Choices(("red", "green", "blue"), 1)
    assert grade(r"\boxed{B}", prompt.answer).verdict == "right"
    turned = with_order(prompt, shuffled(references.read_choices(prompt.answer), prompt.key, 1, 0))
    assert turned.messages[-1]["content"].endswith(options_block(references.read_choices(turned.answer).options))


def test_options_by_another_name_and_by_a_map(read):
    (prompt,) = read({"question": "q", "options": COLORS, "answer": "A", "answer_index": 0})
    assert references.read_choices(prompt.answer).right == 0
    (prompt,) = read(
        {"q": "q", "mc": {"opts": COLORS}, "gold": 2}, columns={"prompt": "q", "choices": "mc.opts", "answer": "gold"}
    )
    assert references.read_choices(prompt.answer).right == 2
    (prompt,) = read({"question": "q", "choices": [1, 2.5], "answer": "2.5"})
    assert references.read_choices(prompt.answer).options == ("1", "2.5")


def test_options_that_the_question_ends_with_are_not_written_twice(read):
    text = "q" + options_block(tuple(COLORS))
    (prompt,) = read({"messages": [{"role": "user", "content": text}], "choices": COLORS, "answer": "A"})
    assert prompt.messages[-1]["content"] == text


def test_a_question_with_options_needs_no_answer_to_be_asked(read):
    (prompt,) = read({"question": "q", "choices": COLORS})
    assert prompt.messages[-1]["content"].endswith("\nC) blue")
    assert prompt.answer is None


def test_options_from_parquet(tmp_path):
    path = tmp_path / "f.parquet"
    rows = [{"question": "q", "choices": {"text": COLORS, "label": ["A", "B", "C"]}, "answer": "C"}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    (prompt,) = read_prompts(path)
    assert references.read_choices(prompt.answer).right == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"choices": COLORS, "answer": "D"},
            "answer = 'D', which is none of the options A) red, B) green, C) blue; give",
        ),
        ({"choices": COLORS, "answer": 3}, "answer = 3, which is none of the options"),
        ({"choices": COLORS, "answer": "yellow"}, "answer = 'yellow', which is none of the options"),
        ({"choices": COLORS, "answer": True}, "answer = True, which is none of the options"),
        ({"choices": ["1", "2", "3"], "answer": "2"}, "answer = '2', which may be two of the options A) 1, B) 2, C) 3"),
        ({"choices": ["B", "A"], "answer": "A"}, "answer = 'A', which may be two of the options"),
        ({"choices": ["x", "x"], "answer": "x"}, "answer = 'x', which may be two of the options"),
        ({"choices": ["x"], "answer": "A"}, "choices has 1 options; it must have 2 to 26"),
        ({"choices": ["x"] * 27, "answer": "A"}, "choices has 27 options; it must have 2 to 26"),
        ({"choices": "red, green", "answer": "A"}, "choices = 'red, green'; it must be a list or an object, or one as"),
        ({"choices": 5, "answer": "A"}, "choices = 5; it must be a list of options, or an object letter → option"),
        ({"choices": ["x", {"text": "y"}], "answer": "A"}, "choices[1] = {'text': 'y'}; an option must be text"),
        ({"choices": ["x", ""], "answer": "A"}, "choices[1] = ''; an option must be text"),
    ],
)
def test_options_that_cannot_be_read_are_one_line(fault, row, message):
    assert fault({"question": "q", **row}).startswith(message)


# --- tests --------------------------------------------------------------------------------------------------

PAIR = {"input": "1", "output": "2"}


@pytest.mark.parametrize(
    ("tests", "pairs", "function"),
    [
        ([PAIR], [("1", "2")], None),
        ([{**PAIR, "testtype": "stdin"}], [("1", "2")], None),
        (json.dumps([PAIR]), [("1", "2")], None),
        ({"inputs": ["1", "3"], "outputs": ["2", "4"]}, [("1", "2"), ("3", "4")], None),
        ({"inputs": [["1", "2"]], "outputs": [["3"]]}, [("1\n2", "3")], None),
        (json.dumps({"inputs": ["1"], "outputs": ["2"]}), [("1", "2")], None),
        ({"fn_name": "f", "inputs": [[1, "a"]], "outputs": [[3]]}, [('1\n"a"', "3")], "f"),
        ({"fn_name": "f", "inputs": [[[1, 2]]], "outputs": [[1, 2]]}, [("[1, 2]", "[1, 2]")], "f"),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [True]}, [("1", "true")], "f"),
        ({"fn_name": "f", "inputs": ["1\n[2]"], "outputs": ["[3]"]}, [("1\n[2]", "[3]")], "f"),
    ],
)
def test_tests_of_a_row_in_each_form(read, tests, pairs, function):
    (prompt,) = read({"prompt": "Write it.", "tests": tests})
    assert prompt.messages[-1]["content"] == "Write it."
    assert references.kind_of(prompt.answer) == "code"
    assert references.read_tests(prompt.answer) == references.Tests(tuple(pairs), function)


def test_tests_take_the_place_of_a_reference_answer(read, capsys):
    (prompt,) = read({"prompt": "Write it.", "tests": [PAIR], "answer": "print(2)"})
    assert references.kind_of(prompt.answer) == "code"
    assert "not read: answer beside tests" in " ".join(capsys.readouterr().err.split())


def test_code_to_begin_with_is_part_of_the_question(read):
    (prompt,) = read({"prompt": "Write it.", "tests": [PAIR], "starter_code": "def f(x):\n"})
    assert prompt.messages[-1]["content"] == "Write it.\n\n```python\ndef f(x):\n```"


def test_tests_of_verl_and_of_a_map(read):
    row = {
        "data_source": "taco",
        "prompt": [{"role": "user", "content": "Write it."}],
        "reward_model": {"style": "rule", "ground_truth": json.dumps({"inputs": ["1"], "outputs": ["2"]})},
    }
    (prompt,) = read(row)
    assert references.read_tests(prompt.answer).tests == (("1", "2"),)
    (prompt,) = read({**row, "reward_model": json.dumps(row["reward_model"])})
    assert references.read_tests(prompt.answer).tests == (("1", "2"),), "a path goes through JSON in a text"
    columns = {"prompt": "question", "tests": "input_output", "function": "meta.fn"}
    (prompt,) = read({"question": "q", "input_output": json.dumps([PAIR]), "meta": {"fn": "g"}}, columns=columns)
    assert references.read_tests(prompt.answer).function == "g"


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("assert f(1) == 2", "tests = 'assert f(1) == 2'; it must be a list or an object, or one as JSON"),
        ([{"in": "1", "out": "2"}], "tests[0] = {'in': '1', 'out': '2'}; it must be an object with the texts `input`"),
        ([{"input": 1, "output": 2}], "tests[0] = {'input': 1, 'output': 2}; it must be an object with the texts"),
        (["assert f(1) == 2"], "tests[0] = 'assert f(1) == 2'; it must be an object with the texts"),
        ({"inputs": ["1"], "outputs": []}, "tests must have as many `inputs` as `outputs`, each a list"),
        ({"inputs": ["1"]}, "tests must have as many `inputs` as `outputs`, each a list"),
        ({"inputs": [1], "outputs": ["1"]}, "tests: 1 is read or printed by a program; it must be text, or a list of"),
        ({"fn_name": "f", "inputs": [1], "outputs": [1]}, "tests: 1 must be a list of arguments"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": [1]}, "tests: 1 must be JSON in a text, as its input is"),
        ({"cases": []}, "tests = {'cases': []}; it must be a list of"),
        ("7", "tests = 7; it must be a list of"),
        ("[" * 5000, "tests: brackets are nested more than a thousand deep"),
    ],
)
def test_tests_that_cannot_be_read_are_one_line(fault, tests, message):
    assert fault({"prompt": "q", "tests": tests}).startswith(message)


def test_a_column_of_tests_may_be_passed_over(read):
    (prompt,) = read({"prompt": "q", "tests": "assert f(1) == 2", "answer": "5"}, columns={"ignore": ["tests"]})
    assert prompt.answer == "5"
