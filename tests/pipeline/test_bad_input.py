"""Bad input: exit code 2, one line that says where, what, and what would be right; nothing is half-written."""

import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.kills import started, wait_for
from tests.server import ChatServer

from dasd_lite.data.dataset import batches
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import Identity, read_manifest
from dasd_lite.data.records import KEPT, ROLLOUT
from dasd_lite.data.writer import ShardWriter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path, small_recipe):
    """A folder with a run.toml; `project.edit("old", "new")` changes it."""

    class Project:
        folder = tmp_path
        run = tmp_path / "run"
        recipe = small_recipe(tmp_path)

        def edit(self, old, new):
            text = self.recipe.read_text(encoding="utf-8")
            assert old in text
            self.recipe.write_text(text.replace(old, new, 1), encoding="utf-8")

        def questions(self, *rows):
            lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
            (tmp_path / "q.jsonl").write_bytes(b"\n".join(lines))
            return "prompts.path=q.jsonl"

    return Project()


def assert_refused(ended, *words, lines=1, run=None):
    """Check that there are so many lines of errors that hold the words, exit code 2, and nothing finished."""
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.rc == 2, (ended.rc, ended.stderr)
    errors = ended.stderr.splitlines()
    assert len(errors) == lines, ended.stderr
    assert all(line.startswith("dasd-lite: ") for line in errors)
    for word in words:
        assert word in ended.stderr, f"{word!r} is not in {ended.stderr!r}"
    if run is not None:
        assert not list(run.rglob("manifest.json")), "a folder was finished"
        assert not list(run.rglob("*.parquet")), "a file was half-written"
        assert not (run / "recipe.json").exists()


# --- the recipe -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "check", "sample", "report"])
def test_missing_recipe(project, cli, command):
    ended = cli(command, "gone.toml", cwd=project.folder)
    assert_refused(ended, "gone.toml: no such file", "`dasd-lite init demo` writes one")
    assert not project.run.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "gone.toml"], "gone.toml: no such file"),
        (["check", "run.toml", "prompts.path=gone.jsonl", "evaluate={}"], "gone.jsonl: no such file"),
        (["show", "run/low/sample"], "run/low/sample: "),
    ],
)
def test_in_a_process_of_its_own(project, cli_process, args, words):
    ended = cli_process(*args, cwd=project.folder)
    assert_refused(ended, words, run=project.run)
    assert ended.stdout == ""


def test_faults_of_the_recipe_all_at_once(project, cli):
    project.edit("num_samples = 2", "num_sample = 2")
    project.edit("max_tokens = 192", 'max_tokens = "many"')
    project.edit("seq_len = 512", "seq_len = -1")
    project.edit("epochs = 1", "zzz = 1")
    ended = cli("run", "run.toml", "select.keep=0", cwd=project.folder)
    assert_refused(
        ended,
        "run.toml:17: sample.num_sample: unknown key; did you mean 'num_samples'?",
        "run.toml:18: sample.max_tokens = 'many': should be a valid integer",
        "run.toml:26: pack.seq_len = -1: should be greater than 0",
        "run.toml:29: train.zzz: unknown key; train has beta1, beta2",
        "command line: select.keep = 0: should be greater than 0",
        lines=5,
    )
    assert not project.run.exists()


# --- questions ------------------------------------------------------------------------------------------

GOOD = {"uid": "a", "prompt": "What?", "answer": "1"}
BAD_QUESTIONS = {
    "empty prompt": (
        [GOOD, {"uid": "b", "prompt": "  "}],
        ["q.jsonl:2: the prompt is empty; the last message must be a user's, with text"],
    ),
    "no prompts": ([b""], ["q.jsonl: contains no prompts"]),
    "duplicate uid": (
        [GOOD, GOOD | {"prompt": "Which?"}],
        ["q.jsonl:2: same uid 'a' as q.jsonl:1; uids must be unique"],
    ),
    "malformed line": ([GOOD, b'{"prompt": "x"'], ["q.jsonl:2: not JSON: Expecting", "column 15"]),
    "not UTF-8": ([GOOD, b'{"prompt": "\xe9"}'], ["q.jsonl:2: not UTF-8: byte 0xe9 at column 13"]),
    "half a character": ([b'{"prompt": "\\ud83d"}'], ["q.jsonl:1: not UTF-8", "\\ud83d"]),
    "no key of ours": ([{"text": "x"}], ["q.jsonl:1: has text; a row needs `prompt` or `messages`, or a map"]),
}


@pytest.mark.parametrize("case", BAD_QUESTIONS)
@pytest.mark.parametrize("command", ["run", "check"])
def test_bad_questions(project, cli, case, command):
    rows, words = BAD_QUESTIONS[case]
    ended = cli(command, "run.toml", project.questions(*rows), "evaluate={}", cwd=project.folder)
    assert_refused(ended, *words, run=project.run)


