"""A recipe whose sampler, selection rule, objective and grader are code that lies beside it."""

import textwrap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dasd_lite as dl
from dasd_lite.data.dataset import read_table
from dasd_lite.errors import CheckpointError
from dasd_lite.inference import Completion

CODE = '''
import torch
from dasd_lite.config.models import Transformers
from dasd_lite.grading.grade import Grade
from dasd_lite.inference.local import TransformersSampler


class Teacher:
    """Hands everything on to transformers."""

    def __init__(self, folder, batch_size=8):
        self.inner = TransformersSampler(Transformers(model=folder, batch_size=batch_size))

    def complete(self, requests, params):
        yield from self.inner.complete(requests, params)

    def status(self):
        return ""

    def close(self):
        self.inner.close()


def longest(candidates):
    return candidates.num_tokens


class ByLength:
    def __init__(self, sign):
        self.sign = sign

    def __call__(self, candidates):
        return self.sign * candidates.num_tokens


short, long = ByLength(-1), ByLength(1)


class Sft:
    def per_token(self, logits_CV, target_ids_C, tokens):
        return -torch.log_softmax(logits_CV.float(), -1).gather(-1, target_ids_C[:, None])[:, 0]

    def loss(self, per_token_N, targets):
        total = per_token_N.sum()
        return total / targets.num_step, {"loss": total.detach()}


sft = Sft()


class Rewarded(Sft):
    needs = ("rewards", "weight")


class Distilled(Sft):
    needs = ("teacher_logprobs",)


def generous(completion, answer):
    return Grade("right", answer)


def wrong_shape(candidates):
    return candidates.num_tokens[:-1]


def wrong_signature(candidates, more):
    return candidates.num_tokens


def no_grade(completion, answer):
    return True
'''
RECIPE = """
out = "run"
prompts = {{ path = "{demo}/train.jsonl", limit = 4 }}
student = {{ kind = "transformers", model = "{demo}/student" }}
teacher = {{ kind = "{code}:Teacher", options = {{ folder = "{demo}/teacher", batch_size = 4 }} }}
sample = {{ num_samples = 3, max_tokens = 160, temperature = 0.8 }}
select = {{ rule = "{code}:longest", keep = 1 }}
pack.seq_len = 256
train = {{ objective = "{code}:Sft", epochs = 1, micro_batch_size = 1, grad_accum_steps = 4, monitor_questions = 0 }}
[evaluate]
prompts = "{demo}/heldout.jsonl"
limit = 3
num_samples = 1
max_tokens = 200
grader = "{code}:generous"
[[phase]]
name = "low"
"""


@pytest.fixture
def folder(tmp_path, demo, request):
    """A recipe with its code beside it, under a name of its own: modules stay imported."""
    code = f"own_code_{abs(hash(request.node.name))}"
    (tmp_path / f"{code}.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "run.toml").write_text(RECIPE.format(demo=demo, code=code))
    return tmp_path, code


def test_a_recipe_runs_code_of_its_own(folder, cli):
    path, code = folder
    checked = cli("check", "run.toml", cwd=path)
    assert checked.rc == 0, checked.stderr
    for key, name in {
        "teacher.kind": "Teacher",
        "select.rule": "longest",
        "train.objective": "Sft",
        "evaluate.grader": "generous",
    }.items():
        assert f"code: {key} = '{code}:{name}' will be imported and run" in checked.stdout
    ran = cli("run", "run.toml", cwd=path)
    assert ran.rc == 0, ran.stderr
    run = dl.RunFolder(path / "run")
    kept, rejected = (longest_answers(run.stage("low", "select"), table) for table in ("kept", "rejected"))
    assert len(kept) == 4
    assert all(rejected[prompt] <= kept[prompt] for prompt in kept)
    evaluation = dl.Evaluation(run.stage("low", "evaluate"))
    assert evaluation.counts["wrong"] == 0
    assert evaluation.counts["right"] + evaluation.counts["truncated"] == 3
    assert evaluation.counts["right"] > 0
    assert cli("run", "run.toml", cwd=path).stdout.startswith("Nothing to do.")


def longest_answers(folder, table):
    """Tokens of the longest answer to each prompt."""
    lengths = {}
    for row in read_table(folder, table, ["prompt_uid", "ids", "num_context_tokens"]).to_pylist():
        lengths.setdefault(row["prompt_uid"], []).append(len(row["ids"]) - row["num_context_tokens"])
    return {prompt: max(values) for prompt, values in lengths.items()}


def test_changed_code_is_another_configuration(folder, cli):
    path, code = folder
    assert cli("sample", "run.toml", cwd=path).rc == 0
    module = path / f"{code}.py"
    module.write_text(module.read_text() + "\n# changed\n")
    ended = cli("sample", "run.toml", cwd=path)
    assert ended.rc == 2
    assert "low/sample: made with another configuration (teacher: " in ended.stderr


def test_instances_are_known_by_the_name_in_the_recipe_and_by_their_attributes(folder, cli):
    """Each stage alone accepts what `run` made with them, also in two processes; another instance is other code."""
    path, code = folder

    def run(command, rule="short"):
        names = [f"select.rule='{code}:{rule}'", f"train.objective='{code}:sft'", "train.num_processes=2"]
        return cli(command, "run.toml", *names, cwd=path)

    ran = run("run")
    assert ran.rc == 0, ran.stderr
    folder = dl.RunFolder(path / "run").stage("low", "select")
    kept, rejected = (longest_answers(folder, table) for table in ("kept", "rejected"))
    assert all(kept[prompt] <= rejected[prompt] for prompt in kept)
    assert dl.Kept(folder).manifest["config"]["rule"] == f"{code}:short"
    for command in ("run", "select", "pack", "train", "evaluate"):
        again = run(command)
        assert again.rc == 0, again.stderr
        assert again.stdout.startswith("Nothing to do."), again.stdout
    other = run("select", "long")
    assert other.rc == 2 and "low/select: made with another configuration" in other.stderr
    assert "; rule has changed)" in other.stderr


class Echo:
    """A sampler that is handed over."""

    def __init__(self, text):
        self.text = text

    def complete(self, requests, params):
        for request in requests:
            yield Completion(request.position, self.text)

    def status(self):
        return ""

    def close(self):
        """Do nothing."""


def test_another_sampler_of_the_same_class_is_another_configuration(tmp_path, demo):
    prompts = dl.read_prompts(demo / "train.jsonl", limit=2)

    def answers(text):
        made = dl.sample(prompts, Echo(text), out=tmp_path / "sample", num_samples=1)
        return made.to_table(["completion"])["completion"].to_pylist()

    assert answers("a") == ["a", "a"] == answers("a")
    with pytest.raises(CheckpointError, match="teacher: Echo has changed"):
        answers("b")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["select.rule='gone.module:rule'"], "select.rule = 'gone.module:rule': the selection rule cannot be imported"),
        (["select.rule='CODE:nothing'"], "select.rule = 'CODE:nothing': module 'CODE' has no attribute 'nothing'"),
        (["select.rule='CODE:wrong_signature'"], "select.rule: CODE:wrong_signature(candidates, more) cannot be a"),
        (["select.rule='CODE:ByLength'"], "select.rule: CODE:ByLength is a class; a selection rule is an instance or"),
        (["train.objective='CODE:longest'"], "train.objective: CODE:longest has no function per_token("),
        (["evaluate.grader='CODE:Sft'"], "evaluate.grader: CODE:Sft is a class; a grader is an instance or a function"),
        (
            ["teacher.kind='CODE:longest'"],
            "teacher.kind = 'CODE:longest' is not a class; a sampler is named by its class",
        ),
        (["teacher.kind='CODE:Sft'"], "teacher.kind: CODE:Sft has no method `complete`"),
        (["teacher.options={ folders = 'x' }"], "teacher.options: CODE:Teacher does not accept {'folders': 'x'}"),
        (["select.rule='longer'"], "select.rule = 'longer': should be 'count', "),
    ],
)
def test_code_that_is_not_what_its_key_asks_for_is_one_line(folder, cli, overrides, message):
    path, code = folder
    ended = cli("check", "run.toml", *(override.replace("CODE", code) for override in overrides), cwd=path)
    assert ended.rc == 2
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert message.replace("CODE", code) in ended.stderr
    assert not (path / "run").exists(), "nothing half-written"


