"""Mistakes: all of them at once, each in one line with file, line, key, value, and what would be right."""

import pytest
from tests.config.recipe import RECIPE

from dasd_lite.config.load import load_recipe
from dasd_lite.errors import ConfigError


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        # unknown keys: a similar one, or all
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
            [
                "select.rule = 'cuont': should be 'count', 'ratio', 'length_matched', 'fewest', 'rsr', 'likelihood',",
                "module:",
            ],
        ),
        (
            "[select]",
            "[pack]\nseq_len = 5_000_000_000\n[select]",
            19,
            ["pack.seq_len = 5000000000", "less than or equal to 16777216"],
        ),
        ("keep = 1", "beta = 1", 19, ["select.beta = 1", "less than 1"]),
        ('"low"', '"Low 1"', 27, ["phase[0].name = 'Low 1'", "^[a-z0-9]"]),
        # names of built-ins and of code of one's own
        (
            "learning_rate = 1e-3",
            'objective = "sfd"',
            24,
            ["train.objective = 'sfd': should be 'sft', 'weighted', or"],
        ),
        (
            "seed = 1",
            'seed = 1\nevaluate.grader = "maths"',
            3,
            ["evaluate.grader = 'maths': should be 'auto', 'math', 'choice', 'code', or code of your own as"],
        ),
        ("keep = 1", 'rule = "mine.rule"', 19, ["select.rule = 'mine.rule'", "'package.module:attribute'"]),
        (
            '"transformers"\nmodel = "demo:teacher"',
            '"my teacher:Canned"',
            8,
            ["teacher.kind = 'my teacher:Canned': should be a sampler of your own as 'package.module:Class'"],
        ),
        (
            '"transformers"\nmodel = "demo:t',
            '"a:B"\nmodel = "demo:t',
            9,
            ["teacher.model: unknown key of kind 'package."],
        ),
        # kinds of models
        ('kind = "transformers"\nmodel = "demo:teacher"', 'model = "m"', 7, ["teacher.kind is missing", "'endpoint'"]),
        ('"transformers"\nmodel = "./s', '"tf"\nmodel = "./s', 12, ["student.kind = 'tf'", "'transformers', 'vllm'"]),
        (
            '"transformers"\nmodel = "./s',
            '"endpoint"\nmodel = "./s',
            12,
            ["student.kind = 'endpoint'", "'transformers', 'vllm'"],
        ),
        # keys that do not fit together
        ("1e-3", "1e-6", 22, ["train: min_learning_rate = 1e-05 is above learning_rate = 1e-06"]),
        ("keep = 1", "max_tokens = 70000", 26, ["select.max_tokens = 70000", "pack.seq_len = 65536"]),
    ],
)
def test_a_mistake_is_one_line_with_file_line_key_value_and_remedy(mistakes, old, new, line, words):
    lines = mistakes(old, new)
    assert lines[0].startswith(f"run.toml:{line}: "), lines
    for word in words:
        assert word in lines[0], lines
    assert len(lines) == 1 or "max_tokens" in new, lines  # which is wrong in each of the phases


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('out = "run"\n', "", "out is missing: Folder for the results"),
        ('[student]\nkind = "transformers"\nmodel = "./student"\n', "", "student is missing: Table of the model"),
        ('model = "./student"', "", "student.model is missing: Local folder or Hugging Face Hub id."),
        ('[teacher]\nkind = "transformers"\nmodel = "demo:teacher"\n', "", "'low' asks a teacher, but there is no"),
        ('path = "questions.jsonl"', "", "phase 'low' samples, but prompts.path is not set"),
        ('"high"', '"low"', "phase name 'low' is used 2 times; each phase needs its own"),
        ('"low"', '"base"', "phase name 'base' is reserved; use another"),
        ('"low"', '"report"', "phase name 'report' is reserved; use another"),
        ('"low"', '"select"', "phase name 'select' is reserved; use another"),
        (
            '"low"\n',
            '"low"\nsource = "mix"\nselect.rule = "all"\n',
            "needs the student of the previous phase, but it is",
        ),
        (
            '"low"\n',
            '"low"\npack.replay = 1.0\n',
            "pack.replay adds answers of an earlier phase, but it is the first; name a folder in pack.replay_from",
        ),
        ('"high"\n', '"high"\nsource = "mix"\n', "select.rule = 'count' needs scores, which mixed answers do not have"),
        (
            '"high"\n',
            '"high"\nsource = "mix"\nselect.rule = "all"\nscore.when = "always"\n',
            "score.when = 'always', but mixed answers have no scores",
        ),
        (
            '"high"\n',
            '"high"\npack = { replay = 1.0, replay_answers = 5 }\n',
            "replay = 1 and replay_answers = 5 both say how many answers are replayed; set one of them",
        ),
        (
            '"high"\n',
            '"high"\nsource = "replay"\npack.replay = 2.0\n',
            "pack.replay = 2 is per answer of this phase, which has none of its own (source = 'replay')",
        ),
        (
            '"high"\n',
            '"high"\nsource = "replay"\npack.replay_from = "high"\n',
            "phase 'high': pack.replay_from = 'high' is not an earlier phase",
        ),
        (
            '"low"\n',
            '"low"\nsource = "replay"\npack.replay_from = "high"\n',
            "phase 'low': pack.replay_from = 'high' is not an earlier phase",
        ),
        (
            '"high"\n',
            '"high"\nsource = "replay"\n[[phase]]\nname = "third"\nsource = "replay"\npack.replay_from = "high"\n',
            "phase 'third': pack.replay_from = 'high' has no answers of its own (source = 'replay')",
        ),
        (
            '"high"\n',
            '"high"\nselect.rule = "rsr"\nscore.engine = "vllm"\n',
            "select.rule = 'rsr' needs ranks, which score.engine = 'vllm' does not count; use 'transformers'",
        ),
        ('"high"\n', '"high"\nscore.when = "never"\n', "score.when = 'never', but select.rule = 'count' needs scores"),
        (
            '"high"\n',
            '"high"\nselect.rule = "all"\nselect.weighting = {}\nscore = { when = "never", by = "teacher" }\n',
            "score.when = 'never', but select.weighting needs what score.by = 'teacher' scores",
        ),
        ('"high"\n', '"high"\nsource = "ingest"\n', "source = 'ingest' needs ingest.paths, a list of files"),
        ('"high"\n', '"high"\ntrain.objective = "weighted"\n', "'weighted' needs select.weighting, e.g. {"),
        (
            '"high"\n',
            '"high"\nselect.weighting = {}\n',
            "select.weighting compares the answers to one prompt, but this",
        ),
        (
            'kind = "transformers"\nmodel = "demo:teacher"',
            'kind = "endpoint"\nmodel = "m"\nbase_urls = ["http://x/v1"]\nlogprobs = false',
            "phase 'low': select.rule = 'count' needs log-probabilities, but teacher.logprobs = false",
        ),
        (
            'kind = "transformers"\nmodel = "demo:teacher"',
            'kind = "endpoint"\nmodel = "m"\nbase_urls = ["http://x/v1"]\nbudget = { max_cost = 3 }',
            "teacher: budget.max_cost = 3 needs prices per million tokens: prices = {",
        ),
    ],
)
def test_what_is_missing_or_does_not_fit_together(mistakes, old, new, words):
    (line,) = mistakes(old, new)
    assert line.startswith("run.toml"), line
    assert words in line