def test_all_faults_of_a_file_of_questions_at_once(project, cli):
    override = project.questions(*[GOOD, b"nonsense", {"prompt": ["a"]}] * 20)
    ended = cli("check", "run.toml", override, "evaluate={}", cwd=project.folder)
    assert_refused(
        ended, "q.jsonl:2: not JSON", "q.jsonl: and 20 more rows that cannot be read", lines=21, run=project.run
    )
    assert all(line.startswith("dasd-lite: prompts.path: q.jsonl") for line in ended.stderr.splitlines())


def test_missing_questions(project, cli):
    for command in ("run", "check"):
        ended = cli(command, "run.toml", "prompts.path=gone.jsonl", "evaluate={}", cwd=project.folder)
        assert_refused(ended, "gone.jsonl: no such file", run=project.run)


def test_questions_to_evaluate_on_without_answers(project, cli):
    project.questions(GOOD, {"uid": "b", "prompt": "Which?"})
    for command in ("run", "check"):
        ended = cli(command, "run.toml", "evaluate.prompts=q.jsonl", cwd=project.folder)
        assert_refused(ended, "q.jsonl", "b", "answer", run=project.run)


def test_a_teacher_without_thinking(project, cli, demo):
    silent = project.folder / "silent"
    shutil.copytree(demo / "teacher", silent)
    for path in (*silent.glob("*.json"), *silent.glob("*.jinja")):
        path.write_text(path.read_text(encoding="utf-8").replace("think", "mutter"), encoding="utf-8")
    overrides = ("teacher.model='silent'", "select.require_think=true", "evaluate={}")
    ended = cli("check", "run.toml", *overrides, cwd=project.folder)
    assert_refused(ended, "teacher: neither its template nor its vocabulary", "select.require_think = false")
    assert cli("check", "run.toml", *overrides[:1], "evaluate={}", cwd=project.folder).rc == 0


def test_a_prompt_longer_than_the_context(project, cli):
    override = project.questions(GOOD, {"uid": "long one", "prompt": "far too long " * 500})
    ended = cli("check", "run.toml", override, "evaluate={}", cwd=project.folder)
    assert_refused(ended, "prompt long one has", "tokens, but the context of", "prompts.skip_overlong = true", lines=2)
    assert "dasd-lite: student: " in ended.stderr and "dasd-lite: teacher: " in ended.stderr
    ended = cli("run", "run.toml", override, "evaluate={}", "teacher.batch_size=1", cwd=project.folder)
    assert_refused(
        ended,
        "prompt 'far too long ",
        "tokens exceed the context of",
        "/teacher, ",
        " tokens; shorten",
        run=project.run,
    )


# --- models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_folders_that_are_not_models(project, cli, role):
    (project.folder / "empty").mkdir()
    for name, words in (("./gone", "no such folder"), ("./empty", "not a model folder: it has no config.json")):
        for command in ("run", "check"):
            ended = cli(command, "run.toml", f"{role}.model={name}", "evaluate={}", cwd=project.folder)
            assert_refused(ended, f"model = '{name if 'gone' in name else 'empty'}': {words}", run=project.run)


def test_a_model_that_is_neither_here_nor_on_the_hub(project, cli):
    ended = cli("check", "run.toml", "student.model=nobody/has-this", cwd=project.folder)
    assert_refused(ended, "student: model = 'nobody/has-this': no such folder, and the hub download failed")


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_tokenizer_without_chat_template(project, cli, demo, role):
    shutil.copytree(demo / role, project.folder / "bare")
    (project.folder / "bare" / "chat_template.jinja").unlink()
    for command in ("run", "check") if role == "teacher" else ("select", "check"):
        ended = cli(
            command, "run.toml", f"{role}.model=./bare", "evaluate={}", "select.rule=random", cwd=project.folder
        )
        assert_refused(
            ended,
            "bare: the tokenizer has no chat template",
            "add a chat_template.jinja to the folder",
            run=project.run,
        )


# --- folders --------------------------------------------------------------------------------------------


def test_an_output_folder_made_with_another_configuration(finished, tmp_path, cli):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    ended = cli("run", "run.toml", "sample.top_p=0.5", cwd=tmp_path)
    assert_refused(ended, "run/low/sample: made with another configuration (top_p: 1.0 there, 0.5 now)", "--force")
    assert read_manifest(tmp_path / "run" / "low" / "sample")["config"]["top_p"] == 1.0


