"""Which of the student's answers the teacher finishes: cut off, or finished and wrong."""

import pytest
from tests.rows import write_kept

from dasd_lite.config.models import Transformers
from dasd_lite.data.records import KEPT
from dasd_lite.errors import DataError
from dasd_lite.grading import open_grader
from dasd_lite.report.summary import summary
from dasd_lite.stages import mix

QUESTION = "A dial shows 9. Turns: Cid up 3, Dan down 1, Eve down 4. What does it show?"
ANSWERS = [
    ("right", "<think> So 7.</think>\nAnswer: 7", "stop", "7"),
    ("wrong", "<think> So 8.</think>\nAnswer: 8", "stop", "7"),
    ("without an answer", "<think> So 7.</think>\nWell.", "stop", "7"),
    ("unknown", "<think> So 7.</think>\nAnswer: 7", "stop", None),
    ("cut off", "<think> So 7.</think>\nAnswer: 8", "length", "7"),
    ("cut off, unknown", "<think> So", "length", None),
    ("called", "<think> So 8.</think>\nAnswer: 8", "tool_calls", "7"),
]


def answers():
    names = ("uid", "completion", "finish_reason", "answer")
    return [dict(zip(names, row, strict=True)) for row in ANSWERS]


def test_the_kinds_of_answers_that_can_be_rescued():
    grade = open_grader("math")
    cut_off, counts = mix.to_rescue(answers(), "cut_off", None)
    assert [row["uid"] for row in cut_off] == ["cut off", "cut off, unknown"]
    assert counts == {"cut_off": 2}
    wrong, counts = mix.to_rescue(answers(), "wrong", grade)
    assert [row["uid"] for row in wrong] == ["wrong", "without an answer"]
    assert [row["completion"] for row in wrong] == ["<think> So 8.", "<think> So 7."], "only the thinking"
    assert counts == {"cut_off": 2, "wrong": 2, "ungraded": 1}
    either, same = mix.to_rescue(answers(), "either", grade)
    assert [row["uid"] for row in either] == [row["uid"] for row in [*cut_off, *wrong]]
    assert same == counts
    assert either[0]["completion"] == ANSWERS[4][1], "the paper cuts an answer that was cut off anywhere"


@pytest.fixture
def run(tmp_path, demo):
    """`run(rescue)` mixes three questions on the demo's models; the second has no answer."""
    from dasd_lite.chat.chat import Chat

    chat = Chat(demo / "student")
    rows = []
    for number, answer in enumerate(["99", None, "99"]):
        messages = [{"role": "user", "content": QUESTION.replace("9", str(number))}]
        ids, num_context = chat.example(messages, "<think> " + "Cid up 3 from 9 is 2. " * 12 + "</think>\nAnswer: 7")
        row = {"uid": f"k{number}", "prompt_uid": f"q{number}", "messages": messages, "answer": answer}
        rows.append(row | {"ids": ids.tolist(), "num_context_tokens": num_context})
    kept = write_kept(tmp_path / "select", rows, KEPT)

    def mixed(rescue, ratio=1.0):
        return mix.mix(
            kept,
            demo / "student",
            Transformers(model=str(demo / "teacher")),
            out=tmp_path / f"{rescue}{ratio}",
            rescue=rescue,
            max_length_ratio=ratio,
            max_tokens=64,
        )

    return mixed


def test_wrong_answers_are_finished_by_the_teacher(run, capsys):
    rollouts = run("wrong")
    rows = rollouts.to_table().to_pylist()
    counts = rollouts.counts
    assert {row["prompt_uid"] for row in rows} == {"q0", "q2"}
    assert {name: counts[name] for name in ("prompts", "cut_off", "wrong", "ungraded", "rollouts")} == {
        "prompts": 3,
        "cut_off": 0,
        "wrong": 2,
        "ungraded": 1,
        "rollouts": 2,
    }
    for row in rows:
        assert row["prefix_bytes"] > 0 and "</think>" not in row["completion"][: row["prefix_bytes"]]
    assert "or they cannot be compared with it: 1" in " ".join(capsys.readouterr().err.split())
    assert summary(rollouts.folder).startswith("2 wrong of 3 student answers, 2 finished by the teacher, 1 cannot be")
    both = run("either", 0.2)
    assert both.counts["cut_off"] == both.counts["rollouts"] == 3
    assert summary(both.folder).startswith("3 cut off and 0 wrong of 3 student answers, 3 finished by the teacher")


def test_nothing_to_rescue_is_one_line(run):
    with pytest.raises(DataError, match=r"none of 3 student answers was finished and wrong, .*cut_off 3, wrong 0"):
        run("wrong", 0.2)
