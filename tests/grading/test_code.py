"""Code in answers: where it stands, the tests of a task, and when an output passes one."""

import base64
import json
import os
import pickle
import re
import sys
import tracemalloc
import zlib

import pytest

from dasd_lite.data.references import Tests as TaskTests
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.grading.code import extract, fault, grade
from dasd_lite.grading.code.private_tests import unpack
from dasd_lite.grading.code.sandbox import open_sandbox
from dasd_lite.grading.code.tests import prints_the_same, read_task, returns_the_same

TaskTests.__test__ = False  # pytest would take it for a class of tests


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("First:\n```\na\n```\nBetter:\n```py\nb\nc\n```\nDone.", "b\nc"),
        ("- in a list\n  ```python\n  a\n    b\n\n  ```", "a\n  b\n"),
        ("1. ```python\n   a\n   ```", "a"),
        ("    ```python\nif a:\n  b\n    ```", "if a:\n  b"),
        ("~~~python\na = ~~~b\n~~~", "a = ~~~b"),
        ("````\n```\na\n```\n````", "```\na\n```"),
        ("```python\nprint(1)```\nDone.", "print(1)"),
        ("Code: ```python\na\n```", "a"),
        ("```python\na\n```\nIt uses ```print``` once, and ```b```.", "a"),
        ("```python\na\n```\nOutput:\n```\n5\n```", "a"),
        ("```Python3 title=x\na\n```\nRun:\n```bash\npython a.py\n```", "a"),
        ("```\na\n```\nOutput:\n```text\n5\n```", "a"),
        ("```output\n5\n```", None),
        ("```python\na\n```\nBetter:\n```python\nb", "a"),
        ("```\na\n```\nBetter:\n```\nb", "a"),
        ("```python\nthis is how it beg\n\n```python\na\n```", "a"),
        (
            '```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```',
            'def f():\n    """\n    ```\n    f()\n    ```\n    """',
        ),
        ("```python\ns = '```' + '```'\nt = '```python'\n```", "s = '```' + '```'\nt = '```python'"),
        ("```python\na\n```<|im_end|>", "a"),
        ("```python\na\n```</s>", "a"),
        ("```python\na # \ud800\n```", "a # ?"),
        ("```\n\nx = 1\n\n```", "\nx = 1\n"),
        ("```python\na\n```\nand `b` in a line", "a"),
        ("", None),
        ("print(1)", None),
        ("```python\nprint(1)", None),
        ("```python\n\n```", None),
        ("<think>\n```python\na\n```", None),
        ("<think>\n```python\na\n```\n</think>\nI do not know.", None),
    ],
)
def test_where_the_code_stands(completion, code):
    assert extract(completion) == code


TAGGED = ["print('</think>')", "print(1, '<think>')", "print('<analysis>', '[/THINK]', '[think]', '◁think▷')"]
TAGGED += ["print('<|end|>')", "print('a</s>', '<|channel|>analysis<|message|>')"]
BEFORE = {
    "no thinking": "",
    "a thinking": "<think>\nHm.\n</think>\n",
    "a thinking begun by the prompt": "Hm.</think>",
    "code in the thinking": "<think>\nMaybe\n```python\nprint('<think>', '</think>')\n```\nno.\n</think>\n",
    "a block never closed in the thinking": "<think>\n```\nThat is\n</think>\n",
    "a marked block never closed in the thinking": "<think>\n```python\nThat is\n</think>\n",
    "gpt-oss": "<|channel|>analysis<|message|>```python\nthought\n```<|end|><|start|>assistant"
    "<|channel|>final<|message|>",
}


@pytest.mark.parametrize("code", TAGGED)
@pytest.mark.parametrize("before", BEFORE.values(), ids=list(BEFORE))
def test_tags_in_a_program_begin_and_end_no_thinking(before, code):
    assert extract(f"{before}Here:\n```python\nx = 1\n    {code}\n```\nDone.") == f"x = 1\n    {code}"


def test_code_in_a_thinking_that_never_ends_is_none():
    for opened in ("<think>", "[THINK]", "<|channel|>analysis<|message|>"):
        assert extract(f"{opened}\nMaybe\n```python\nprint('</think>', '<|channel|>final<|message|>')\n```\nor") is None


@pytest.mark.parametrize("piece", ["```\n", "```python\n", "`", "~", " ", "a``` ", "```<", "- ", "\n"])
def test_code_is_found_in_linear_time(piece):
    assert extract(piece * 100_000) is None


