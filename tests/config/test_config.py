"""Recipes: what is written is what is resolved, and everything wrong is told at once, each in one line."""

import json
import math

import pytest

from dasd_lite.config.explain import STAGE_TABLES, key_lines
from dasd_lite.config.load import load_recipe
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.errors import ConfigError

RECIPE = """\
out = "run"
seed = 1

[prompts]
path = "questions.jsonl"

[teacher]
kind = "transformers"
model = "demo:teacher"

[student]
kind = "transformers"
model = "./student"

[sample]
num_samples = 3

[select]
keep = 1
budget = { math = 10 }

[train]
method = { kind = "lora", rank = 4 }
learning_rate = 1e-3

[[phase]]
name = "low"
sample.temperature = 0.6

[[phase]]
name = "high"
[phase.sample]
temperature = 1
"""


@pytest.fixture
def load(tmp_path):
    """`load("old", "new", "over=ride")` reads RECIPE with one piece of it replaced."""

    def loaded(old="", new="", *overrides, text=RECIPE):
        assert not old or text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        (tmp_path / "run.toml").write_text(text.replace(old, new, 1) if old else text + new, encoding="utf-8")
        return load_recipe(tmp_path / "run.toml", overrides)

    return loaded


@pytest.fixture
def faults(load, tmp_path):
    """`faults(…)` are the lines that `load(…)` is refused with, without the file's folder."""

    def refused(*args, **kwargs):
        with pytest.raises(ConfigError) as error:
            load(*args, **kwargs)
        return str(error.value).replace(f"{tmp_path}/", "").splitlines()

    return refused


# --- what is resolved -------------------------------------------------------------------------------


def test_tables_lie_under_the_phases(load):
    recipe = load()
    low, high = recipe.phase
    assert (low.sample.temperature, high.sample.temperature) == (0.6, 1.0)
    assert low.sample.num_samples == high.sample.num_samples == 3
    assert low.train.method.rank == 4
    assert low.pack == high.pack == Phase(name="x").pack


def test_a_phase_that_names_another_method_replaces_the_whole_method(load):
    high = load("", 'train.method = { kind = "full" }\n', text=RECIPE.replace("[phase.sample]\ntemperature = 1\n", ""))
    assert high.phase[1].train.method.kind == "full"
    assert high.phase[1].train.learning_rate == 1e-3
    kept = load("", "train.method = { rank = 8 }\n", text=RECIPE.replace("[phase.sample]\ntemperature = 1\n", ""))
    assert (kept.phase[1].train.method.kind, kept.phase[1].train.method.rank) == ("lora", 8)


def test_overrides(load):
    recipe = load("", "", "select.keep=2", "low.sample.temperature=0.7", "seed=9", "prompts.path=other name.jsonl")
    assert [phase.select.keep for phase in recipe.phase] == [2, 2]
    assert [phase.sample.temperature for phase in recipe.phase] == [0.7, 1.0]
    assert (recipe.seed, str(recipe.prompts.path)) == (9, "other name.jsonl")


def test_an_override_of_a_stage_beats_the_phases_that_set_it(load):
    assert [p.sample.temperature for p in load("", "", "sample.temperature=0.2").phase] == [0.2, 0.2]
    assert [
        p.sample.temperature for p in load("", "", "sample.temperature=0.2", "high.sample.temperature=1").phase
    ] == [
        0.2,
        1.0,
    ]


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("select.budget={ code = 3 }", {"code": 3}),
        ("select.budget.code=3", {"math": 10, "code": 3}),
    ],
)
def test_overrides_of_tables(load, override, found):
    assert load("", "", override).phase[0].select.budget == found


def test_paths_beside_the_recipe_are_found_from_anywhere(load, tmp_path):
    (tmp_path / "questions.jsonl").write_text("")
    (tmp_path / "student").mkdir()
    recipe = load()
    assert recipe.prompts.path == tmp_path / "questions.jsonl"
    assert recipe.student.model == str(tmp_path / "student")
    assert recipe.teacher.model.endswith("dasd_lite/demo/teacher")
    assert load("", "", "student.model=Qwen/Qwen3-4B").student.model == "Qwen/Qwen3-4B"
    assert str(load("", "", "out=elsewhere").out) == "elsewhere", "results go to the current folder"


