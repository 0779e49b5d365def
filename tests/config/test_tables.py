"""The tables: documented, with the paper's defaults, and with one list of stages and of built-in names."""

import math
from pathlib import Path

import pytest

from dasd_lite import grading
from dasd_lite.config import evaluate, models, stages, train
from dasd_lite.config.chain import SOURCES, STAGES
from dasd_lite.config.models import CustomTeacher, Endpoint, Transformers, Vllm
from dasd_lite.config.stages import Phase, RecipeConfig, SelectConfig, Weighting
from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.errors import ConfigError
from dasd_lite.method import selection
from dasd_lite.training import objectives


def test_every_option_is_documented():
    waiting, seen = [RecipeConfig], set()
    while waiting:
        table = waiting.pop()
        seen.add(table)
        for name, field in table.model_fields.items():
            inner = tables_in(field.annotation)
            waiting += [model for model in inner if model not in seen]
            assert field.description or inner or name == "kind", f"{table.__name__}.{name}"
    assert len(seen) >= 19


def tables_in(annotation):
    if isinstance(annotation, type):
        return [annotation] if hasattr(annotation, "model_fields") else []
    return [model for part in getattr(annotation, "__args__", ()) for model in tables_in(part)]


def test_defaults_are_the_papers():
    phase = Phase(name="x")
    assert (phase.select.rule, phase.select.beta, phase.mix.max_length_ratio) == ("count", 0.1, 1.5)
    assert (phase.pack.seq_len, phase.train.epochs, phase.train.beta2) == (65536, 6.0, 0.95)
    assert math.isclose(phase.train.learning_rate / phase.train.min_learning_rate, 5)


def test_every_stage_has_a_table():
    assert set(Phase.model_fields) - {"name", "source"} == set(STAGES)


def test_built_in_names_are_those_that_exist():
    assert set(train.OBJECTIVES) == set(objectives.OBJECTIVES)
    assert [grading.open_grader(name).name for name in evaluate.GRADERS] == list(evaluate.GRADERS)
    assert set(stages.RULES) == {*selection.RULES, "all"}
    assert all(repr(rule) in stages.NEED_NO_LOGPROBS for rule in set(stages.RULES) - set(stages.CLASS_RULES))


# --- the stages of a phase ----------------------------------------------------------------------------


def phase(**options):
    return Phase.model_validate({"name": "x", **options})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "sample score select pack train"),
        ({"evaluate": {"prompts": "q.jsonl"}}, "sample score select pack train evaluate"),
        ({"select": {"rule": "random"}}, "sample select pack train"),
        ({"select": {"rule": "mine:rule"}}, "sample score select pack train"),
        ({"select": {"rule": "mine:rule"}, "score": {"when": "never"}}, "sample select pack train"),
        ({"select": {"rule": "random"}, "score": {"when": "always"}}, "sample score select pack train"),
        ({"source": "mix", "select": {"rule": "all"}}, "mix select pack train"),
        ({"source": "mix", "select": {"rule": "mine:rule"}}, "mix select pack train"),
        ({"source": "ingest", "ingest": {"paths": ["a.jsonl"]}}, "ingest score select pack train"),
        ({"source": "replay"}, "pack train"),
        ({"source": "replay", "evaluate": {"prompts": "t.jsonl"}}, "pack train evaluate"),
        ({"select": {"rule": "all", "weighting": {}}}, "sample select pack train"),
        ({"select": {"rule": "all", "weighting": {}}, "score": {"by": "teacher"}}, "sample score select pack train"),
        (
            {"select": {"rule": "all", "weighting": {"lam": 0.0}}, "score": {"by": "teacher"}},
            "sample select pack train",
        ),
    ],
)
def test_the_stages_of_a_phase(options, expected):
    one = phase(**options)
    assert one.stages == tuple(expected.split())
    assert one.is_scored == ("score" in one.stages)
    assert one.is_scored_by_teacher == (one.is_scored and one.score.by == "teacher")
    assert one.source in (*SOURCES, "replay") and list(one.stages) == sorted(one.stages, key=list(STAGES).index)


