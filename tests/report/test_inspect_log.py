"""Logs for Inspect: the fields of the files, and what Inspect itself reads where it is installed."""

import json
import os
import subprocess
import zipfile

import pytest
from tests.evaluations import OPTIONS, QUESTIONS, SECRET, evaluate, graded, make_run, write

from dasd_lite.data.records import GRADED, HIDDEN_TEXT
from dasd_lite.errors import DataError
from dasd_lite.report.inspect_log import export_evaluations
from dasd_lite.report.results import read_accuracy


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that tests only read."""
    return make_run(tmp_path_factory.mktemp("exported") / "run")


@pytest.fixture(scope="module")
def logs(run):
    """The logs, by model and task."""
    files = export_evaluations(run, run / "inspect")
    assert sorted(files) == sorted((run / "inspect").iterdir()), "and nothing else"
    return {(file.name.split("_")[2], file.name.split("_")[1]): file for file in files}


def read(file, name):
    with zipfile.ZipFile(file) as opened:
        return json.loads(opened.read(name))


def test_a_log_for_each_evaluation_and_task(logs):
    tasks = ("prompts", "aime24", "gpqa-diamond")
    assert list(logs) == [*(("base", t) for t in tasks), *(("low", t) for t in tasks), ("teacher", "prompts")]
    file = logs["base", "prompts"]
    with zipfile.ZipFile(file) as opened:
        names = opened.namelist()
    assert names[0] == "_journal/start.json" and names[-2:] == ["summaries.json", "header.json"]
    assert names[1:-2] == [f"samples/{uid}_epoch_{k}.json" for uid in "abc" for k in (1, 2)]


def test_the_header_has_our_numbers(run, logs):
    for (phase, task), file in logs.items():
        header, own = read(file, "header.json"), read_accuracy(run / phase / "evaluate").tasks[task]
        assert (header["version"], header["status"]) == (2, "success")
        assert (header["eval"]["task"], header["eval"]["model"]) == (task, f"run/{phase}")
        assert header["eval"]["dataset"]["samples"] == own.num_questions
        assert header["eval"]["config"] == {"epochs": own.k}
        metrics = {name: metric["value"] for name, metric in header["results"]["scores"][0]["metrics"].items()}
        assert metrics["accuracy"] == own.mean
        assert metrics.get("stderr") == (own.standard_error if own.num_questions > 1 else None), "NaN is left out"
        assert header["results"]["total_samples"] == own.num_answers == len(read(file, "summaries.json"))
        assert header["eval"]["model_generate_config"] == {"temperature": 1.0, "max_tokens": 100, "seed": 0}


def test_a_sample_has_question_thinking_answer_and_verdict(logs):
    sample = read(logs["base", "prompts"], "samples/b_epoch_2.json")
    assert sample["input"][0]["content"].startswith("Bob counts 12 birds")
    assert (sample["target"], sample["uuid"]) == ("7", "prompts-b-1")
    thinking, said = sample["messages"][-1]["content"]
    assert (thinking["type"], said) == ("reasoning", {"type": "text", "text": "So: None"})
    assert thinking["reasoning"].startswith("It asks: Bob")
    score = sample["scores"]["dasd_lite"]
    assert (score["value"], score["explanation"]) == ("N", "unknown, took longer than 5 s")
    assert score["metadata"] == {"verdict": "unknown", "vote": None}
    values = [s["scores"]["dasd_lite"]["value"] for s in read(logs["base", "prompts"], "summaries.json")]
    assert values == ["C", "I", "N", "N", "C", "C"]
    cut = read(logs["base", "aime24"], "samples/1_epoch_4.json")
    assert cut["output"]["choices"][0]["stop_reason"] == "max_tokens"
    assert cut["scores"]["dasd_lite"]["explanation"] == "no answer, cut off at the length limit"


def test_hidden_tasks_are_exported_without_their_text(logs):
    for phase in ("base", "low"):
        with zipfile.ZipFile(logs[phase, "gpqa-diamond"]) as opened:
            text = "".join(opened.read(name).decode() for name in opened.namelist())
        assert not [word for word in (SECRET, "distant stars", *OPTIONS, "quark") if word in text]
        assert HIDDEN_TEXT in text
    sample = read(logs["low", "gpqa-diamond"], "samples/rec0_epoch_1.json")
    assert (sample["target"], sample["scores"]["dasd_lite"]["answer"]) == ("C", "C")
    assert "choices" not in sample


def test_the_same_run_gives_the_same_bytes(run, logs, tmp_path):
    again = export_evaluations(run, tmp_path / "again")
    assert [file.name for file in again] == [file.name for file in logs.values()]
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in logs.values()]


def test_the_command(run, tmp_path, cli):
    result = cli("export", run, "--to", "inspect", "--out", tmp_path / "logs", cwd=tmp_path)
    assert (result.rc, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 8 and all(line.startswith(f"Wrote {tmp_path}/logs/20") for line in lines[:7])
    assert lines[-1] == f"Next: inspect view --log-dir {tmp_path}/logs"


def test_nothing_to_export_is_one_line(tmp_path, cli):
    folder = make_run(tmp_path / "run")
    for phase in ("base", "low", "teacher"):
        (folder / phase / "evaluate" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"run: has no finished evaluation to export; `dasd-lite run` makes them$"):
        export_evaluations(folder, tmp_path / "out")
    result = cli("export", tmp_path, "--to", "inspect", cwd=tmp_path)
    assert (result.rc, result.stderr.count("\n")) == (2, 1)
    assert "holds no run (no recipe.json)" in result.stderr
    assert not (tmp_path / "out").exists()


READER = """
import json, sys
from inspect_ai.log import list_eval_logs, read_eval_log, read_eval_log_sample, read_eval_log_sample_summaries
from inspect_ai.scorer import value_to_float
read = {}
for info in list_eval_logs(sys.argv[1]):
    log, header = read_eval_log(info), read_eval_log(info, header_only=True)
    assert header.eval == log.eval and header.results == log.results
    assert (info.task, info.task_id) == (log.eval.task, log.eval.task_id), info
    summaries = read_eval_log_sample_summaries(info)
    assert {(s.id, s.epoch) for s in summaries} == {(s.id, s.epoch) for s in log.samples}
    first = log.samples[0]
    assert read_eval_log_sample(info, first.id, first.epoch).output == first.output
    assert all(s.completed and s.scores for s in summaries)
    to_float = value_to_float()
    values = [to_float(s.scores["dasd_lite"].value) for s in log.samples]
    read[log.eval.model + "/" + log.eval.task] = {
        "status": log.status, "mean": sum(values) / len(values),
        "metrics": {name: m.value for name, m in log.results.scores[0].metrics.items()},
        "samples": {
            f"{s.id} {s.epoch}": [s.input[0].text, s.messages[-1].content[0].reasoning, s.output.completion]
            for s in log.samples if not isinstance(s.messages[-1].content, str)
        },
    }