def test_a_resolved_recipe_can_be_read_back(load):
    recipe = load()
    assert RecipeConfig.model_validate_json(json.dumps(recipe.model_dump(mode="json"))) == recipe


def test_a_recipe_cannot_be_changed(load):
    with pytest.raises(ValueError, match="frozen"):
        load().phase[0].sample.temperature = 2


def test_every_option_is_documented():
    waiting, seen = [RecipeConfig], set()
    while waiting:
        table = waiting.pop()
        seen.add(table)
        for name, field in table.model_fields.items():
            inner = tables_in(field.annotation)
            waiting += [model for model in inner if model not in seen]
            assert field.description or inner or name == "kind", f"{table.__name__}.{name}"
    assert len(seen) >= 14


def tables_in(annotation):
    if isinstance(annotation, type):
        return [annotation] if hasattr(annotation, "model_fields") else []
    return [model for part in getattr(annotation, "__args__", ()) for model in tables_in(part)]


def test_the_lines_of_keys():
    lines = key_lines('a = 1\n[b]\nc.d = 2\ntext = """\ne = 3\n"""\n# f = 1\n[[g]]\nh = 1\n[[g]]\n[g.i]\nj = 1\n')
    assert lines[("a",)] == 1
    assert (lines[("b",)], lines[("b", "c")], lines[("b", "c", "d")]) == (2, 3, 3)
    assert ("b", "e") not in lines
    assert (lines[("g", 0)], lines[("g", 0, "h")], lines[("g", 1)], lines[("g", 1, "i", "j")]) == (8, 9, 10, 12)


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        # unknown keys: the nearest, or none
        ("num_samples", "num_sample", 16, ["sample.num_sample", "unknown key", "did you mean 'num_samples'?"]),
        ("num_samples", "zzz", 16, ["sample.zzz", "unknown key; sample has max_tokens, min_p, num_samples,"]),
        ("[sample]", "[smaple]", 15, ["smaple", "did you mean 'sample'?"]),
        ("seed", "sed", 2, ["sed", "did you mean 'seed'?"]),
        ("rank", "rnk", 23, ["train.method.rnk", "did you mean 'rank'?"]),
        ("sample.temperature", "sample.temprature", 28, ["low.sample.temprature", "'temperature'"]),
        ("sample.temperature", "smple.temperature", 28, ["low.smple", "did you mean 'sample'?"]),
        ("temperature = 1\n", "temprature = 1\n", 33, ["high.sample.temprature", "'temperature'"]),
        ('model = "./student"', 'model = "x"\ntimout_s = 3', 14, ["student.timout_s"]),
        # types
        ("= 3", '= "3"', 16, ["sample.num_samples = '3'", "should be a valid integer"]),
        ("= 3", "= true", 16, ["sample.num_samples = True", "should be a valid integer"]),
        ("= 3", "= 3.0", 16, ["sample.num_samples = 3.0", "should be a valid integer"]),
        ("1e-3", '"1e-3"', 24, ["train.learning_rate = '1e-3'", "should be a valid number"]),
        ('"demo:teacher"', "7", 9, ["teacher.model = 7", "should be a valid string"]),
        ("{ math = 10 }", "10", 20, ["select.budget = 10", "should be a table"]),
        ('{ kind = "lora", rank = 4 }', '"lora"', 23, ["train.method = 'lora'", "should be a table"]),
        ("seed = 1", 'seed = 1\nevaluate = "x"', 3, ["evaluate = 'x'", "should be a table"]),
        ("seed = 1", "seed = 1.5", 2, ["seed = 1.5", "integer"]),
        # ranges
        ("= 3", "= 0", 16, ["sample.num_samples = 0", "greater than 0"]),
        ("keep = 1", "keep = -1", 19, ["select.keep = -1", "greater than 0"]),
        ("math = 10", "math = 0", 20, ["select.budget.math = 0", "greater than 0"]),
        ("rank = 4", "rank = 0", 23, ["train.method.rank = 0", "greater than 0"]),
        ("1e-3", "inf", 24, ["train.learning_rate = inf", "finite"]),
        ("1e-3", "nan", 24, ["train.learning_rate = nan", "finite"]),
        ("seed = 1", "seed = -1", 2, ["seed = -1", "greater than or equal to 0"]),
        ("0.6", "2.1", 28, ["low.sample.temperature = 2.1", "less than or equal to 2"]),
        (
            "keep = 1",
            'rule = "cuont"',
            19,
            ["select.rule = 'cuont'", "'count', 'ratio', 'length_matched', 'random' or 'all'"],
        ),
        (
            "[select]",
            "[pack]\nseq_len = 5_000_000_000\n[select]",
            19,
            ["pack.seq_len = 5000000000", "less than or equal to 16777216"],
        ),
        ("keep = 1", "beta = 1", 19, ["select.beta = 1", "less than 1"]),
        ('"low"', '"Low 1"', 27, ["phase[0].name = 'Low 1'", "^[a-z0-9]"]),
        # kinds of models
        ('kind = "transformers"\nmodel = "demo:teacher"', 'model = "m"', 7, ["teacher.kind is missing", "'endpoint'"]),
        ('"transformers"\nmodel = "./s', '"tf"\nmodel = "./s', 12, ["student.kind = 'tf'", "'transformers', 'vllm'"]),
        (
            '"transformers"\nmodel = "./s',
            '"endpoint"\nmodel = "./s',
            12,
            ["student.kind = 'endpoint'", "'transformers', 'vllm'"],
        ),
        # faults of several keys together
        ("1e-3", "1e-6", 22, ["train: min_learning_rate 1e-05 is over learning_rate 1e-06"]),
        ("keep = 1", "max_tokens = 70000", 26, ["select.max_tokens = 70000", "pack.seq_len = 65536"]),
    ],
)
def test_one_fault_is_one_line_with_file_line_key_value_and_what_would_be_right(faults, old, new, line, words):
    found = faults(old, new)
    assert found[0].startswith(f"run.toml:{line}: "), found
    for word in words:
        assert word in found[0], found
    assert len(found) == 1 or "max_tokens" in new, found  # which is wrong in each of the phases


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('out = "run"\n', "", "out is missing"),
        ('[student]\nkind = "transformers"\nmodel = "./student"\n', "", "student is missing"),
        ('model = "./student"', "", "student.model is missing; Local folder or hub id."),
        ('[teacher]\nkind = "transformers"\nmodel = "demo:teacher"\n', "", "'low' asks a teacher, but there is no"),
        ('path = "questions.jsonl"', "", "'low' samples, but prompts.path names no questions"),
        ('"high"', '"low"', "phase name 'low' is used 2 times"),
        ('"low"', '"base"', "phase name 'base' means something else already"),
        ('"low"', '"report"', "phase name 'report' means something else already"),
        ('"low"', '"select"', "phase name 'select' means something else already"),
        ('"low"\n', '"low"\nsource = "mix"\nselect.rule = "all"\n', "needs the student of the phase before, but it is"),
        ('"low"\n', '"low"\npack.replay = 1.0\n', "pack.replay joins the phase before's rollouts"),
        ('"high"\n', '"high"\nsource = "mix"\n', "select.rule = 'count' needs scores, which mixed rollouts lack"),
        ('"high"\n', '"high"\nsource = "ingest"\n', "source = 'ingest' needs ingest.paths, a list of files"),
    ],
)
def test_what_is_missing_and_what_does_not_go_together(faults, old, new, words):
    (found,) = faults(old, new)
    assert found.startswith("run.toml"), found
    assert words in found