@pytest.mark.parametrize(
    ("printed", "wanted", "same"),
    [
        ("1\n", "1", True),
        ("\n 1 \n2 \n\n", "1\n2", True),
        ("1\r\n2\r\n", "1\n2", True),
        ("0.50", "0.5", True),
        ("1e2 3", "100 3.0", True),
        ("1  2", "1 2", True),
        ("yes", "yes", True),
        ("", "", True),
        ("1", "2", False),
        ("1\n\n2", "1\n2", False),
        ("0.333", "0.3333", False),
        ("0.1", "0.10000000000000000001", False),
        ("YES", "yes", False),
        ("a  b", "a b", False),
        ("1 2", "1 2 3", False),
        ("nan", "nan", True),  # equal as text
        ("nan 1.0", "nan 1", False),
        ("snan 1.0", "snan 1", False),
        ("1e999999999", "1", False),
        ("", "0", False),
    ],
)
def test_outputs_are_equal_line_by_line_as_text_or_as_decimals(printed, wanted, same):
    assert prints_the_same(printed, wanted) is same


@pytest.mark.parametrize(
    ("result", "wanted", "same"),
    [
        (b"[1, [2]]", "[1,[2]]", True),
        (b"1.0", "1", True),
        (b"true", "1", True),  # as Python compares, and public graders with it
        (b'{"a": 1}', '{ "a": 1 }', True),
        (b"1", '"1"', False),
        (b"NaN", "NaN", False),
        (b"", "1", False),
        (b"1 1", "1", False),
        (b"\xff", "1", False),
        (b"[" * 100_000, "1", False),
        (b"9" * 5000, "1", False),
    ],
)
def test_results_are_equal_as_json_values(result, wanted, same):
    assert returns_the_same(result, wanted) is same


def test_no_tolerance_and_linear_time_on_large_outputs():
    lines = "\n".join(f"{number}.0" for number in range(200_000))
    assert prints_the_same(lines, lines.replace(".0", ""))


# Private tests.

ROWS = [{"input": "1", "output": "2", "testtype": "stdin"}, {"input": "3", "output": "4", "testtype": "stdin"}]


def packed_bytes(pickled):
    return base64.b64encode(zlib.compress(pickled)).decode()


def packed(value, protocol=4):
    return packed_bytes(pickle.dumps(value, protocol))


@pytest.mark.parametrize("protocol", range(6))
def test_private_tests_are_unpacked(protocol):
    assert unpack(packed(json.dumps(ROWS), protocol)) == ROWS
    assert unpack(json.dumps(ROWS)) == ROWS


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/dasd-lite-escape",)


class Listed:
    def __reduce__(self):
        return eval, ("'[]'",)


@pytest.mark.parametrize("evil", [Evil(), [Evil()], Listed(), {"a": Listed()}, len, re.compile("a")])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_would_run_code_is_refused(evil, protocol):
    with pytest.raises(ValueError, match=r"are not a pickled text \([A-Z_]+ in it\)"):
        unpack(packed(evil, protocol))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%", "are neither JSON nor base64"),
        ("[1", "are not JSON"),
        ("AAAA", "are not compressed by zlib"),
        (base64.b64encode(zlib.compress(b"x" * 1000)[:-6]).decode(), r"are not compressed by zlib \(cut off\)"),
        (base64.b64encode(zlib.compress(b"junk")).decode(), "are not a pickled text"),
        (base64.b64encode(zlib.compress(b"")).decode(), "are not a pickled text"),
        (packed([1]), r"are not a pickled text \(EMPTY_LIST in it\)"),
        (packed(("[]", "x")), r"are not a pickled text \(SHORT_BINUNICODE in it\)"),
        (packed_bytes(b"P[]\n[]\n."), r"are not a pickled text \(PERSID in it\)"),
        (packed_bytes(pickle.dumps("[]") + b"."), "are not a pickled text"),
        (base64.b64encode(zlib.compress(pickle.dumps("[]")) + b"x").decode(), r"by zlib \(more follows\)"),
        (packed("{"), "are not JSON"),
        (packed("[" * 100_000), "are not JSON"),
        (packed("a" * (2 << 20)), "have more than 1048576 bytes"),
    ],
)
def test_what_is_wrong_with_private_tests_is_said_by_layer(text, message):
    with pytest.raises(ValueError, match=message):
        unpack(text, largest=1 << 20)


@pytest.mark.parametrize(
    "pickled",
    [
        b"]r\xff\xff\xff\x0f.",  # a place in a memory of 2 GB
        b"]r\xff\xff\xff\x7f.",
        b"\x8e" + (1 << 52).to_bytes(8, "little") + b".",  # bytes that are not there
        b"\x8d" + (1 << 52).to_bytes(8, "little") + b".",
        b"X\xff\xff\xff\x7f.",
        b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b".",
    ],
)
def test_a_short_pickle_cannot_ask_for_much_memory(pickled):
    tracemalloc.start()
    with pytest.raises(ValueError, match="are not a pickled text"):
        unpack(packed_bytes(pickled))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_no_pickle_of_junk_raises_anything_else():
    for first in range(256):
        for rest in (b"", b".", b"\0", b"\xff" * 9):
            with pytest.raises(ValueError, match="are "):
                unpack(base64.b64encode(zlib.compress(bytes([first]) + rest)).decode())


