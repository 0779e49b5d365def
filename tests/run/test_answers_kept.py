"""Answers are made once: more questions, more answers, another limit or rule ask only for what is missing."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest
from tests.recipes import SMALL, write_recipe
from tests.server import ChatServer

from dasd_lite.data.dataset import read_table
from dasd_lite.data.journal import read_counts, stored_keys
from dasd_lite.data.manifest import read_manifest, read_timing
from dasd_lite.data.records import ROLLOUT
from dasd_lite.data.run_folder import export_trial

TOKENS = ("token_ids", "logprobs", "token_bytes")


def rollouts(folder: Path, stage: str = "low/sample"):
    return read_table(folder / "run" / stage, "rollouts").to_pylist()


def asked(folder: Path, stage: str = "low/sample") -> int:
    """How many answers the last call of a stage sampled."""
    return int(read_timing(folder / "run" / stage).get("sampled_answers", 0))


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_two_questions_more_cost_two_questions(copied, cli):
    """The whole chain follows; a finished training is set aside, and that is said."""
    before = rollouts(copied)
    ended = cli("run", "run.toml", "prompts.limit=10", cwd=copied)
    assert ended.rc == 0, ended.stderr
    after = rollouts(copied)
    assert (len(after), asked(copied)) == (20, 4)
    assert after[:16] == before
    assert (
        "run/low/train: made again, because its input has changed; what it held is now in train.replaced-1"
        in ended.stderr
    )
    assert (copied / "run" / "low" / "train.replaced-1" / "model").is_dir()
    assert read_manifest(copied / "run" / "low" / "score")["counts"]["rollouts"] == 20
    same = read_table(copied / "run" / "low" / "score", "scores")
    assert same["uid"].to_pylist() == [row["uid"] for row in after]
    assert asked(copied, "base/evaluate") == 4, "nothing has changed before the first phase"
    again = cli("run", "run.toml", "prompts.limit=10", cwd=copied)
    assert (again.rc, again.stderr, again.stdout.splitlines()[0]) == (0, "", "Nothing to do.")


def test_a_grown_folder_holds_the_rows_of_one_made_at_once(finished, copied, tmp_path_factory, cli):
    cli("sample", "run.toml", "sample.num_samples=3", "prompts.limit=9", cwd=copied)
    cli("score", "run.toml", "sample.num_samples=3", "prompts.limit=9", cwd=copied)
    assert asked(copied) == 9 * 3 - 16
    other = tmp_path_factory.mktemp("once")
    write_recipe(other)
    for stage in ("sample", "score"):
        assert cli(stage, "run.toml", "sample.num_samples=3", "prompts.limit=9", cwd=other).rc == 0
    for one, two in zip(rollouts(copied), rollouts(other), strict=True):
        assert {k: v for k, v in one.items() if k != "logprobs"} == {k: v for k, v in two.items() if k != "logprobs"}
    scores = [read_table(folder / "run" / "low" / "score", "scores").to_pylist() for folder in (copied, other)]
    for one, two in zip(*scores, strict=True):
        assert (one["uid"], one["ids"]) == (two["uid"], two["ids"])
        assert one["p_student"] == pytest.approx(two["p_student"], abs=1e-5, nan_ok=True)


def test_fewer_questions_are_left_out_and_cost_nothing_later(copied, cli):
    ended = cli("sample", "run.toml", "prompts.limit=3", cwd=copied)
    assert ended.rc == 0, ended.stderr
    assert "train.jsonl: 5 removed; 6 answers are there, 0 are asked for" in ended.stderr
    assert len(rollouts(copied)) == 6
    cli("sample", "run.toml", cwd=copied)
    assert (len(rollouts(copied)), asked(copied)) == (16, 0)


def test_a_higher_limit_asks_only_for_what_was_cut_off(copied, cli):
    before = {row["uid"]: row for row in rollouts(copied)}
    cut_off = {uid for uid, row in before.items() if row["finish_reason"] == "length"}
    ended = cli("sample", "run.toml", "sample.max_tokens=220", cwd=copied)
    assert ended.rc == 0, ended.stderr
    assert asked(copied) == len(cut_off)
    for row in rollouts(copied):
        if row["uid"] in cut_off:
            assert row["completion"].startswith(before[row["uid"]]["completion"].rstrip("�")[:20])
            assert row["max_tokens"] == 220
        else:
            assert row == before[row["uid"]]


def test_another_reference_answer_or_domain_costs_nothing(tmp_path, cli):
    questions = [{"prompt": f"Tom has {n} apples and buys 2 more. How many?", "answer": "0"} for n in (3, 4)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    write_recipe(tmp_path, prompts={"path": "questions.jsonl"})
    assert cli("sample", "run.toml", cwd=tmp_path).rc == 0
    before = rollouts(tmp_path)
    rows = [{**row, "answer": str(n), "domain": "apples", "uid": f"q{n}"} for n, row in enumerate(questions, 5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = cli("sample", "run.toml", cwd=tmp_path)
    assert ended.rc == 0, ended.stderr
    after = rollouts(tmp_path)
    assert asked(tmp_path) == 0
    assert [(row["answer"], row["domain"], row["prompt_uid"]) for row in after] == [
        ("5", "apples", "q5"),
        ("5", "apples", "q5"),
        ("6", "apples", "q6"),
        ("6", "apples", "q6"),
    ]
    assert [{name: row[name] for name in TOKENS} for row in after] == [
        {name: row[name] for name in TOKENS} for row in before
    ]


def test_two_rules_side_by_side_with_the_answers_of_one_run(finished, tmp_path, cli):
    write_recipe(tmp_path)
    options = ["low.select.rule=random", "train.learning_rate=1e-4", f'reuse=["{finished}/run"]']
    ended = cli("run", "run.toml", *options, cwd=tmp_path)
    assert ended.rc == 0, ended.stderr
    for stage in ("low/sample", "base/evaluate"):
        assert asked(tmp_path, stage) == 0, stage
        table = "graded" if stage.endswith("evaluate") else "rollouts"
        one, two = (read_table(folder / "run" / stage, table).to_pylist() for folder in (finished, tmp_path))
        assert one == two
    assert "low: sample: 16 answers are there already, in folders to reuse" in ended.stderr
    assert "score" not in [path.name for path in (tmp_path / "run" / "low").iterdir()], "random needs no scores"


def test_reuse_on_the_command_line(finished, tmp_path, cli):
    write_recipe(tmp_path)
    ended = cli("sample", "run.toml", "--reuse", finished / "run", "prompts.limit=9", cwd=tmp_path)
    assert ended.rc == 0, ended.stderr
    assert (len(rollouts(tmp_path)), asked(tmp_path)) == (18, 2)
    assert rollouts(tmp_path)[:16] == rollouts(finished)
    ended = cli("score", "run.toml", "--reuse", finished / "run", "prompts.limit=9", cwd=tmp_path)
    assert ended.rc == 0, ended.stderr
    scored = read_timing(tmp_path / "run" / "low" / "score")["scored_tokens"]
    assert scored == sum(len(row) for row in read_table(tmp_path / "run/low/score", "scores")["ids"].to_pylist()[16:])
    ended = cli("sample", "run.toml", "--reuse", tmp_path, cwd=tmp_path)
    assert ended.rc == 2
    assert "holds no answers or scores of a run" in ended.stderr


def test_force_sets_aside_and_replaces_only_what_differs(copied, cli):
    before = rollouts(copied)
    ended = cli("run", "run.toml", "low.sample.temperature=0.9", cwd=copied)
    assert ended.rc == 2
    assert "run/low/sample: made with another configuration (temperature: 0.6 there, 0.9 now)" in ended.stderr
    ended = cli("sample", "run.toml", "low.sample.temperature=0.9", "--force", cwd=copied)
    assert ended.rc == 0, ended.stderr
    assert "what it held is now in sample.replaced-1" in ended.stderr
    assert rollouts(copied, "low/sample.replaced-1") == before
    ended = cli("run", "run.toml", "low.sample.temperature=0.9", cwd=copied)
    assert ended.rc == 0, f"what follows is made again without --force: {ended.stderr}"
    assert asked(copied, "base/evaluate") == 4
    ended = cli("sample", "run.toml", "--force", cwd=copied)
    assert ended.rc == 0, ended.stderr
    assert (rollouts(copied), asked(copied)) == (before, 0), "back again: they were only set aside"


def test_clean_removes_what_was_set_aside(copied, cli):
    cli("sample", "run.toml", "low.sample.temperature=0.9", "--force", cwd=copied)
    aside = copied / "run" / "low" / "sample.replaced-1"
    left = export_trial(copied / "run" / "low" / "train") / "model"  # as by a kill before the first step
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(bytes(3_000_000))
    ended = cli("clean", "run", cwd=copied)
    assert ended.rc == 2 and "add --yes" in ended.stderr and aside.is_dir()
    assert "run/low/.train.export: 3.0 MB\n" in ended.stdout
    assert re.search(r"run/low/sample\.replaced-1: [\d.]+ MB, 16 answers, [\d,]+ tokens", ended.stdout)
    ended = cli("clean", "run", "--yes", cwd=copied)
    assert (ended.rc, aside.exists(), left.parent.exists()) == (0, False, False)
    assert (copied / "run" / "low" / "sample").is_dir()
    assert cli("clean", "run", cwd=copied).stdout.splitlines()[-1] == "Nothing to remove."


def test_files_that_no_stage_wrote_are_never_deleted(copied, cli):
    (copied / "run" / "low" / "select" / "thesis.tex").write_text("years of work")
    for options in (["prompts.limit=7"], ["select.keep=2", "--force"]):
        ended = cli("run", "run.toml", *options, cwd=copied)
        there = list((copied / "run" / "low").glob("select*/thesis.tex"))
        assert [path.read_text() for path in there] == ["years of work"]
        assert ended.rc == 0 or "thesis.tex, which dasd-lite did not write" in ended.stderr


def test_a_dropped_phase_is_named(copied, cli):
    write_recipe(copied, phase=SMALL["phase"][:1])
    for command in ("check", "run"):
        ended = cli(command, "run.toml", cwd=copied)
        assert ended.rc == 0, ended.stderr
        assert "note: run/mixed: no phase of this recipe" in ended.stdout + ended.stderr


def test_check_says_what_is_there_and_what_is_in_the_way(copied, cli):
    ended = cli("check", "run.toml", cwd=copied)
    assert ended.rc == 0, ended.stderr
    assert "run/low/sample: 16 of 16 answers are there, 0 will be asked for" in ended.stdout
    ended = cli("check", "run.toml", "sample.num_samples=3", "prompts.limit=9", cwd=copied)
    assert "run/low/sample: 16 of 27 answers are there, 11 will be asked for" in ended.stdout
    for option, said in (
        ("select.beta=0.2", "select: made with another configuration (beta: 0.1 there, 0.2 now)"),
        ("seed=4", "evaluate: made with another configuration (seed: 3 there, 4 now)"),
    ):
        for command in ("check", "run"):
            ended = cli(command, "run.toml", option, cwd=copied)
            assert ended.rc == 2 and said in ended.stderr, ended.stderr


# --- answers that cost money ----------------------------------------------------------------------------


ENDPOINT = {"kind": "endpoint", "model": "teacher", "prices": {"input": 1.0, "output": 2.0}}


def paid_recipe(folder: Path, server: ChatServer, **tables):
    questions = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(6)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    teacher = {**ENDPOINT, "base_urls": [server.url], **tables.pop("teacher", {})}
    write_recipe(
        folder,
        prompts={"path": "questions.jsonl"},
        teacher=teacher,
        phase=[{"name": "low", "sample.temperature": 0.6}],
        evaluate=None,
        **tables,
    )


def test_force_asks_before_it_replaces_paid_answers(tmp_path, cli):
    with ChatServer() as server:
        paid_recipe(tmp_path, server)
        assert cli("sample", "run.toml", cwd=tmp_path).rc == 0
        paid = len(server.answered)
        ended = cli("sample", "run.toml", "sample.top_p=0.9", "--force", cwd=tmp_path)
        assert ended.rc == 2
        assert re.search(r"--force would set aside run/low/sample \(12 answers, [\d.]+ paid\); add --yes", ended.stderr)
        assert len(server.answered) == paid
        ended = cli("sample", "run.toml", "sample.num_samples=3", "--force", cwd=tmp_path)
        assert ended.rc == 0, f"growing replaces nothing: {ended.stderr}"
        ended = cli("sample", "run.toml", "sample.top_p=0.9", "--force", "--yes", cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
    assert len(stored_keys(tmp_path / "run/low/sample.replaced-1", "rollouts", ROLLOUT, None)) == 18


def test_paid_answers_survive_force_with_the_server_down(tmp_path, cli):
    with ChatServer() as server:
        paid_recipe(tmp_path, server, teacher={"max_retries": 0})
        assert cli("sample", "run.toml", cwd=tmp_path).rc == 0
    before = rollouts(tmp_path)
    ended = cli("sample", "run.toml", "sample.top_p=0.9", "--force", "--yes", cwd=tmp_path)
    assert ended.rc == 2
    assert "no server can be reached" in ended.stderr
    found = [p for p in (tmp_path / "run" / "low").glob("sample*") if (p / "manifest.json").exists()]
    assert [read_table(path, "rollouts").to_pylist() for path in found] == [before]


def test_an_unfinished_sample_can_be_finished_as_it_is_and_grow_later(tmp_path, cli):
    """The budget is spent after some of the answers; the run goes on with what is there."""
    with ChatServer() as server:
        tight = {"budget": {"max_tokens": 150}, "concurrency": 1}
        paid_recipe(tmp_path, server, teacher=tight, train={**SMALL["train"], "grad_accum_steps": 1})
        ended = cli("sample", "run.toml", cwd=tmp_path)
        assert ended.rc == 2 and "budget" in ended.stderr
        number = len(stored_keys(tmp_path / "run/low/sample", "rollouts", ROLLOUT, None))
        assert 0 < number < 12
        shown = cli("show", "run/low/sample", cwd=tmp_path)
        assert shown.rc == 0, shown.stderr
        assert f"run/low/sample: unfinished, {number} answers so far" in shown.stdout
        assert "What is 0 + 0?" in shown.stdout
        ended = cli("sample", "run.toml", "--finish", cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
        assert f"{12 - number} answers missing" in ended.stderr
        assert (len(rollouts(tmp_path)), read_manifest(tmp_path / "run/low/sample")["counts"]["missing"]) == (
            number,
            12 - number,
        )
        ended = cli("check", "run.toml", "select.rule=random", cwd=tmp_path)
        assert f"{number} of 12 answers are there, {12 - number} stay missing until `dasd-lite sample`" in ended.stdout
        answered = len(server.answered)
        ended = cli("run", "run.toml", "select.rule=random", cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
        assert len(server.answered) == answered, "the run asks for nothing more"
        ended = cli("sample", "run.toml", "teacher.budget={}", cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
        assert len(rollouts(tmp_path)) == 12
        ended = cli("run", "run.toml", "select.rule=random", "teacher.budget={}", cwd=tmp_path)
        assert ended.rc == 0 and "run/low/train: made again" in ended.stderr


def test_a_kept_answer_is_never_asked_for_again(tmp_path, cli):
    """Over any changes of the plan, the server sees every (question, seed) once."""
    with ChatServer() as server:
        paid_recipe(tmp_path, server)
        for options in (
            ["prompts.limit=2"],
            ["prompts.limit=4", "sample.num_samples=1"],
            ["sample.num_samples=3"],
            ["prompts.limit=1"],
            ["sample.num_samples=3", "sample.max_tokens=190"],
        ):
            ended = cli("sample", "run.toml", *options, cwd=tmp_path)
            assert ended.rc == 0, ended.stderr
        bodies = [(body["messages"][-1]["content"], body["seed"]) for body in server.answered if "seed" in body]
    sampled = [body for body in bodies if body[1] > 1000]  # the probe has small seeds
    assert len(sampled) == 18
    assert len(set(sampled)) == 18
    table = read_table(tmp_path / "run/low/sample", "rollouts", ["uid"])
    assert pc.count_distinct(table["uid"]).as_py() == 18


def test_another_server_is_probed_before_it_is_asked_for_more(tmp_path, cli):
    with ChatServer() as server:
        paid_recipe(tmp_path, server)
        assert cli("sample", "run.toml", "prompts.limit=2", cwd=tmp_path).rc == 0
    with ChatServer(habits=["refuses logprobs"]) as other:
        url = f'teacher.base_urls=["{other.url}"]'
        ended = cli("sample", "run.toml", "prompts.limit=2", url, cwd=tmp_path)
        assert (ended.rc, ended.stdout.splitlines()[0], other.asked) == (0, "Nothing to do.", [])
        ended = cli("sample", "run.toml", url, cwd=tmp_path)
        assert ended.rc == 2 and "logprobs" in ended.stderr
        assert all(body["seed"] < 1000 for body in other.asked if "seed" in body), "only the probe"
    assert len(rollouts(tmp_path)) == 4


def test_force_refuses_files_that_no_stage_wrote_where_answers_are_paid(tmp_path, cli):
    with ChatServer() as server:
        paid_recipe(tmp_path, server)
        folder = tmp_path / "run/low/sample"
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
        ended = cli("sample", "run.toml", "--force", cwd=tmp_path)
        assert ended.rc == 2
        assert "run/low/sample: has files that dasd-lite did not write" in ended.stderr
        assert (folder / "notes.txt").read_text() == "mine"


def test_what_was_set_aside_counts_in_the_budget(tmp_path, cli):
    """--force does not buy a second budget."""
    with ChatServer() as server:
        paid_recipe(tmp_path, server, teacher={"budget": {"max_tokens": 100_000}})
        assert cli("sample", "run.toml", cwd=tmp_path).rc == 0
        timing = read_timing(tmp_path / "run/low/sample")
        used = int(timing["prompt_tokens"] + timing["completion_tokens"])
        options = ["sample.top_p=0.9", "--force", "--yes", f"teacher.budget={{ max_tokens = {used + 30} }}"]
        ended = cli("sample", "run.toml", *options, cwd=tmp_path)
        assert ended.rc == 2 and "budget" in ended.stderr
        assert len(stored_keys(tmp_path / "run/low/sample", "rollouts", ROLLOUT, None)) < 12


def test_answers_given_up_after_errors_change_what_the_folder_is(tmp_path, cli):
    """Stages behind it are made again once they are there; a plain run goes on without them."""
    with ChatServer(faults={"What is 3 + 3?": "400"}) as server:
        paid_recipe(tmp_path, server, teacher={"max_skipped": 4, "max_retries": 0})
        ended = cli("sample", "run.toml", cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
        folder = tmp_path / "run/low/sample"
        before = read_manifest(folder)
        assert before["closed_from"] != before["fingerprint"]
        assert [row["finish_reason"] for row in rollouts(tmp_path)].count("error") == 2
        assert cli("run", "run.toml", "select.rule=random", "train.learning_rate=1e-4", cwd=tmp_path).rc == 0
        asked_so_far = len(server.asked)
        assert read_manifest(folder) == before and len(server.answered) < asked_so_far
    with ChatServer() as server:
        url = f'teacher.base_urls=["{server.url}"]'
        ended = cli("sample", "run.toml", url, cwd=tmp_path)
        assert ended.rc == 0, ended.stderr
    assert "closed_from" not in read_manifest(folder)
    assert asked(tmp_path) == 2 and "error" not in [row["finish_reason"] for row in rollouts(tmp_path)]


def test_clean_takes_only_a_run_and_no_files_of_others(copied, cli):
    cli("sample", "run.toml", "low.sample.temperature=0.9", "--force", cwd=copied)
    aside = copied / "run" / "low" / "sample.replaced-1"
    (aside / "thesis.tex").write_text("years of work")
    ended = cli("clean", "run", "--yes", cwd=copied)
    assert ended.rc == 2 and "thesis.tex, which dasd-lite did not write" in ended.stderr
    assert (aside / "thesis.tex").exists()
    ended = cli("clean", "run/low", "--yes", cwd=copied)
    assert ended.rc == 2 and "holds no run" in ended.stderr


def test_rows_that_come_out_the_same_are_not_trained_on_again(tmp_path, cli):
    """Another reference answer goes through select and pack, and changes no row."""
    questions = [{"prompt": f"Tom has {n} apples and buys 2 more. How many?", "answer": "0"} for n in range(4)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    write_recipe(tmp_path, prompts={"path": "questions.jsonl"}, phase=SMALL["phase"][:1])
    assert cli("run", "run.toml", cwd=tmp_path).rc == 0
    before = (tmp_path / "run/low/train/manifest.json").stat().st_mtime_ns
    file.write_text("".join(json.dumps(row | {"answer": "1"}) + "\n" for row in questions))
    ended = cli("run", "run.toml", cwd=tmp_path)
    assert ended.rc == 0, ended.stderr
    kept = read_table(tmp_path / "run/low/select", "kept")
    assert set(kept["answer"].to_pylist()) == {"1"}
    assert (tmp_path / "run/low/train/manifest.json").stat().st_mtime_ns == before


def test_what_the_trial_spent_counts_whatever_follows(tmp_path, cli):
    with ChatServer() as server:
        paid_recipe(tmp_path, server, teacher={"concurrency": 1})
        rows = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(20)]
        (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ended = cli("run", "run.toml", "teacher.budget={ max_tokens = 200 }", cwd=tmp_path)
        assert ended.rc == 2 and "budget" in ended.stderr
        assert "the trial has answers in run/trial/low/sample" in cli("show", "run/low/sample", cwd=tmp_path).stderr
        shown = cli("check", "run.toml", cwd=tmp_path).stdout
        there = int(re.search(r"run/low/sample: (\d+) of 40 answers are there", shown)[1])
        assert there > 0
        spent = read_counts(tmp_path / "run/trial/low/sample")
        assert spent["completion_tokens"] > 0
        assert cli("sample", "run.toml", "--finish", cwd=tmp_path).rc == 0
        timing = read_timing(tmp_path / "run/low/sample")
        assert {name: timing[name] for name in spent} == spent, "what the trial has paid"
        assert read_manifest(tmp_path / "run/low/sample")["counts"]["prompts"] == -(-there // 2)


def test_check_refuses_what_run_would(copied, cli):
    for option, said in (
        ('reuse=["nowhere"]', "reuse = nowhere: holds no answers or scores of a run"),
        ("out=run.toml", "is a file; choose another folder"),
    ):
        for command in ("check", "run"):
            ended = cli(command, "run.toml", option, cwd=copied)
            assert ended.rc == 2 and said in ended.stderr, (command, ended.stderr)
    (copied / "other" / "low" / "sample").mkdir(parents=True)
    (copied / "other" / "low" / "sample" / "notes.txt").write_text("mine")
    for command in ("check", "run"):
        ended = cli(command, "run.toml", "out=other", cwd=copied)
        assert ended.rc == 2 and "other/low/sample: has files that dasd-lite did not write" in ended.stderr