def test_all_faults_are_told_at_once_each_with_its_line(faults):
    text = RECIPE.replace("num_samples = 3", "num_samples = 0").replace("keep = 1", "kep = 1").replace("0.6", '"warm"')
    found = faults(text=text)
    assert [line.partition(": ")[0] for line in found] == ["run.toml:16", "run.toml:19", "run.toml:28"]
    assert "greater than 0" in found[0]
    assert "did you mean 'keep'?" in found[1]
    assert "'warm'" in found[2]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("select.kep=2", ["command line: select.kep", "did you mean 'keep'?"]),
        ("selct.keep=2", ["command line: selct", "did you mean 'select'?"]),
        ("lo.select.keep=2", ["command line: lo: unknown key"]),
        ("low.keep=2", ["command line: low.keep", "unknown key"]),
        ("low.select.keep=0", ["command line: low.select.keep = 0", "greater than 0"]),
        ("select.keep=many", ["command line: select.keep = 'many'", "integer"]),
        ("select.keep", ["'select.keep': an override looks like select.keep=2"]),
        ("=2", ["'=2': an override looks like select.keep=2"]),
        ("select..keep=2", ["an override looks like select.keep=2"]),
        ("seed.x=2", ["'seed.x=2': seed is not a table"]),
        ("phase=2", ["'phase=2'", "an override looks like"]),
        ("student=2", ["command line: student = 2", "should be a table"]),
        ("bool=3", ["command line: bool: unknown key"]),
        ("train.bool=3", ["command line: train.bool: unknown key"]),
        ("select.budget={ bool = -1 }", ["command line: select.budget.bool = -1"]),
        ("phase.x=2", ["'phase.x=2': an override looks like"]),
        ("train.liger=3", ["command line: train.liger = 3: should be 'auto', 'on' or 'off'"]),
        (
            'train.method={ kind = "full", rank = 4 }',
            ["command line: train.method.rank: unknown key of kind 'full'; kind 'lora' or 'qlora' has it"],
        ),
        (
            'train.method={ kind = "lora", target_modules = ["q", 3] }',
            ["command line: train.method.target_modules[1] = 3: should be a valid string"],
        ),
        ("high.train.epochs=-1", ["command line: high.train.epochs = -1: should be greater than 0"]),
        ("prompts.path=3", ["command line: prompts.path = 3: should be text, a path"]),
    ],
)
def test_overrides_that_are_wrong_are_told_as_such(faults, override, words):
    (found,) = faults("", "", override)
    for word in words:
        assert word in found, found