# References.


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (TaskTests((("1", "2"),)).encode(), None),
        (TaskTests((("1\n[2]", "null"),), "f").encode(), None),
        (TaskTests((), private=packed(json.dumps(ROWS))).encode(), None),
        ('{"tests": [{', "its tests are not JSON"),
        ('{"tests": 3}', "its tests must be a list of objects with `input` and `output`"),
        ('{"tests": [3]}', "its tests must be a list of objects"),
        ('{"tests": [{"input": "1"}]}', "its tests must be a list of objects"),
        ('{"tests": [{"input": "1", "output": 2}]}', "its test 1 has int as `output`; use text"),
        ('{"tests": [{"input": "1", "output": null}]}', "its test 1 has no `output`; use text"),
        ('{"tests": []}', "its list of tests is empty"),
        ('{"tests": [], "private": "%"}', "its private tests are neither JSON nor base64"),
        ('{"tests": [], "private": 3}', "its `private` is int; it must be text"),
        ('{"tests": [], "private": "[3]"}', "its private tests must be a list of objects"),
        ('{"tests": [], "private": "[{}]"}', "its private test 1 has no `input`; use text"),
        ('{"tests": [{"input": "", "output": ""}], "function": "f g"}', "its `function` is 'f g'; it must be the name"),
        ('{"tests": [{"input": "", "output": ""}], "function": 3}', "its `function` is 3; it must be the name"),
        (
            '{"tests": [{"input": "1 2", "output": "1"}], "function": "f"}',
            "its test 1 has an argument that is not JSON",
        ),
        (
            '{"tests": [{"input": "1", "output": "x"}], "function": "f"}',
            "its test 1 has an output that is not JSON: 'x'",
        ),
        (
            TaskTests((), "f", json.dumps(ROWS)).encode(),
            "its private test 1 has the type 'stdin'; the others",
        ),
    ],
)
def test_a_fault_of_the_tests_is_half_a_sentence(reference, message):
    found = fault(reference)
    assert found == message if message is None else found.startswith(message), found
    assert "\n" not in (found or "")


def test_public_tests_come_first_and_then_the_private_ones():
    task = read_task(TaskTests((("0", "1"),), private=packed(json.dumps(ROWS))).encode())
    assert [test.given for test in task.tests] == ["0", "1", "3"]


def test_empty_lines_between_arguments_are_none():
    assert read_task(TaskTests((("1\n\n[2]\n", "3"),), "f").encode()).tests[0].arguments == ["1", "[2]"]


# The whole.


@pytest.fixture
def sandbox():
    try:
        return open_sandbox()
    except ConfigError as error:
        if sys.platform == "linux":
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("code", "verdict", "reason"),
    [
        ("print(int(input()) + 1)", "right", None),
        ("print(2)", "wrong", "test 2 of 3: wrong output"),
        ("print(1)", "wrong", "test 1 of 3: wrong output"),
        ("n = int(input())\nprint(n + 1 if n < 4 else {}[n])", "wrong", "test 3 of 3: KeyError: 5"),
        ("print('x' * 3_000_000)", "wrong", "test 1 of 3: output limit"),
    ],
)  # fmt: skip
def test_a_program_is_graded_up_to_the_first_test_that_fails(sandbox, code, verdict, reason):
    reference = TaskTests((("1", "2"), ("3", "4"), ("5", "6"))).encode()
    graded = grade(f"Here:\n```python\n{code}\n```\n", reference)
    assert (graded.verdict, graded.extracted, graded.reason) == (verdict, code, reason)


def test_a_function_is_graded(sandbox):
    reference = TaskTests((("[1, 2]\n3", "[[1, 2], 3]"),), "pair").encode()
    right = "class Solution:\n    def pair(self, a: List[int], b: int):\n        print('talk')\n        return a, b"
    assert grade(f"```\n{right}\n```", reference).verdict == "right"
    assert grade(f"```\n{right} # \ud800\n```", reference).verdict == "right"
    wrong = grade(f"```\n{right.replace('a, b', 'b, a').replace('b, a: List[int], b', 'a, b')}\n```", reference)
    assert wrong.verdict == "wrong"


def test_no_code_is_no_answer_and_bad_tests_are_an_error(sandbox):
    assert grade("I cannot.", TaskTests((("1", "2"),)).encode()).verdict == "no_answer"
    with pytest.raises(DataError, match="a programming task cannot be graded: its list of tests is empty"):
        grade("```\nprint(1)\n```", TaskTests(()).encode())