def test_an_output_folder_with_other_files(project, cli):
    (project.run / "low" / "sample").mkdir(parents=True)
    (project.run / "low" / "sample" / "thesis.tex").write_text("mine")
    ended = cli("sample", "run.toml", cwd=project.folder)
    assert_refused(ended, "run/low/sample: has files that dasd-lite did not write; choose another folder or remove it")
    assert (project.run / "low" / "sample" / "thesis.tex").read_text() == "mine"


def test_an_output_folder_that_is_a_file(project, cli):
    project.run.write_text("mine")
    ended = cli("run", "run.toml", cwd=project.folder)
    assert_refused(ended, "run: run is a file", "choose another")
    assert project.run.read_text() == "mine"


def test_a_stage_before_its_input(project, cli):
    for stage, before in (
        ("score", "low/sample"),
        ("select", "low/sample"),
        ("pack", "low/select"),
        ("train", "low/pack"),
    ):
        ended = cli(stage, "run.toml", "--phase", "low", cwd=project.folder)
        assert_refused(ended, f"run/{before}: the folder does not exist", "run its stage first")
    ended = cli("report", "run.toml", cwd=project.folder)
    assert ended.rc == 2, ended.stderr
    assert_refused(cli("show", "run/low/sample", cwd=project.folder), "run/low/sample")


def test_two_processes_on_one_run_folder(project, cli):
    project.run.mkdir()
    with (project.run / ".lock").open("w") as lock:  # as another process would
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        ended = cli("run", "run.toml", cwd=project.folder)
        assert_refused(ended, f"run: in use by process {os.getpid()}; wait for it to end, or stop it", run=project.run)
    assert [path.name for path in project.run.iterdir()] == [".lock"]


# --- rows -----------------------------------------------------------------------------------------------


def test_every_candidate_rejected(finished, tmp_path, cli):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "low" / "select")
    ended = cli("select", "run.toml", "--phase", "low", "select.max_tokens=3", cwd=tmp_path)
    assert_refused(ended, "run/low/sample: all 16 candidates are rejected: ", "too long ")
    assert not (tmp_path / "run" / "low" / "select").exists()


def test_a_rollout_with_no_supervised_token(finished, tmp_path, cli):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "run" / "low" / "select"
    manifest = read_manifest(folder)
    rows = [row for batch in batches(folder, "kept") for row in batch.to_pylist()]
    rows[2]["num_context_tokens"] = len(rows[2]["ids"])
    identity = Identity(manifest["stage"], manifest["version"], manifest["config"], manifest["inputs"])
    import pyarrow as pa

    with ShardWriter(folder, identity, {"kept": KEPT}) as writer:
        writer.write("kept", pa.Table.from_pylist(rows, schema=KEPT))
        writer.publish(manifest["counts"])
    shutil.rmtree(tmp_path / "run" / "low" / "pack")
    ended = cli("pack", "run.toml", "--phase", "low", cwd=tmp_path)
    tokens = len(rows[2]["ids"])
    assert_refused(
        ended, f"1 rollouts have no token to learn, the first is {rows[2]['uid']}: {tokens} tokens, {tokens} of"
    )
    assert not (tmp_path / "run" / "low" / "pack").exists()