def test_a_fault_that_an_override_mends_is_none(load):
    assert load("= 3", "= 0", "sample.num_samples=1").phase[0].sample.num_samples == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; `dasd-lite init demo` writes one"),
        (b"out = \n", "not TOML: Invalid value (at line 1, column 7)"),
        (b"[a]\n[a]\n", "not TOML: "),
        (b'out = "\xe9"', "not UTF-8: byte 0xe9 at 7"),
        (b"phase = 3", ":1: phase: write each phase as a [[phase]] table"),
        (b"seed = 1\n[phase]\nname = 'x'", ":2: phase: write each phase as a [[phase]] table"),
        (b"phase = [1]", ":1: phase: write each phase as a [[phase]] table"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, words):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_recipe(path, ["select.keep=2"])
    assert str(error.value).startswith(str(path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; a recipe is a TOML file"):
        load_recipe(tmp_path)


def test_an_empty_recipe_names_all_that_it_needs(faults):
    found = faults(text="")
    assert [line.split(": ")[1].split()[0] for line in found] == ["out", "student", "phase"]


def test_defaults_are_the_papers():
    phase = Phase(name="x")
    assert (phase.select.rule, phase.select.beta, phase.mix.max_length_ratio) == ("count", 0.1, 1.5)
    assert (phase.pack.seq_len, phase.train.epochs, phase.train.beta2) == (65536, 6.0, 0.95)
    assert math.isclose(phase.train.learning_rate / phase.train.min_learning_rate, 5)
    assert "sample" in STAGE_TABLES and "name" not in STAGE_TABLES
