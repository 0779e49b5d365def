"""The public door: lazy names without side effects, the chain in fifteen lines, handles, extensions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dasd_lite as dl
from dasd_lite.config.chain import STAGES
from dasd_lite.config.stages import Phase


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()


def test_importing_it_loads_nothing_and_changes_no_environment():
    code = (
        "import os, sys, typing, importlib; before = dict(os.environ), set(sys.modules); import dasd_lite;"
        " print(dict(os.environ) == before[0], sorted(set(sys.modules) - before[1] - {'__future__'}))"
    )
    assert run_python(code) == "True ['dasd_lite']"


def test_names_are_not_shadowed_by_rooms_or_modules():
    """Each name twice: before and after every room has been imported."""
    code = (
        "import importlib, dasd_lite as dl\n"
        "first = {name: getattr(dl, name) for name in dir(dl)}\n"
        "for name in ('run.pipeline', 'run.check', 'report.page', 'report.show.show', 'cli'):\n"
        "    importlib.import_module(f'dasd_lite.{name}')\n"
        "print([name for name in dir(dl) if getattr(dl, name) is not first[name] or isinstance(first[name], type(dl))])"
    )
    assert run_python(code) == "[]"


def test_type_checkers_see_the_same_names():
    stub = Path(dl.__file__).with_suffix(".pyi").read_text()
    typed = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: f"{home}.{name}" for name, home in dl._HOMES.items()}


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="module 'dasd_lite' has no attribute 'smaple'"):
        dl.smaple  # noqa: B018


@pytest.fixture(scope="module")
def chain(demo, tmp_path_factory):
    """The whole chain from Python, on the demo's models."""
    out = tmp_path_factory.mktemp("chain")
    teacher, student = dl.Transformers(model=str(demo / "teacher")), dl.Transformers(model=str(demo / "student"))
    prompts = dl.read_prompts(demo / "train.jsonl", limit=6)
    rollouts = dl.sample(prompts, teacher, temperature=0.6, num_samples=2, max_tokens=160, out=out / "sample")
    scores = dl.score(rollouts, student, out=out / "score")
    kept = dl.select(rollouts, student, scores=scores, rule="count", keep=1, out=out / "select")
    rows = dl.pack(kept, seq_len=256, out=out / "pack")
    options = {"method": dl.Full(), "epochs": 1.0, "micro_batch_size": 1, "grad_accum_steps": 1}
    trained = dl.train(rows, student, **options, out=out / "train")
    evaluation = dl.evaluate(trained, demo / "heldout.jsonl", limit=2, num_samples=1, max_tokens=64, out=out / "eval")
    return {"rollouts": rollouts, "scores": scores, "kept": kept, "rows": rows, "trained": trained, "eval": evaluation}


def test_handles_are_their_folders(chain):
    assert chain["rollouts"].counts == {"prompts": 6, "rollouts": 12}
    assert chain["rollouts"].to_table(["completion"]).num_rows == 12
    assert sum(batch.num_rows for batch in chain["scores"].batches(["uid"], batch_size=5)) == 12
    kept, rejected = chain["kept"].to_table(["uid"]), chain["kept"].rejected.to_table(["reason"])
    assert kept.num_rows + rejected.num_rows == 12
    assert chain["rows"].counts["rollouts"] == kept.num_rows
    assert (chain["trained"].path / "model.safetensors").exists()
    assert chain["trained"].adapter is None
    assert 0 <= chain["eval"].accuracy <= 1
    assert dl.Rollouts(str(chain["rollouts"].folder)) == chain["rollouts"]
    assert chain["rollouts"].manifest["stage"] == "sample"


def test_the_same_call_again_finds_it_finished(chain, demo):
    out = chain["rollouts"].folder
    before = (out / "manifest.json").stat().st_mtime_ns
    prompts, teacher = dl.read_prompts(demo / "train.jsonl", limit=6), dl.Transformers(model=str(demo / "teacher"))
    dl.sample(prompts, teacher, temperature=0.6, num_samples=2, max_tokens=160, out=out)
    assert (out / "manifest.json").stat().st_mtime_ns == before