def test_a_log_probability_that_is_nan(finished, tmp_path, cli):
    """The rollouts come through the journal, as those of a teacher do."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "run" / "low" / "sample"
    manifest = read_manifest(folder)
    rows = [row for batch in batches(folder, "rollouts") for row in batch.to_pylist()]
    rows[11]["logprobs"][1] = np.nan
    identity = Identity(manifest["stage"], manifest["version"], manifest["config"], manifest["inputs"])
    shutil.rmtree(folder)
    with Journal(folder, identity, ROLLOUT, len(rows)) as journal:
        journal.commit(dict(enumerate(rows)))
        journal.publish(manifest["counts"])
    shutil.rmtree(tmp_path / "run" / "low" / "score")
    ended = cli("score", "run.toml", cwd=tmp_path)
    assert_refused(ended, f"run/low/sample: rollout {rows[11]['uid']}: ", "teacher_logprobs[1] is NaN; it must be")
    assert not (tmp_path / "run" / "low" / "score" / "manifest.json").exists()


# --- Ctrl-C, full disks -----------------------------------------------------------------------------------


def test_ctrl_c_is_one_line_and_the_same_command_resumes(project, small_recipe, cli):
    """Press Ctrl-C while the server holds a reply, so that the command cannot have ended before."""
    with ChatServer() as server:
        teacher = {"kind": "endpoint", "model": "teacher", "base_urls": [server.url], "concurrency": 4}
        prompts = {"path": "demo:train.jsonl", "limit": 40}
        small_recipe(project.folder, teacher=teacher, prompts=prompts, phase=[{"name": "low"}])
        held = server.hold(60)  # the probe sends fewer requests, and 80 answers follow
        with started("sample", "run.toml", cwd=project.folder) as process:
            wait_for(held, process)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate()
        server.drop_held()
        assert process.returncode == 130, errors
        assert errors.splitlines()[-1].startswith("dasd-lite: stopped; ") and "Traceback" not in errors
        ended = cli("sample", "run.toml", cwd=project.folder)
        assert ended.rc == 0, ended.stderr
    assert read_manifest(project.run / "low" / "sample")["counts"]["rollouts"] == 80
    answered = [(b["messages"][-1]["content"], b["seed"]) for b in server.answered if b["max_tokens"] == 192]
    assert len(set(answered)) == 80 and len(answered) <= 84, "committed answers are not sampled again"


NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount():
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(
            [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
        ).returncode
    )


def same_rows(one, other):
    """Return whether two tables are equal up to rounding: the rest of a batch is sampled in another batch."""
    a, b = pq.read_table(one), pq.read_table(other)

    def equal(name):
        x, y = a[name].combine_chunks(), b[name].combine_chunks()
        kind = x.type.value_type if pa.types.is_list(x.type) or pa.types.is_large_list(x.type) else x.type
        if not pa.types.is_floating(kind):
            return x.equals(y)
        x, y = ((v.flatten() if kind != v.type else v).to_numpy(zero_copy_only=False) for v in (x, y))
        return x.shape == y.shape and np.allclose(x, y, atol=1e-5, equal_nan=True)

    names = [name for name in a.column_names if name != "key"]  # a hash of the numbers
    return a.schema == b.schema and len(a) == len(b) and all(map(equal, names))


@pytest.mark.skipif(not may_mount(), reason="this machine does not allow mounts in a user namespace")
@pytest.mark.parametrize("growth", [1.6, pytest.param(1.1, marks=pytest.mark.slow)])
def test_no_space_left_on_the_device(project, finished, tmp_path, growth):
    """On a disk that grows bit by bit, the same command stops at every kind of write, resumes, and finishes."""
    disk = tmp_path / "run"
    disk.mkdir()
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", ATTEMPTS, str(disk), str(growth)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *failed, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert last["rc"] == 0
    assert len({attempt["err"] for attempt in failed}) > 3, "several stages met a full disk"
    for attempt in failed:
        assert attempt["rc"] == 2, attempt["err"]
        (line,) = attempt["err"].splitlines()
        assert "no space left on the device; " in line and "run the same command" in line
    for before, after in itertools.pairwise([*failed, last]):
        assert after["finished"] >= before["finished"], "finished stages stay"
        assert after["committed"] >= before["committed"] or after["finished"] > before["finished"], (
            "committed items stay"
        )
    expected = {path.relative_to(finished / "run"): path for path in (finished / "run").rglob("*.parquet")}
    copied = {path.relative_to(tmp_path / "copy"): path for path in (tmp_path / "copy").rglob("*.parquet")}
    assert expected.keys() == copied.keys()
    assert [str(name) for name, path in expected.items() if not same_rows(path, copied[name])] == []


# Mounts a small disk and runs the recipe on it again and again; after each failure the disk gets a little larger.
ATTEMPTS = r"""
import json, shutil, sqlite3, subprocess, sys
from pathlib import Path
from tests.kills import preload, run_in_fork
disk, size = Path(sys.argv[1]), 60
def mount(*options):
    subprocess.run(["mount", *options, str(disk)], check=True)
mount("-t", "tmpfs", "-o", f"size={size}k", "none")
preload()
def committed():
    count = 0
    for path in disk.rglob("journal.sqlite"):
        copy = disk.parent / "journal"  # on another disk: on a full one SQLite cannot even read
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for part in (path, path.with_name("journal.sqlite-wal")):
            if part.exists():
                shutil.copy(part, copy)
        db = sqlite3.connect(copy / path.name)
        try:
            count += db.execute("SELECT count(*) FROM items").fetchone()[0]
            count += db.execute("SELECT coalesce(sum(rows), 0) FROM shards").fetchone()[0]  # in a shard
        except sqlite3.OperationalError as error:
            assert "no such table" in str(error)  # it failed before that
        db.close()
    return count
rc = 2
while rc == 2 and size < 1_000_000:
    rc = run_in_fork(["run", "run.toml"])
    finished, err = len(list(disk.rglob("manifest.json"))), Path("stderr.txt").read_text()
    print(json.dumps({"rc": rc, "err": err, "finished": finished, "committed": committed(), "size": size}), flush=True)
    size = int(size * float(sys.argv[2]))
    mount("-o", f"remount,size={size}k")
shutil.copytree(disk, disk.parent / "copy")
"""