@pytest.mark.parametrize("rule", stages.RULES)
def test_rules_and_scores(rule):
    select = SelectConfig(rule=rule)
    assert select.needs_scores == select.uses_scores == (rule not in ("longest", "shortest", "random", "all"))
    assert select.needs_teacher == (rule in ("count", "ratio", "length_matched", "fewest"))
    assert phase(select={"rule": rule}).needs_logprobs == select.needs_teacher
    assert (not SelectConfig(rule="mine:rule").needs_scores) and SelectConfig(rule="mine:rule").uses_scores


def test_weights_and_logprobs():
    assert phase().needs_logprobs and not phase(select={"rule": "random"}).needs_logprobs
    weighted = {"rule": "all", "weighting": {}}
    assert phase(select=weighted).needs_logprobs and phase(select=weighted).select.uses_weights
    assert not SelectConfig(weighting=Weighting(lam=0.0)).uses_weights
    alone = phase(select={"rule": "likelihood"})
    assert alone.is_scored_by_student_alone and alone.stages == phase().stages
    assert phase(select={"rule": "likelihood", "keep": 2, "weighting": {}}).needs_logprobs
    assert phase(select={"rule": "mine:rule"}).needs_logprobs, "nobody knows what it looks at"


# --- unions -------------------------------------------------------------------------------------------


def test_tables_can_be_built_in_python_without_kind():
    recipe = RecipeConfig(
        out=Path("run"),
        student=Vllm(model="m"),
        teacher=Endpoint(model="m", base_urls=["http://x/v1"]),
        prompts={"path": "q.jsonl"},
        phase=[Phase(name="a", train=TrainConfig(method=Lora(rank=2)))],
    )
    assert (recipe.student.kind, recipe.teacher.kind, recipe.phase[0].train.method.kind) == ("vllm", "endpoint", "lora")


@pytest.mark.parametrize("method", [Full(), Lora(), Lora(kind="qlora", target_modules=["q_proj"])])
def test_methods_are_distinguished_by_their_kind(method):
    assert TrainConfig(method=method).method == method
    assert TrainConfig.model_validate({"method": method.model_dump()}).method == method


@pytest.mark.parametrize("kind", ["a:b", "a.b:C", "a.b:C.d", "_a1:b"])
def test_names_of_the_users_own_code(kind):
    assert CustomTeacher(kind=kind).model == kind
    assert phase(select={"rule": kind}, train={"objective": kind}, evaluate={"grader": kind}).select.rule == kind


@pytest.mark.parametrize("kind", ["a", "a:", ":a", "a.b", "a b:c", "a:b:c", "1:b", "a..b:c", "a:b\n"])
def test_names_that_are_not_of_the_form(kind):
    with pytest.raises(ConfigError, match=r"package\.module:Class"):
        CustomTeacher(kind=kind)
    for options in ({"select": {"rule": kind}}, {"train": {"objective": kind}}, {"evaluate": {"grader": kind}}):
        with pytest.raises(ConfigError, match=r"'package\.module:attribute'"):
            Phase(name="x", **options)


def test_code_that_a_recipe_names():
    own = {"select": {"rule": "a:rule"}, "train": {"objective": "a:loss"}, "evaluate": {"grader": "a:grade"}}
    recipe = RecipeConfig(
        out=Path("run"),
        student=Vllm(model="m"),
        teacher=CustomTeacher(kind="a:Canned"),
        prompts={"path": "q.jsonl"},
        phase=[phase(), Phase.model_validate({"name": "y", **own}), Phase.model_validate({"name": "z", **own})],
    )
    names = [("teacher.kind", "a:Canned"), ("select.rule", "a:rule"), ("train.objective", "a:loss")]
    assert recipe.extensions == (*names, ("evaluate.grader", "a:grade"))


def test_only_a_teacher_may_be_of_the_users_own():
    with pytest.raises(ConfigError, match=r"student\.kind = 'a:b': should be one of 'transformers', 'vllm'"):
        RecipeConfig(out="run", student={"kind": "a:b"}, phase=[{"name": "a"}])


def test_options_of_speed_are_not_part_of_results():
    table = Transformers(model="m", batch_size=3)
    assert models.result_options(table) == {
        "kind": "transformers",
        "model": "m",
        "dtype": "auto",
        "max_model_len": None,
        "trust_remote_code": False,
    }
    assert models.engine_options(CustomTeacher(kind="a:b", options={"x": 1})) == {"kind": "a:b", "options": {"x": 1}}