def test_code_is_imported_before_the_first_step(folder, cli):
    path, _ = folder
    ended = cli("run", "run.toml", "select.rule='gone.module:rule'", cwd=path)
    assert (ended.rc, ended.stderr.count("cannot be imported")) == (2, 1)
    assert not (path / "run").exists(), "nothing sampled"


def test_columns_that_an_objective_needs_are_checked(folder, cli):
    path, code = folder

    def check(*overrides, objective="Rewarded"):
        names = [f"train.objective='{code}:{objective}'", "select.keep=2", *overrides]
        return cli("check", "run.toml", *names, cwd=path)

    key = f"phase 'low': train.objective = '{code}:Rewarded'"
    assert check().stderr.splitlines() == [
        f"dasd-lite: {key} needs weights; set select.weighting, e.g. {{ effective_sample_size = 0.7 }}",
        f"dasd-lite: {key} needs the column 'rewards'; set pack.columns to a Parquet file with uid and rewards",
    ]
    given = ["select.weighting={}", "pack.columns='columns.parquet'"]
    waiting = check(*given)
    assert waiting.rc == 0, waiting.stderr
    assert "columns.parquet: no such file yet; before pack runs it must be a Parquet file with uid and rewards" in (
        waiting.stdout
    )
    columns = path / "columns.parquet"
    columns.write_text("uid,rewards")
    assert f"{key}: pack.columns = columns.parquet: not a Parquet file (" in check(*given).stderr
    pq.write_table(pa.table({"uid": ["a"], "reward": [1.0]}), columns)
    lacking = check(*given)
    assert lacking.rc == 2
    assert lacking.stderr == (
        f"dasd-lite: {key}: pack.columns = columns.parquet: has no column 'rewards'; it has uid, reward\n"
    )
    pq.write_table(pa.table({"uid": ["a"], "rewards": [1.0]}), columns)
    assert check(*given).rc == 0
    assert check(objective="Distilled").rc == 0


def test_results_of_the_wrong_shape_are_one_line(folder, cli):
    path, code = folder
    ended = cli("run", "run.toml", f"select.rule='{code}:wrong_shape'", cwd=path)
    assert ended.rc == 2
    assert f"{code}:wrong_shape" in ended.stderr
    assert "12" in ended.stderr and "11" in ended.stderr
    assert not (path / "run" / "low" / "select").exists(), "nothing half-written"
    ended = cli("evaluate", "run.toml", f"evaluate.grader='{code}:no_grade'", "out='other'", cwd=path)
    assert ended.rc == 2
    assert len(ended.stderr.splitlines()) == 1
    assert f"{code}:no_grade" in ended.stderr and "True" in ended.stderr
