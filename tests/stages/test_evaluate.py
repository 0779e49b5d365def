"""Evaluations with a sampler whose answers are known: what is counted, kept, graded again and refused."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dasd_lite.config.evaluate import EvaluateConfig
from dasd_lite.config.models import Vllm
from dasd_lite.config.reading import Columns
from dasd_lite.data.asked import Asked, asked_for, question_sets
from dasd_lite.data.handles import Evaluation
from dasd_lite.data.records import Prompt
from dasd_lite.data.seeds import digest
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.grading import early_look, open_grader
from dasd_lite.grading.grade import VERDICTS, Grade
from dasd_lite.inference import Completion
from dasd_lite.stages.evaluate import evaluate


class Canned:
    """Says what `answers` has for a question; `asked` counts the requests."""

    fingerprint = "canned"

    def __init__(self, answers):
        self.answers, self.asked, self.limits = answers, 0, set()

    def complete(self, requests, params):
        for request in requests:
            self.asked += 1
            self.limits.add(request.max_tokens)
            text, reason = self.answers[request.messages[-1]["content"]]
            yield Completion(request.position, text, finish_reason=reason, completion_tokens=len(text))

    def status(self):
        return ""

    def close(self):
        pass


def question(text, answer, uid=None):
    messages = ({"role": "user", "content": text},)
    return Prompt(uid or digest(list(messages)), messages, "all", answer)


QUESTIONS = [question("one", "1"), question("two", "2"), question("three", "3"), question("four", "4")]
ANSWERS = {
    "one": ("<think> so </think> Answer: 1", "stop"),
    "two": ("<think> so </think> Answer: 3", "stop"),
    "three": ("<think> so </think> well.", "stop"),
    "four": ("<think> so </think> Answer: 4", "length"),  # may be the beginning of 45
}


def rows(evaluation):
    return evaluation.to_table().to_pylist()


def test_every_answer_has_one_of_five_verdicts(tmp_path):
    result = evaluate(Canned(ANSWERS), QUESTIONS, out=tmp_path / "e", num_samples=2)
    counts = result.counts
    assert [row["grade"] for row in rows(result)] == ["right"] * 2 + ["wrong"] * 2 + ["no_answer"] * 4
    assert sum(counts[name] for name in VERDICTS) == counts["samples"] == 8
    assert (counts["right"], counts["wrong"], counts["no_answer"], counts["truncated"]) == (2, 2, 4, 2)
    assert result.accuracy == 0.25
    assert counts["tasks"] == {"prompts": {name: value for name, value in counts.items() if name != "tasks"}}
    first, cut = rows(result)[0], rows(result)[-1]
    assert (first["extracted"], first["vote"], first["reason"], first["task"]) == ("1", "right", None, "prompts")
    assert (cut["extracted"], cut["vote"]) == (None, None)


def test_another_grader_asks_for_no_answer_and_reads_none_of_the_old_grades(tmp_path):
    sampler = Canned(ANSWERS)
    evaluate(sampler, QUESTIONS, out=tmp_path / "e", num_samples=1)
    result = evaluate(sampler, QUESTIONS, out=tmp_path / "e", num_samples=1, grader=always_unknown)
    assert sampler.asked == 4
    assert [row["grade"] for row in rows(result)] == ["unknown", "unknown", "unknown", "no_answer"]
    assert (result.counts["unknown"], result.accuracy) == (3, 0.0)


def always_unknown(completion, answer):
    return Grade("unknown", None, "took too long")


def test_more_samples_are_added_and_only_they_are_graded(tmp_path):
    graded = []

    def counting(completion, answer):
        graded.append(completion)
        return Grade("right" if answer in completion else "wrong", answer)

    counting.fingerprint = "counting"
    sampler = Canned(ANSWERS)
    evaluate(sampler, QUESTIONS[:2], out=tmp_path / "e", num_samples=1, grader=counting)
    result = evaluate(sampler, QUESTIONS[:2], out=tmp_path / "e", num_samples=3, grader=counting)
    assert (sampler.asked, len(graded)) == (6, 6)
    assert [row["index"] for row in rows(result)] == [0, 1, 2, 0, 1, 2]


class ByLimit(Canned):
    """Needs 150 tokens for its answer, and is cut off before that."""

    def complete(self, requests, params):
        for request in requests:
            self.asked += 1
            enough = request.max_tokens >= 150
            text, reason = ("<think> so </think> Answer: 1", "stop") if enough else ("<think> so", "length")
            tokens = 150 if enough else request.max_tokens
            yield Completion(request.position, text, finish_reason=reason, completion_tokens=tokens)


def test_an_answer_that_is_asked_for_again_is_graded_again(tmp_path):
    sampler = ByLimit({})
    for limit, accuracy, truncated, asked in ((100, 0.0, 1, 1), (200, 1.0, 0, 2), (100, 0.0, 1, 2), (200, 1.0, 0, 2)):
        result = evaluate(sampler, QUESTIONS[:1], out=tmp_path / "e", num_samples=1, max_tokens=limit)
        assert (result.accuracy, result.counts["truncated"], sampler.asked) == (accuracy, truncated, asked)


def test_an_unknown_grade_is_tried_again(tmp_path):
    sampler, verdicts = Canned(ANSWERS), iter(["unknown", "right", "right"])

    def busy(completion, answer):
        return Grade(next(verdicts), answer)

    busy.fingerprint = "busy"
    options = {"out": tmp_path / "e", "grader": busy}
    assert evaluate(sampler, QUESTIONS[:1], num_samples=1, **options).accuracy == 0.0
    assert evaluate(sampler, QUESTIONS[:1], num_samples=2, **options).accuracy == 1.0


def test_a_kill_between_two_grades_keeps_those_before_it(tmp_path):
    graded = []

    def dies(completion, answer):
        graded.append(completion)
        if len(graded) == 3:
            raise KeyboardInterrupt
        return Grade("right", answer)

    dies.fingerprint = "dies"
    sampler = Canned(ANSWERS)
    with pytest.raises(KeyboardInterrupt):
        evaluate(sampler, QUESTIONS[:3], out=tmp_path / "e", num_samples=1, grader=dies)
    log = tmp_path / "e" / "grades.jsonl"
    assert len(log.read_text().splitlines()) == 2
    log.write_text(log.read_text() + '{"key": "ab')  # a line that a kill cut off
    result = evaluate(sampler, QUESTIONS[:3], out=tmp_path / "e", num_samples=1, grader=dies)
    assert (sampler.asked, len(graded)) == (3, 4), "the third was tried twice"
    assert result.accuracy == 1.0
    assert all(json.loads(line)["grade"] == "right" for line in log.read_text().splitlines())


def test_questions_that_cannot_be_graded_are_refused_before_any_is_asked(tmp_path):
    sampler = Canned(ANSWERS)
    without = [*QUESTIONS, question("five", None)]
    with pytest.raises(DataError, match=r"^prompts: 1 of 5 questions have no answer to grade by, the first is"):
        evaluate(sampler, without, out=tmp_path / "e")
    empty = [*QUESTIONS, question("five", " "), question("six", "")]
    with pytest.raises(DataError, match=r"^prompts: question \"five\": answer = '': .*\(1 more are like it\)$"):
        evaluate(sampler, empty, out=tmp_path / "e")
    assert sampler.asked == 0 and not (tmp_path / "e").exists()


def test_a_template_is_put_around_the_user_s_own_questions(tmp_path):
    answers = {f"{name} Box it.": said for name, said in ANSWERS.items()}
    result = evaluate(Canned(answers), QUESTIONS[:1], out=tmp_path / "e", template="{prompt} Box it.", num_samples=1)
    assert rows(result)[0]["messages"] == [{"role": "user", "content": "one Box it."}]
    assert result.accuracy == 1.0


def choice_file(tmp_path):
    path = tmp_path / "choices.jsonl"
    path.write_text(json.dumps({"prompt": "Where?", "choices": ["Rome", "Paris", "Oslo", "Bern"], "answer": "Paris"}))
    return path


class Knows:
    """Looks for Paris among the options, in whatever order they are."""

    fingerprint = "knows"

    def complete(self, requests, params):
        for request in requests:
            letter = re.search(r"([A-D])\) Paris", request.messages[-1]["content"])[1]
            yield Completion(request.position, f"<think> . </think> Answer: {letter}", completion_tokens=5)

    status = Canned.status
    close = Canned.close


def test_the_order_of_options_is_drawn_for_each_answer_and_stored_with_it(tmp_path):
    result = evaluate(Knows(), choice_file(tmp_path), out=tmp_path / "e", num_samples=24)
    assert result.accuracy == 1.0
    asked = [row["messages"][-1]["content"] for row in rows(result)]
    assert len(set(asked)) == 24, "every order of four options once"
    letters = [json.loads(row["answer"])["answer"] for row in rows(result)]
    assert np.unique(letters, return_counts=True)[1].tolist() == [6, 6, 6, 6]
    assert {row["extracted"] for row in rows(result)} == set("ABCD")
    again = evaluate(Knows(), choice_file(tmp_path), out=tmp_path / "again", num_samples=24)
    assert rows(again) == rows(result)
    other = evaluate(Knows(), choice_file(tmp_path), out=tmp_path / "other", num_samples=24, seed=1)
    assert [row["messages"] for row in rows(other)] != [row["messages"] for row in rows(result)]


@pytest.mark.parametrize("said", [r"\boxed{1}", r"\boxed{E}", "Answer: Z", r"\boxed{Ω}", ""])
@pytest.mark.parametrize("grader", ["auto", "math"])
def test_what_is_no_option_ends_no_evaluation(tmp_path, said, grader):
    class Says(Knows):
        def complete(self, requests, params):
            for request in requests:
                yield Completion(request.position, f"<think> . </think> {said}", completion_tokens=5)

    result = evaluate(Says(), choice_file(tmp_path), out=tmp_path / "e", num_samples=2, grader=grader)
    assert result.accuracy == 0.0


def test_votes_for_the_same_option_are_the_same_in_any_order(tmp_path):
    class Oslo(Knows):
        def complete(self, requests, params):
            for request in requests:
                letter = re.search(r"([A-D])\) Oslo", request.messages[-1]["content"])[1]
                yield Completion(request.position, f"<think> . </think> Answer: {letter}", completion_tokens=5)

    result = evaluate(Oslo(), choice_file(tmp_path), out=tmp_path / "e", num_samples=8)
    assert {row["vote"] for row in rows(result)} == {"Oslo"} and result.accuracy == 0.0


@pytest.fixture
def gsm8k_folder():
    """The folder that DASD_DATA names, with the real questions of GSM8K."""
    folder = os.environ.get("DASD_DATA")
    if folder is None:
        pytest.skip("DASD_DATA names no folder with gsm8k_test.jsonl: 1 test of 1,319 questions is not run")
    return Path(folder)


def test_benchmarks_beside_the_user_s_own_questions(tmp_path, gsm8k_folder):
    class One(Canned):
        def complete(self, requests, params):
            for request in requests:
                self.limits.add(request.max_tokens)
                yield Completion(request.position, "<think> . </think> \\boxed{18}", completion_tokens=3)

    sampler = One({})
    tasks = [{"name": "gsm8k", "limit": 3, "num_samples": 2, "max_tokens": 77}]
    options = {"tasks": tasks, "tasks_folder": gsm8k_folder, "num_samples": 1, "max_tokens": 55}
    result = evaluate(sampler, QUESTIONS[:2], out=tmp_path / "e", **options)
    assert [row["task"] for row in rows(result)] == ["prompts"] * 2 + ["gsm8k"] * 6
    assert sampler.limits == {55, 77}
    counts = result.counts["tasks"]
    assert (counts["prompts"]["questions"], counts["gsm8k"]["questions"], counts["gsm8k"]["samples"]) == (2, 3, 6)
    assert counts["gsm8k"]["accuracy"] == pytest.approx(1 / 3), "the first question's answer is 18"
    assert re.fullmatch("[0-9a-f]{64}", counts["gsm8k"]["checksum"])
    assert Evaluation(tmp_path / "e").manifest["names"]["gsm8k"].endswith(counts["gsm8k"]["checksum"])


def test_the_same_question_in_two_sets_has_answers_of_its_own(tmp_path, gsm8k_folder):
    with open(gsm8k_folder / "gsm8k_test.jsonl") as file:
        first = json.loads(file.readline())
    options = {"tasks": [{"name": "gsm8k", "limit": 1, "max_tokens": 200}], "tasks_folder": gsm8k_folder}

    class One(ByLimit):
        def complete(self, requests, params):
            for completion in super().complete(requests, params):
                yield replace(completion, text=completion.text.replace("Answer: 1", "Answer: 18"))

    (asked,) = asked_for(question_sets(EvaluateConfig(**options, num_samples=1), None), 0)
    own = [question(asked.question.messages[-1]["content"], first["answer"])]
    result = evaluate(One({}), own, out=tmp_path / "e", max_tokens=100, num_samples=1, **options)
    assert [(row["task"], row["finish_reason"], row["grade"]) for row in rows(result)] == [
        ("prompts", "length", "no_answer"),
        ("gsm8k", "stop", "right"),
    ]


def test_unread_columns_option_is_still_that_of_files(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"q": "one", "a": "1"}))
    columns = Columns(prompt="q", answer="a")
    result = evaluate(Canned(ANSWERS), path, out=tmp_path / "e", columns=columns, num_samples=1)
    assert result.accuracy == 1.0


def test_four_bits_are_another_model(tmp_path, demo):
    pytest.importorskip("bitsandbytes")
    prompts = [question("A dial shows 9. Turns: Cid up 3. What does it show?", "2")]
    options = {"num_samples": 2, "max_tokens": 24}
    whole = evaluate(demo / "student", prompts, out=tmp_path / "whole", **options)
    small = evaluate(demo / "student", prompts, out=tmp_path / "small", four_bit=True, **options)
    texts = [[row["completion"] for row in rows(result)] for result in (whole, small)]
    assert texts[0] != texts[1] and small.manifest["config"]["four_bit"] is True
    with pytest.raises(ConfigError, match=r"evaluate.four_bit = true needs kind = 'transformers', not 'vllm'"):
        evaluate(Vllm(model=str(demo / "student")), prompts, out=tmp_path / "vllm", four_bit=True)


# --- the early look -----------------------------------------------------------------------------------


def test_the_first_ten_questions_are_reported_while_there_is_time(capsys, monkeypatch):
    monkeypatch.setattr(early_look, "_SHORT_SECONDS", 0.0)
    plan = [Asked("prompts", question(f"{n}", "1"), f"k{n}", 0, i, 9) for n in range(12) for i in range(2)]
    look = early_look.EarlyLook("low: evaluate", plan, open_grader("math"), num_done=0)
    for at in [20, *range(20)]:
        text, reason = ("Answer: 1", "stop") if at % 4 == 0 else ("Answer: 2", "length" if at % 4 == 1 else "stop")
        assert capsys.readouterr().err == ""
        look.look(at, text, reason, 10)
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(
        "note: low: evaluate: the first 10 questions (20 answers): 25% right, 25% cut off, 10 tokens"
    )
    look.look(21, "Answer: 1", "stop", 10)
    assert capsys.readouterr().err == ""


def test_the_early_look_says_nothing_of_what_it_did_not_grade(capsys, monkeypatch):
    monkeypatch.setattr(early_look, "_SHORT_SECONDS", 0.0)
    plan = [Asked("prompts", question(f"{n}", "1"), f"k{n}", 0, 0, 9) for n in range(12)]
    look = early_look.EarlyLook("low: evaluate", plan, open_grader(always_unknown), num_done=0)
    for at in range(10):
        look.look(at, "Answer: 1", "length" if at < 2 else "stop", 10)
    said = " ".join(capsys.readouterr().err.split())
    assert "the first 10 questions (10 answers): 20% cut off, 10 tokens each; about" in said


@pytest.mark.parametrize(("questions", "done"), [(10, 0), (12, 1)])
def test_no_look_at_a_few_questions_or_a_resumed_evaluation(capsys, monkeypatch, questions, done):
    monkeypatch.setattr(early_look, "_SHORT_SECONDS", 0.0)
    plan = [Asked("prompts", question(f"{n}", "1"), f"k{n}", 0, 0, 9) for n in range(questions)]
    look = early_look.EarlyLook("low: evaluate", plan, open_grader("math"), num_done=done)
    for at in range(questions):
        look.look(at, "Answer: 1", "stop", 10)
    assert capsys.readouterr().err == ""


# --- programs -----------------------------------------------------------------------------------------


def test_programs_are_run_and_their_tests_are_not_repeated_in_every_row(tmp_path):
    """The tests of a task can be megabytes, and there are 64 answers to each."""
    tests = [{"input": f"{n}\n", "output": str(n * n)} for n in range(1, 4)]
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"prompt": "Print n squared.", "tests": tests}))
    square = "```python\nprint(int(input()) ** 2)\n```"
    double = "```python\nprint(int(input()) * 2)\n```"
    for name, said, grade, reason in (
        ("square", square, "right", None),
        ("double", double, "wrong", "test 1 of 3: wrong output"),
        ("none", "I cannot.", "no_answer", None),
    ):
        sampler = Canned({"Print n squared.": (f"<think> so </think> {said}", "stop")})
        result = evaluate(sampler, path, out=tmp_path / name, num_samples=1)
        (row,) = rows(result)
        assert (row["grade"], row["reason"]) == (grade, reason)
        assert "and seccomp, Python 3" in result.counts["sandbox"]
        assert len(row["answer"]) < 100 and row["vote"] in (None, "right")


def test_a_row_whose_tests_are_not_the_expected_json(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"prompt": "Print n squared.", "tests": [{"in": "1", "out": "1"}]}))
    with pytest.raises(DataError, match=r"tasks.jsonl:1: .*tests"):
        evaluate(Canned({}), path, out=tmp_path / "e")
