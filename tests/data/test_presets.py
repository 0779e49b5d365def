"""Published data sets: a look-alike of each, made up here, and what its rows mean, by hand."""

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dasd_lite.config.reading import FORMATS, Reading
from dasd_lite.data.formats.presets import PRESETS
from dasd_lite.data.formats.read import RowFiles
from dasd_lite.data.prompts import read_prompts
from dasd_lite.data.records import ROLLOUT
from dasd_lite.errors import DataError
from dasd_lite.grading.math import grade


@dataclass
class Case:
    """Rows of a set; what is read of them: per row the question, answers, reference, domain and uid; and the notes."""

    rows: list[dict[str, Any]]
    means: list[tuple[str, list[str], str | None, str | None, str | None]]
    notes: list[str] = field(default_factory=list)
    is_recognized: bool = False


def talk(question, answer, **info):
    return [{"role": "user", "content": question, **info}, {"role": "assistant", "content": answer}]


def share(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


T = "<think>\nIt is.\n</think>\n\n"
CASES = {
    "messages": Case([{"messages": talk("q", "a")}], [("q", ["a"], None, None, None)]),
    "sharegpt": Case([{"conversations": share("q", "a")}], [("q", ["a"], None, None, None)]),
    "alpaca": Case(
        [{"instruction": "Do.", "input": "x", "output": "a"}, {"instruction": "q", "input": "", "output": "b"}],
        [("Do.\n\nx", ["a"], None, None, None), ("q", ["b"], None, None, None)],
    ),
    "trl": Case(
        [{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}],
        [("q", ["a"], None, None, None)],
    ),
    "prompt-response": Case([{"prompt": "q", "response": "a"}], [("q", ["a"], None, None, None)]),
    "input-output": Case([{"input": "q", "output": "a"}], [("q", ["a"], None, None, None)]),
    "rollouts": Case(
        [
            {
                "uid": "r1",
                "prompt_uid": "q1",
                "messages": [{"role": "user", "content": "q"}],
                "domain": "math",
                "answer": "5",
                "index": 3,
                "completion": T + "5",
                "finish_reason": "stop",
                "prefix_bytes": 0,
                "token_ids": None,
                "logprobs": None,
                "token_bytes": None,
            }
        ],
        [("q", [T + "5"], "5", "math", "r1")],
        is_recognized=True,
    ),
    "verl": Case(
        [
            {
                "data_source": "gsm8k",
                "prompt": [{"role": "user", "content": "q"}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "72"},
                "extra_info": {"index": 0},
            }
        ],
        [("q", [], "72", "gsm8k", None)],
        ["ability, extra_info"],
        is_recognized=True,
    ),
    "dasd": Case(
        [
            {"uuid": "u1", "input": "q", "output": "<think>a</think>\nb", "domain": "science", "meta": "{}"},
            {"uuid": "u2", "input": "r", "output": "no end of thinking", "domain": "science", "meta": "{}"},
            {
                "uuid": "u3",
                "input": "s",
                "output": "<think>a</think><answer>b</answer>",
                "domain": "math",
                "meta": "{}",
            },
        ],
        [
            ("q", ["<think>a</think>\nb"], None, "science", "u1"),
            ("r", ["no end of thinking"], None, "science", "u2"),
            ("s", ["<think>a</think>b"], None, "math", "u3"),
        ],
        ["not read: meta", "<answer> became <think> or was removed in 1 answers"],
        is_recognized=True,
    ),
    "openthoughts": Case(
        [
            {"difficulty": 7, "source": "s", "domain": "math", "conversations": share("q", "<think>a</think> b")},
            {
                "system": "Be brief.",
                "domain": "code",
                "conversations": share(
                    "q", "<|begin_of_thought|>\na\n<|end_of_thought|>\n<|begin_of_solution|>\nb\n<|end_of_solution|>"
                ),
            },
        ],
        [
            ("q", ["<think>a</think> b"], None, "math", None),
            ("q", ["<think>\na\n</think>\n\nb"], None, "code", None),
        ],
        ["not read: difficulty (1 rows), source (1 rows)", "<|begin_of_thought|> became <think>"],
    ),
    "openr1-math": Case(
        [
            {
                "problem": "q",
                "solution": "s",
                "answer": "5",
                "problem_type": "Algebra",
                "uuid": "u",
                "is_reasoning_complete": [True, False, True],
                "generations": [T + "5", "<think>\nIt", T + "6"],
                "correctness_math_verify": [True, False, False],
                "finish_reasons": ["stop", "length", None],
                "messages": talk("q", T + "5"),
            }
        ],
        [("q", [T + "5", T + "6"], "5", None, "u")],
        ["not read: solution, problem_type, correctness_math_verify", "1 left out: is_reasoning_complete = false"],
        is_recognized=True,
    ),
    "am-deepseek-r1": Case(
        [
            {
                "messages": [
                    {"role": "user", "content": "q", "info": {"source": "x", "reference_answer": "5"}},
                    {
                        "role": "assistant",
                        "content": "<think>a</think> <answer>5</answer>",
                        "info": {"think_content": "a", "answer_content": "5"},
                    },
                ]
            },
            {"messages": [{"role": "user", "content": "r", "info": None}, {"role": "assistant", "content": "b"}]},
        ],
        [("q", ["<think>a</think> 5"], "5", None, None), ("r", ["b"], None, None, None)],
        ["not read: messages[assistant].info (1 rows), of 2 rows", "<answer> became"],
    ),
    "nemotron-post-training": Case(
        [
            {
                "uuid": "u",
                "license": "x",
                "generator": "g",
                "version": "v2",
                "category": "math",
                "reasoning": "on",
                "messages": talk("q", "<think>a</think>b"),
            }
        ],
        [("q", ["<think>a</think>b"], None, "math", "u")],
        ["not read: license, generator, version"],
        is_recognized=True,
    ),
    "nemotron-math": Case(
        [
            {
                "problem": "q",
                "expected_answer": "5",
                "uuid": "u",
                "tools": None,
                "messages": [
                    {"role": "user", "content": "Solve: q"},
                    {"role": "assistant", "reasoning_content": "It is.", "content": "5"},
                ],
            },
            {
                "problem": "q",
                "expected_answer": "5",
                "uuid": "v",
                "tools": [{"type": "function"}],
                "messages": [{"role": "user", "content": "Solve: q"}, {"role": "tool", "content": "5"}],
            },
        ],
        [("Solve: q", [T + "5"], "5", None, "u")],
        ["1 left out: tools is not ''"],
        is_recognized=True,
    ),
    "openmathreasoning": Case(
        [
            {
                "problem": "q",
                "generated_solution": "<think>a</think>5",
                "expected_answer": "5",
                "pass_rate_72b_tir": "n/a",
            }
        ],
        [("q", ["<think>a</think>5"], "5", None, None)],
        ["not read: pass_rate_72b_tir"],
        is_recognized=True,
    ),
    "acereason": Case(
        [{"category": "math", "source": "s", "input": "q", "output": "<think>a</think>5"}],
        [("q", ["<think>a</think>5"], None, "math", None)],
        ["not read: source"],
    ),
    "opencodereasoning": Case(
        [{"id": "i", "input": "q", "output": "<think>a</think>x = 1", "dataset": "taco", "solution": "x = 1"}],
        [("q", ["<think>a</think>x = 1"], None, None, "i")],
        ["not read: dataset, solution"],
        is_recognized=True,
    ),
    "deepmath": Case(
        [
            {
                "question": "q",
                "final_answer": "5",
                "difficulty": 5.5,
                "topic": "t",
                **{f"r1_solution_{i}": f"a{i}" for i in (1, 2, 3)},
            }
        ],
        [("q", ["a1", "a2", "a3"], "5", None, None)],
        ["not read: difficulty, topic"],
        is_recognized=True,
    ),
    "numinamath": Case(
        [
            {
                "problem": problem,
                "solution": "s",
                "answer": answer,
                "problem_type": "Algebra",
                "question_type": "math-word-problem",
                "problem_is_valid": valid,
            }
            for problem, answer, valid in (("q", "5", "Yes"), ("r", "proof", "Yes"), ("s", "7", "Incomplete"))
        ],
        [("q", [], "5", None, None), ("r", [], None, None, None)],
        ["not read: solution, problem_type, question_type", "1 left out: problem_is_valid is not 'Yes'"],
        is_recognized=True,
    ),
    "s1k": Case(
        [
            {"solution": solution, "question": "q", "cot": None, "thinking_trajectories": thought, "attempt": "5"}
            for thought, solution in (
                (["It is."], "5"),
                (["It is.", "Another."], "So $\\boxed{\\frac{1}{2}}$ is it."),
                (["It is."], "#### Part 1\n5 apples."),
                (["It is."], "It is 7.\n#### 7"),
            )
        ],
        [("q", [T + "5"], answer, None, None) for answer in ("5", "\\frac{1}{2}", "#### Part 1\n5 apples.", "7")],
        ["the reference is a solution in 2 rows", "not read: thinking_trajectories but for [0] (1 rows), of 4 rows"],
        is_recognized=True,
    ),
    "s1k-1.1": Case(
        [
            {
                "solution": "5",
                "question": "q",
                "gemini_thinking_trajectory": "It is.",
                "gemini_attempt": "5",
                "deepseek_thinking_trajectory": "It is.",
                "deepseek_attempt": "6",
                "deepseek_grade": "No",
            }
        ],
        [("q", [T + "5", T + "6"], "5", None, None)],
        ["not read: deepseek_grade"],
        is_recognized=True,
    ),
    "limo": Case([{"question": "q", "solution": "It is. 5", "answer": "5"}], [("q", ["It is. 5"], "5", None, None)]),
    "dolci-think": Case(
        [{"id": "i", "messages": talk("q", "<think>a</think>b"), "dataset_source": "s"}],
        [("q", ["<think>a</think>b"], None, None, "i")],
        ["not read: dataset_source"],
    ),
    "gsm8k": Case(
        [{"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"}],
        [("q", [], "2", None, None)],
        ["the reference is a solution in 1 rows; only the answer at its ####"],
    ),
    "livecodebench": Case(
        [
            {
                "question_title": "Echo",
                "question_content": "Say it again.",
                "platform": "atcoder",
                "question_id": "abc1_a",
                "starter_code": "",
                "public_test_cases": '[{"input": "1", "output": "1", "testtype": "stdin"}]',
                "private_test_cases": "eJxrYJmaxAABPYyJUwCUAQAx",
                "metadata": "{}",
            },
            {
                "question_title": "Twice",
                "question_content": "Double it.",
                "platform": "leetcode",
                "question_id": "1",
                "starter_code": "def twice(x: int) -> int:\n    ",
                "public_test_cases": '[{"input": "1", "output": "2", "testtype": "functional"}]',
                "private_test_cases": '[{"input": "2", "output": "4", "testtype": "functional"}]',
                "metadata": '{"func_name": "twice"}',
            },
        ],
        [
            (
                "Say it again.",
                [],
                '{"tests": [{"input": "1", "output": "1"}], "private": "eJxrYJmaxAABPYyJUwCUAQAx"}',
                None,
                "abc1_a",
            ),
            (
                "Double it.\n\n```python\ndef twice(x: int) -> int:\n```",
                [],
                '{"tests": [{"input": "1", "output": "2"}, {"input": "2", "output": "4"}], "function": "twice"}',
                None,
                "1",
            ),
        ],
        ["not read: question_title, platform"],
        is_recognized=True,
    ),
}
QUESTIONS_ONLY = {"verl", "numinamath", "gsm8k", "livecodebench"}


def read(path, name, *, answers=True):
    files = RowFiles([str(path)], Reading(format=name), answers=answers)
    rows = list(files)
    return rows, files.finish()


def test_every_format_has_a_case():
    assert set(FORMATS) == set(PRESETS) == set(CASES)


@pytest.mark.parametrize("container", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", CASES)
def test_a_look_alike_of_each_set(tmp_path, name, container):
    case, path = CASES[name], tmp_path / f"f.{container}"
    if container == "jsonl":
        path.write_text("\n".join(map(json.dumps, case.rows)))
    else:
        pq.write_table(pa.Table.from_pylist(case.rows, schema=ROLLOUT if name == "rollouts" else None), path)
    for format_name in [name, "auto"] if case.is_recognized else [name]:
        answers = name not in QUESTIONS_ONLY
        files = RowFiles([str(path)], Reading(format=format_name), answers=answers)
        rows = list(files)
        notes = "\n".join(files.finish())
        means = [
            (r.messages[-1]["content"], [a.completion for a in r.answers], r.answer, r.domain, r.uid) for r in rows
        ]
        assert means == case.means
        if container == "jsonl":
            for words in case.notes:
                assert words in notes
            for column in ("uuid", "output", "generations"):
                assert f"not read: {column}" not in notes
        assert (f"read as {name!r}" in notes) == (format_name == "auto")


@pytest.mark.parametrize("name", ["gsm8k", "auto"])
def test_a_right_answer_to_a_question_of_gsm8k_is_graded_right(tmp_path, name):
    path = tmp_path / "f.jsonl"
    solutions = ["2 + 2 = <<2+2=4>>4 apples.\nNot #### 3.\n#### 4", "It is.\n#### 1,234"]
    rows = [json.dumps({"question": f"q{n}", "answer": solution}) for n, solution in enumerate(solutions)]
    path.write_text("\n".join(rows))
    four, many = (prompt.answer for prompt in read_prompts(path, format=name))
    assert grade(r"<think>a</think>It is \boxed{4}.", four).verdict == "right"
    assert grade(r"<think>a</think>It is \boxed{3}.", four).verdict == "wrong"
    assert grade(r"<think>a</think>It is \boxed{1234}.", many).verdict == "right"


def test_a_solution_of_gsm8k_without_its_mark_is_a_fault(tmp_path):
    path = tmp_path / "f.jsonl"
    for answer in ("4", "It is 4.\n####"):
        path.write_text(json.dumps({"question": "q", "answer": answer}))
        with pytest.raises(DataError, match=r"f\.jsonl:1: answer = '.*4.*'; in this format the answer follows a last"):
            read(path, "gsm8k", answers=False)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("4", "4"),
        ("#### 4", "4"),
        ("x = 1\n#### the end\ny = 2", "x = 1\n#### the end\ny = 2"),
        (r"\boxed{4}", r"\boxed{4}"),
        ("It is 4.\n#### 4\n", "4"),
    ],
)
def test_a_reference_that_is_found_by_its_name_is_cut_only_if_its_last_line_marks_the_answer(tmp_path, answer, right):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": answer}))
    files = RowFiles([str(path)], Reading(), answers=False)
    assert [row.answer for row in files] == [right]
    assert len(files.finish()) == (answer != right), "it is said"
    files = RowFiles([str(path)], Reading(columns={"answer": "answer"}), answers=False)
    assert [row.answer for row in files] == [answer], "as the user's own map has it"


def test_the_system_message_of_openthoughts_is_read(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(CASES["openthoughts"].rows[1]))
    ((row,), _) = read(path, "openthoughts")
    assert row.messages[0] == {"role": "system", "content": "Be brief."}


def test_the_prompt_of_a_run_s_own_rollouts_keeps_its_name(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(CASES["rollouts"].rows[0]))
    ((row,), _) = read(path, "rollouts")
    assert (row.prompt_uid, row.uid) == ("q1", "r1")
