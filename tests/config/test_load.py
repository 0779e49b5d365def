"""What a recipe resolves to: stage tables below phases, overrides, and paths."""

import json
import sys
from pathlib import Path

import pytest
from tests.config.recipe import RECIPE

from dasd_lite.config import extensions
from dasd_lite.config.load import load_recipe
from dasd_lite.config.models import CustomTeacher
from dasd_lite.config.stages import Phase, RecipeConfig

WITHOUT_SAMPLE = RECIPE.replace("[phase.sample]\ntemperature = 1\n", "")


def test_stage_tables_hold_for_all_phases(load):
    recipe = load()
    low, high = recipe.phase
    assert (low.sample.temperature, high.sample.temperature) == (0.6, 1.0)
    assert low.sample.num_samples == high.sample.num_samples == 3
    assert low.train.method.rank == 4
    assert low.pack == high.pack == Phase(name="x").pack


def test_a_phase_with_another_method_replaces_the_whole_method(load):
    high = load("", 'train.method = { kind = "full" }\n', text=WITHOUT_SAMPLE).phase[1]
    assert high.train.method.kind == "full"
    assert high.train.learning_rate == 1e-3
    method = load("", "train.method = { rank = 8 }\n", text=WITHOUT_SAMPLE).phase[1].train.method
    assert (method.kind, method.rank) == ("lora", 8)


def test_a_resolved_recipe_can_be_read_back(load):
    for overrides in ([], ['teacher={ kind = "mine:Canned", options = { path = "a", depth = [1, { x = 2.5 }] } }']):
        recipe = load("", "", *overrides)
        assert RecipeConfig.model_validate_json(json.dumps(recipe.model_dump(mode="json"))) == recipe


def test_a_recipe_cannot_be_changed(load):
    with pytest.raises(ValueError, match="frozen"):
        load().phase[0].sample.temperature = 2


# --- overrides ----------------------------------------------------------------------------------------


def test_overrides(load):
    recipe = load("", "", "select.keep=2", "low.sample.temperature=0.7", "seed=9", "prompts.path=other name.jsonl")
    assert [phase.select.keep for phase in recipe.phase] == [2, 2]
    assert [phase.sample.temperature for phase in recipe.phase] == [0.7, 1.0]
    assert (recipe.seed, str(recipe.prompts.path)) == (9, "other name.jsonl")


def test_an_override_of_a_stage_replaces_what_phases_set(load):
    both = load("", "", "sample.temperature=0.2")
    assert [phase.sample.temperature for phase in both.phase] == [0.2, 0.2]
    one = load("", "", "sample.temperature=0.2", "high.sample.temperature=1")
    assert [phase.sample.temperature for phase in one.phase] == [0.2, 1.0]


@pytest.mark.parametrize(
    ("override", "budget"),
    [
        ("select.budget={ code = 3 }", {"code": 3}),
        ("select.budget.code=3", {"math": 10, "code": 3}),
        ('select.budget."high school"=3', {"math": 10, "high school": 3}),
        (" select . budget . code = 3 # a comment", {"math": 10, "code": 3}),
    ],
)
def test_overrides_of_tables(load, override, budget):
    assert load("", "", override).phase[0].select.budget == budget


@pytest.mark.parametrize(
    "text", ["a.jsonl", "a b.jsonl", "a=b.jsonl", "[a", '"a', "{a", "a#b", "1.jsonl", "2020-01-01"]
)
def test_an_override_that_is_not_toml_is_text(load, text):
    assert str(load("", "", f"prompts.path={text}").prompts.path) == text


def test_a_mistake_that_an_override_fixes_is_none(load):
    assert load("= 3", "= 0", "sample.num_samples=1").phase[0].sample.num_samples == 1


# --- teachers of one's own, paths ---------------------------------------------------------------------


def test_a_teacher_may_be_a_sampler_of_the_users_own(load):
    teacher = load("", "", 'teacher={ kind = "my.teacher:Canned", options = { path = "a.json" } }').teacher
    assert teacher == CustomTeacher(kind="my.teacher:Canned", options={"path": "a.json"})
    assert teacher.model == "my.teacher:Canned"
    assert load("", "", "teacher.kind=demo:Canned", text=without_model(RECIPE)).teacher.kind == "demo:Canned"


def without_model(text):
    return text.replace('model = "demo:teacher"\n', "")


def test_paths_beside_the_recipe_can_be_used_from_anywhere(load, tmp_path):
    for name in ("questions.jsonl", "columns.parquet", "heldout.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "student").mkdir()
    recipe = load("", "", "pack.columns=columns.parquet", "evaluate.prompts=heldout.jsonl", 'ingest.paths=["a.jsonl"]')
    assert recipe.prompts.path == str(tmp_path / "questions.jsonl")
    assert recipe.student.model == str(tmp_path / "student")
    assert recipe.teacher.model.endswith("dasd_lite/demo/teacher")
    for phase in recipe.phase:
        assert phase.pack.columns == tmp_path / "columns.parquet"
        assert phase.evaluate.prompts == str(tmp_path / "heldout.jsonl")
        assert phase.ingest.paths == [str(tmp_path / "a.jsonl")]
    assert load("", "", "student.model=Qwen/Qwen3-4B").student.model == "Qwen/Qwen3-4B"
    assert str(load("", "", "out=elsewhere").out) == "elsewhere", "results go to the current folder"


def test_code_that_the_recipe_names_is_imported_from_its_folder(load, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(extensions, "_import_folders", [])
    (tmp_path / "rules_beside_a_recipe.py").write_text("def best(): ...\n")
    load()
    assert extensions.import_folders() == ()
    load("", "", "select.rule=rules_beside_a_recipe:best")
    assert extensions.import_folders() == (str(tmp_path.resolve()), str(Path.cwd()))
    assert extensions.load_extension("rules_beside_a_recipe:best", kind="rule", key="select.rule")() is None


def test_windows_line_ends_and_a_byte_order_mark(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert [phase.name for phase in load_recipe(tmp_path / "run.toml").phase] == ["low", "high"]