def test_a_handle_of_another_stage_or_of_an_unfinished_folder_is_refused(chain, tmp_path):
    with pytest.raises(dl.DasdError, match=r"sample: written by sample, but Scores needs a folder of score$"):
        dl.Scores(chain["rollouts"].folder)
    with pytest.raises(dl.DasdError, match=r"written by sample, but Kept needs a folder of select$"):
        dl.pack(chain["rollouts"], out=tmp_path / "pack")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "unfinished.json").write_text("{}")
    with pytest.raises(dl.DasdError, match="begun: the folder is unfinished"):
        dl.Rollouts(tmp_path / "begun")
    with pytest.raises(dl.DasdError, match="gone: the folder does not exist"):
        dl.Rollouts(tmp_path / "gone")
    with pytest.raises(dl.DasdError, match="Model has no table"):
        chain["trained"].to_table()


def test_wrong_options_are_one_line_each(chain, demo, tmp_path):
    with pytest.raises(dl.DasdError) as error:
        dl.pack(chain["kept"], seq_length=5, method="tightest", out=tmp_path / "pack")
    assert str(error.value).splitlines() == [
        "pack.method = 'tightest': should be 'best_fit', 'tight' or 'in_order'",
        "pack.seq_length: unknown key; did you mean 'seq_len'?",
    ]
    with pytest.raises(dl.DasdError, match=r"prompts: the list is empty"):
        dl.sample([], dl.Transformers(model=str(demo / "teacher")), out=tmp_path / "sample")
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_arguments_in_the_wrong_place_are_one_line(chain, demo, tmp_path):
    teacher = dl.Transformers(model="demo:teacher")
    calls = {
        "Rollouts or a folder is needed here, not a Transformers": lambda: dl.score(
            teacher, chain["rollouts"], out="x"
        ),
        "model is a Kept; it must be a Model, a Transformers or Vllm": lambda: dl.train(
            chain["rows"], chain["kept"], out="x"
        ),
        "seed = -1: it must be an integer of at least 0": lambda: dl.pack(chain["kept"], seed=-1, out=tmp_path / "x"),
        "rollouts are longer than a row, the first is": lambda: dl.pack(chain["kept"], seq_len=9, out=tmp_path / "x"),
    }
    for message, call in calls.items():
        with pytest.raises(dl.DasdError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_an_exception_in_a_rule_is_one_line_with_its_place(chain, demo, tmp_path):
    def mine(candidates):
        return candidates.lengths

    message = r"^selection rule \S+mine failed: AttributeError: .* \(\S+test_public\.py:\d+\)$"
    with pytest.raises(dl.DasdError, match=message):
        dl.select(chain["rollouts"], demo / "student", rule=mine, require_think=False, out=tmp_path / "select")


def test_prompts_from_a_list(demo, tmp_path):
    prompts = list(dl.read_prompts(demo / "train.jsonl", limit=2))
    teacher = dl.Transformers(model=str(demo / "teacher"))
    rollouts = dl.sample(prompts, teacher, num_samples=1, max_tokens=16, out=tmp_path / "sample")
    assert rollouts.counts == {"prompts": 2, "rollouts": 2}
    fewer = dl.sample(prompts[:1], teacher, num_samples=1, max_tokens=16, out=tmp_path / "sample")
    assert fewer.counts == {"prompts": 1, "rollouts": 1}
    assert fewer.to_table(["prompt_uid"]).to_pylist() == [{"prompt_uid": prompts[0].uid}]
    with pytest.raises(dl.DasdError, match=r"made with another configuration \(temperature: 1\.0 there, 0\.5 now\)"):
        dl.sample(prompts, teacher, num_samples=1, max_tokens=16, temperature=0.5, out=tmp_path / "sample")


def test_a_limit_holds_for_prompts_that_have_been_read(demo, tmp_path):
    prompts, student = dl.read_prompts(demo / "heldout.jsonl"), dl.Transformers(model=str(demo / "student"))
    evaluation = dl.evaluate(student, prompts, limit=1, num_samples=1, max_tokens=4, out=tmp_path / "evaluate")
    assert (evaluation.counts["questions"], evaluation.counts["samples"]) == (1, 1)
    assert evaluation.manifest["config"]["grader"] == "auto"


def test_unknown_columns_are_one_line(chain):
    kept, message = chain["kept"], r"\.parquet: has no column 'nope'; it has uid, prompt_uid, messages, [a-z_, ]+;"
    with pytest.raises(dl.DasdError, match=message):
        kept.to_table(["uid", "nope"])
    with pytest.raises(dl.DasdError, match=message):
        next(kept.batches(["nope"]))


def test_wrong_arguments_are_one_line_before_anything_is_written(chain, demo, tmp_path):
    student = dl.Transformers(model=str(demo / "student"))
    calls = {
        r"ingest\.paths is not set": lambda out: dl.ingest(out=out),
        r"prompts: '1' is not a Prompt": lambda out: dl.sample([1, 2], student, out=out),
        r"prompts: '5' is neither a list": lambda out: dl.sample(5, student, out=out),
        r"sample: config = \{'keep': 1\}: should be a SampleConfig": lambda out: dl.sample(
            demo / "train.jsonl", student, config={"keep": 1}, out=out
        ),
        r"student = '3': should be a Transformers or Vllm table": lambda out: dl.score(chain["rollouts"], 3, out=out),
        r"model = 'nowhere': no such folder, and not the name": lambda out: dl.evaluate(
            "nowhere", demo / "heldout.jsonl", out=out
        ),
    }
    for message, call in calls.items():
        with pytest.raises(dl.DasdError, match=message) as error:
            call(tmp_path / "out")
        assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_student_and_a_path_have_several_spellings(chain, demo, tmp_path):
    for student in (dl.Transformers(model=str(demo / "student")), str(demo / "student"), demo / "student"):
        scored = dl.score(str(chain["rollouts"].folder), student, out=chain["scores"].folder)
        assert scored == chain["scores"]
    with pytest.raises(dl.DasdError, match=r"holds no run \(no recipe\.json\)"):
        dl.RunFolder(str(tmp_path)).recipe()
    with pytest.raises(dl.DasdError, match=r"holds no run \(no recipe\.json\)"):
        dl.write_report(dl.RunFolder(tmp_path))
    with pytest.raises(dl.DasdError, match=r"r\.toml: no such file"):
        dl.load_recipe(str(tmp_path / "r.toml"))


def test_stage_functions_have_like_signatures():
    import inspect

    for stage in STAGES:
        parameters = inspect.signature(getattr(dl, stage)).parameters
        assert {"config", "out", "force", "options"} <= parameters.keys(), stage
        assert parameters["out"].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters["out"].default is inspect.Parameter.empty
        assert parameters["config"].default is None
        assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
        assert "seed" not in parameters or parameters["seed"].default == 0


# Parameters that have the name of an option because they are the option, also as an object.
SAME_THING = {
    ("ingest", "paths"),
    ("select", "rule"),
    ("train", "objective"),
    ("evaluate", "prompts"),
    ("evaluate", "grader"),
}


def test_no_parameter_hides_an_option():
    import inspect

    hidden = {
        (stage, name)
        for stage in STAGES
        for name in inspect.signature(getattr(dl, stage)).parameters
        if name in Phase.model_fields[stage].annotation.model_fields
    }
    assert hidden <= SAME_THING


def test_replay_is_an_option_like_any_other(chain, tmp_path):
    with pytest.raises(dl.DasdError, match=r"pack\.replay = 1\.0 adds rollouts of an earlier phase"):
        dl.pack(chain["kept"], replay=1.0, out=tmp_path / "pack")
    rows = dl.pack(chain["kept"], replay=1.0, earlier=chain["kept"], seq_len=256, out=tmp_path / "pack")
    assert rows.counts["replayed"] == rows.counts["rollouts"] / 2


@pytest.mark.parametrize(
    "make, lines",
    [
        (
            lambda: dl.Endpoint(model="x", base_url=["http://localhost"]),
            [
                "Endpoint.base_urls is missing: URLs of servers that all serve this model, each ending in /v1. Each"
                " request goes to the least busy one.",
                "Endpoint.base_url: unknown key; did you mean 'base_urls'?",
            ],
        ),
        (lambda: dl.Lora(rank=0), ["Lora.rank = 0: should be greater than 0"]),
        (lambda: dl.Weighting(lam="x"), ["Weighting.lam = 'x': should be a valid number"]),
        (
            lambda: dl.Endpoint(model="x", base_urls=["u"], budget={"max_cost": -1.0}),
            ["Endpoint.budget.max_cost = -1.0: should be greater than 0"],
        ),
        (
            lambda: dl.CustomTeacher(kind="x"),
            ["CustomTeacher.kind = 'x': should be a sampler of your own"],
        ),
    ],
)
def test_a_wrong_table_is_a_line_for_each_mistake(make, lines):
    with pytest.raises(dl.DasdError) as error:
        make()
    raised = str(error.value).splitlines()
    assert len(raised) == len(lines)
    assert all(line.startswith(expected) for line, expected in zip(raised, lines, strict=True))