def test_a_server_scores_with_a_tokenizer_only(mistakes):
    teacher = 'teacher={ kind = "endpoint", model = "m", base_urls = ["http://x/v1"] }'
    (line,) = mistakes("", "", teacher, "score.by=teacher")
    assert line == "run.toml: phase 'low': score.by = 'teacher' needs teacher.tokenizer: servers score token ids"


def test_all_mistakes_are_reported_at_once_each_with_its_line(mistakes):
    text = RECIPE.replace("num_samples = 3", "num_samples = 0").replace("keep = 1", "kep = 1").replace("0.6", '"warm"')
    lines = mistakes(text=text)
    assert [line.partition(": ")[0] for line in lines] == ["run.toml:16", "run.toml:19", "run.toml:28"]
    assert "greater than 0" in lines[0]
    assert "did you mean 'keep'?" in lines[1]
    assert "'warm'" in lines[2]


def test_an_empty_recipe_names_all_that_it_needs(mistakes):
    assert [line.split(": ")[1] for line in mistakes(text="")] == [
        "out is missing",
        "student is missing",
        "phase is missing",
    ]


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
        ("seed.x=2", ["'seed.x=2': 'seed' is not a table"]),
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
        (
            'train.method={ kind = "lora", target_modules = "q_proj" }',
            ["command line: train.method.target_modules = 'q_proj': should be 'all-linear' or a list of layer names"],
        ),
        ("train.gradient_checkpointing=true", ["train.gradient_checkpointing = True: should be 'auto', 'on' or 'off'"]),
        ("train.method=3", ["command line: train.method = 3: should be a table of keys and values"]),
        ("teacher=[1]", ["command line: teacher = [1]: should be a table of keys and values"]),
        (
            "teacher={ kind = 3 }",
            ["command line: teacher.kind = 3: should be one of 'endpoint', 'package.module:Class',"],
        ),
        (
            'teacher={ kind = "vllm", model = "m", base_urls = ["u"] }',
            ["command line: teacher.base_urls: unknown key of kind 'vllm'; kind 'endpoint' has it"],
        ),
        (
            'teacher={ kind = "endpoint", model = "m", base_urls = [] }',
            ["command line: teacher.base_urls = []: should have at least 1 item, not 0"],
        ),
        ('select.weighting={ favour = "likely" }', ["select.weighting.favour: unknown key; did you mean 'favor'?"]),
        ('"a\\nb"=1', [r"command line: 'a\nb': unknown key; the top level has evaluate,"]),
        ("high.train.epochs=-1", ["command line: high.train.epochs = -1: should be greater than 0"]),
        ("prompts.path=3", ["command line: prompts.path = 3: should be a path in quotes"]),
    ],
)
def test_mistakes_in_overrides(mistakes, override, words):
    (line,) = mistakes("", "", override)
    for word in words:
        assert word in line, line


