"""Snapshots of the student during training, and what counts as a collapse."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.model.zoo import build, save
from tests.rows import QUICK, make_rows, write_rows

from dasd_lite.config.train import Full, TrainConfig
from dasd_lite.data.prompts import read_prompts
from dasd_lite.grading.grade import Grade
from dasd_lite.grading.math import grade
from dasd_lite.stages.train import train
from dasd_lite.training.monitor import Snapshot, has_collapsed, read_snapshots, take_snapshot
from dasd_lite.training.trainable import load_trainable


def test_a_snapshot_grades_answers_and_leaves_the_model_as_it_was(demo):
    model = load_trainable(demo / "student", Full(), device="cpu")
    before = model.config._attn_implementation
    questions = read_prompts(demo / "validation.jsonl", limit=12)
    snapshot = take_snapshot(model, demo / "student", questions, 7, grader=grade, max_tokens=160)
    assert model.training and model.config._attn_implementation == before
    assert (snapshot.step, snapshot.questions) == (7, 12)
    assert 2 <= snapshot.right <= snapshot.finished <= 12 and snapshot.mean_tokens > 10
    short = take_snapshot(model, demo / "student", questions, 7, grader=grade, max_tokens=8)
    assert (short.finished, short.right, short.mean_tokens) == (0, 0, 8.0)
    with torch.no_grad():  # one that repeats itself forever
        model.lm_head.weight.zero_()
        model.lm_head.weight[100] = 1
        model.base_model.norm.weight.fill_(1.0)
    looping = take_snapshot(model, demo / "student", questions, 9, grader=grade, max_tokens=160)
    assert looping.looping >= 6 or looping.finished == 12


def test_a_collapse_is_distinguished_from_learning_to_think_at_length():
    before = Snapshot(0, 16, 16, 12, 0, 80.0)
    assert has_collapsed(before, Snapshot(2, 16, 16, 11, 0, 80.0)) is None
    assert "3 of 16 finished answers are right (12 of 16 before training)" in has_collapsed(
        before, Snapshot(2, 16, 16, 3, 0, 80.0)
    )
    # Most are not finished: nothing can be concluded.
    assert has_collapsed(before, Snapshot(2, 16, 2, 0, 1, 1024.0)) is None
    assert "12 of 16 answers repeat themselves" in has_collapsed(before, Snapshot(2, 16, 2, 0, 12, 1024.0))
    # It was never good.
    assert has_collapsed(Snapshot(0, 16, 16, 1, 0, 80.0), Snapshot(2, 16, 16, 0, 0, 80.0)) is None


def always(completion, answer):
    return Grade("right", answer)


def test_training_is_monitored_before_early_and_at_the_end(demo, tmp_path):
    rows = write_rows(tmp_path / "rows", make_rows(16))
    config = TrainConfig(**QUICK | {"epochs": 4, "monitor_questions": 3, "monitor_tokens": 160, "max_loss_jump": 50.0})
    out = tmp_path / "out"
    monitored = train(rows, demo / "student", config, out=out, prompts=demo / "validation.jsonl")
    assert sorted(read_snapshots(out / "monitor.jsonl")) == [0, 1, 16]
    assert [each["questions"] for each in monitored.counts["monitored"]] == [3, 3, 3]
    graded = train(
        rows,
        demo / "student",
        config,
        out=tmp_path / "graded",
        prompts=demo / "validation.jsonl",
        grader=always,
    )
    assert [(each["finished"], each["right"]) for each in graded.counts["monitored"]] == [
        (each["finished"], each["finished"]) for each in monitored.counts["monitored"]
    ]
    # Snapshots do not change the weights.
    plain = train(rows, demo / "student", config, out=tmp_path / "plain")
    assert "monitored" not in plain.counts and plain.counts["last_step_loss"] == monitored.counts["last_step_loss"]


def test_questions_without_answers_are_a_note(demo, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows", make_rows(8))
    questions = [{"prompt": f"Question {i}?"} | ({"answer": "7"} if i > 5 else {}) for i in range(9)]
    config = TrainConfig(**QUICK | {"epochs": 1, "monitor_questions": 2, "monitor_tokens": 4})
    for name, asked in (("none", questions[:5]), ("some", questions)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, asked)))
        train(rows, demo / "student", config, out=tmp_path / name, prompts=tmp_path / f"{name}.jsonl")
    assert capsys.readouterr().err.count("no question has an answer, so training is not monitored") == 1
    assert not (tmp_path / "none" / "monitor.jsonl").exists()
    assert {each.questions for each in read_snapshots(tmp_path / "some" / "monitor.jsonl").values()} == {2}


def test_a_student_that_cannot_be_sampled_is_trained_without_snapshots(demo, tmp_path, capsys):
    student = save(build("minimax"), tmp_path / "minimax")
    config = TrainConfig(**QUICK | {"epochs": 1, "monitor_questions": 2, "monitor_tokens": 4})
    rows = write_rows(tmp_path / "rows", make_rows(8))
    trained = train(rows, student, config, out=tmp_path / "out", prompts=demo / "validation.jsonl")
    assert "monitored" not in trained.counts
    words = "minimax has a cache of its own (MiniMaxCache); use kind = 'vllm'; training continues without them"
    assert capsys.readouterr().err.count(words) == 1