print(json.dumps(read))
"""


def test_inspect_reads_them(run, logs):
    python = os.environ.get("DASD_INSPECT_PYTHON")
    if python is None or subprocess.run([python, "-c", "import inspect_ai"], check=False).returncode:
        pytest.skip("DASD_INSPECT_PYTHON does not name a Python that has inspect_ai")
    place = run / "inspect"
    done = subprocess.run([python, "-c", READER, str(place)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() == {f"run/{phase}/{task}" for phase, task in logs}
    for phase, task in logs:
        log, own = result[f"run/{phase}/{task}"], read_accuracy(run / phase / "evaluate").tasks[task]
        assert log["status"] == "success"
        assert log["mean"] == pytest.approx(own.mean) == log["metrics"]["accuracy"]
    question, thinking, completion = result["run/base/prompts"]["samples"]["b 1"]
    assert question.startswith("Bob counts 12 birds") and thinking.startswith("It asks: Bob counts")
    assert completion.endswith("So: 5 apples")


def test_uids_of_any_kind_are_names_of_samples(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [{**row, "prompt_uid": "dir/é 1"} for row in graded("prompts", "a", "rw")]
    write(folder / "low" / "evaluate", "evaluate", graded=(GRADED, rows))
    evaluate(folder / "base" / "evaluate", prompts={"a": "r"})
    files = export_evaluations(folder, tmp_path / "out")
    assert QUESTIONS["prompts"]["a"][0] in json.dumps(read(files[1], "samples/dir/é 1_epoch_2.json"))