def test_a_phase_whose_name_is_not_text(mistakes):
    lines = mistakes('"low"', "[1]", "select.keep=0", "high.select.beta=0.2")
    assert lines == [
        "command line: select.keep = 0: should be greater than 0",
        "run.toml:27: phase[0].name = [1]: should be a valid string",
    ]


# --- files that are not recipes, and absurd ones --------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ": no such file; `dasd-lite init demo` writes one"),
        (b"out = \n", ":1:7: "),
        (b"[a]\n[a]\n", ":2:2: duplicate key"),
        (b'seed = 1\nout = "\xe9"', ": not UTF-8: byte 0xe9 at position 16"),
        (b"phase = 3", ":1: phase: write each phase as a [[phase]] table"),
        (b"seed = 1\n[phase]\nname = 'x'", ":2: phase: write each phase as a [[phase]] table"),
        (b"phase = [1]", ":1: phase: write each phase as a [[phase]] table"),
        (b"phase.x = 1", ":1: phase: write each phase as a [[phase]] table"),
    ],
)
def test_files_that_are_not_recipes(tmp_path, content, words):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_recipe(path, ["select.keep=2"])
    assert str(error.value).startswith(f"{path}{words}")
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_is_not_a_recipe(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; a recipe is a TOML file"):
        load_recipe(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        load_recipe(tmp_path / ("x" * 5000))


DOTS = ".".join("a" * 20_001)
ABSURD = {
    "open brackets": (f"keep = {'[' * 5000}", ":1:"),
    "brackets": (f"keep = {'[' * 5000}{']' * 5000}", ":1:"),
    "braces": (f"keep = {'{a=' * 5000}1{'}' * 5000}", ":1:"),
    "headers": ("[" * 5000, ":1:"),
    "digits": (f"seed = {'9' * 5000}", ":1:"),
    "hexadecimal digits": (f"seed = 0x{'f' * 5000}", ":1:"),
    "dots": (f"{DOTS} = 1", ":1:"),
    "dots in a header": (f"[{DOTS}]", ":1:"),
    "a string without end": ('out = "run', ":1:11: "),
    "a literal string without end": ("out = 'run", ":1:11: "),
    "a string of lines without end": ('out = """run\n\n', ":3:1: "),
    "NUL": ("\0", ":1:"),
    "NUL in a string": ('out = "a\0b"', ":1:9: "),
    "NUL in a comment": ("# \0", ":1:"),
    "a date": ("seed = 2020-01-01", ":1:8: "),
    "a bare carriage return": ("seed = 1\rout = 2", ":1:"),
    "50 MB": (f"# {'x' * (50 << 20)}", ": larger than 1 MiB; a recipe is a short TOML file"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_files_are_one_short_line_and_exit_code_2(cli, tmp_path, name):
    content, words = ABSURD[name]
    (tmp_path / "run.toml").write_text(content, newline="")
    ended = cli("check", "run.toml", cwd=tmp_path)
    assert (ended.rc, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"dasd-lite: run.toml{words}")
    assert ended.stderr.count("\n") == 1 and len(ended.stderr) < 200


ABSURD_OVERRIDES = {
    "open brackets": f"select.keep={'[' * 5000}",
    "brackets": f"select.keep={'[' * 5000}{']' * 5000}",
    "braces": f"select.keep={'{a=' * 5000}",
    "digits": f"select.keep={'9' * 5000}",
    "letters": f"select.keep={'x' * 500_000}",
    "NUL": "select.keep=\0",
    "quotes": 'select.keep="""',
    "two lines": "select.keep=1\nseed=2",
    "dots": f"{DOTS}=1",
    "dots in a table": f"select.{DOTS}=1",
    "dots in a dictionary": f"select.budget.{DOTS}=1",
    "a long key": f"{'x' * 500_000}=1",
    "a key of two lines": "seed\nx=1",
    "a comment": "#=1",
}


@pytest.mark.parametrize("name", ABSURD_OVERRIDES)
def test_absurd_overrides_are_one_short_line(mistakes, name):
    (line,) = mistakes("", "", ABSURD_OVERRIDES[name])
    assert ("command line: " in line or "an override looks like select.keep=2" in line) and len(line) < 300


def test_quotes_in_a_comment_hide_no_lines(mistakes):
    text = RECIPE.replace("seed = 1", "seed = 1  # \"\"\" and '''").replace("keep = 1", "keep = 0")
    assert mistakes(text=text) == ["run.toml:19: select.keep = 0: should be greater than 0"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("select = { budget = { math = 1 }, keep = 0 }", 2),
        ("select.budget.math = 1\nselect.keep = 0", 3),
        ("[select]\nbudget = {\n  math = 1 }\n'keep' = 0", 5),
        ('[ select . budget ]\nmath = 1\n[select]\n"keep" = 0', 5),
        ('[select]\nkeep = """\n0"""', 3),
        ("[[phase]]\nname = 'a'\n[phase.select]\nkeep = 0", 5),
        ("[[phase]]\nname = 'a'\nselect = {\n  keep = 0 }", 5),
        ("phase = [\n  { name = 'a', select.keep = 1 },\n  { name = 'b', select.keep = 0 }\n]", 4),
    ],
)
def test_lines_of_keys_however_they_are_written(mistakes, text, line):
    rest = "" if "phase" in text else "\n[[phase]]\nname = 'a'"
    first = mistakes(text=f"out = 'run'\n{text}{rest}\n")[0 if "phase" not in text else -1]
    assert first.startswith(f"run.toml:{line}: ") and "select.keep = " in first
