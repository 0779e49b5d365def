"""The house: imports go down only, and the command line starts without anything heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dasd_lite

PACKAGE = Path(dasd_lite.__file__).parent
# From the ground up; a module may import what stands in a line above its own, or in its own.
LEVELS = [
    {"errors", "models", "train_options"},
    {"config", "console", "ragged", "records", "load"},
    {"dataset", "journal", "prompts", "rows", "flops"},
    {
        "attention",
        "chat",
        "harmony",
        "filters",
        "divergence",
        "selection",
        "weights",
        "sentence_scores",
        "text",
        "packing",
        "grading",
        "schedule",
        "memory",
        "fit",
        "training_costs",
        "logprobs",
        "distributed",
        "checkpoint",
        "objectives",
        "optimizer",
        "student",
        "export",
        "self_check",
        "trackers",
        "training",
        "train_log",
    },
    {"sampler", "plots", "report_data", "report_rollouts", "report_tables", "show_pieces", "show_print", "summary"},
    {"watch"},
    {"stages"},
    {"recipe", "show"},
    {"rehearsal"},
    {"check"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: i for i, level in enumerate(LEVELS) for name in level}
HEAVY = {
    *("torch", "transformers", "vllm", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers"),
    *("pyarrow", "numpy", "pydantic", "rich", "httpx", "matplotlib", "jinja2", "huggingface_hub"),
}


def module_name(path):
    """`stages.score` for dasd_lite/stages/score.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path, inside=True):
    """What a file imports: names of our modules without the package, others as they are."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    nodes = ast.walk(tree) if inside else iter(tree.body)
    found = set()
    for node in nodes:
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else node.module for name in names}
    return {name.removeprefix("dasd_lite.") for name in found if name != "dasd_lite"}


def is_module(name):
    return name.startswith("dasd_lite.") and (name.removeprefix("dasd_lite.") in MODULES or name == "dasd_lite._rust")


def room(module):
    return module.split(".")[0]


def test_every_module_has_its_level():
    assert {room(name) for name in MODULES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_imports_go_down_only(module):
    ours = {name for name in imports_of(MODULES[module]) if name in MODULES}
    up = {name for name in ours if LEVEL[room(name)] > LEVEL[room(module)]}
    assert not up, f"{module} imports {up}, which stand above it"


def test_stages_never_import_each_other():
    stages = {name for name in MODULES if name.startswith("stages.")}
    assert len(stages) == 9
    for stage in stages:
        assert not imports_of(MODULES[stage]) & stages, stage


def test_only_four_modules_know_the_rust_core():
    knowing = {name for name, path in MODULES.items() if any(i.startswith("_rust") for i in imports_of(path))}
    assert knowing <= {"packing", "divergence", "text", "dataset"}
    assert {"packing", "divergence", "text"} <= knowing


def test_torch_is_imported_at_the_top_only_where_it_is_the_work():
    torches = {"torch", "transformers", "peft", "bitsandbytes", "vllm", "safetensors", "safetensors.torch"}
    at_top = {name for name, path in MODULES.items() if imports_of(path, inside=False) & torches}
    assert at_top <= {"student", "logprobs", "attention", "checkpoint", "stages.train", "sampler.transformers"}


def test_only_the_program_of_the_engine_knows_vllm():
    knowing = {name for name, path in MODULES.items() if any(room(i) == "vllm" for i in imports_of(path))}
    assert knowing == {"sampler.vllm_engine"}


def loaded_by(code):
    """Every package that a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    return set(done.stderr.split())


def test_the_command_line_starts_without_anything_heavy():
    loaded = loaded_by("import dasd_lite.cli")
    assert "click" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["init", "--help"], []])
def test_help_loads_nothing_heavy(arguments):
    code = f"sys.argv[1:] = {arguments}\nimport dasd_lite.cli\ntry: dasd_lite.cli.main()\nexcept SystemExit: pass"
    assert not loaded_by(code) & HEAVY


def test_checking_a_recipe_and_packing_need_no_torch():
    modules = ("check", "recipe", "prompts", "stages.sample", "stages.ingest", "stages.select", "stages.pack")
    loaded = loaded_by("\n".join(f"import dasd_lite.{name}" for name in (*modules, "stages.report", "stages.mix")))
    assert "pyarrow" in loaded
    assert not loaded & {"torch", "transformers", "vllm", "peft", "bitsandbytes"}


def test_seeing_that_nothing_is_to_do_needs_no_torch():
    for stage in ("score", "train", "evaluate"):
        assert "torch" not in loaded_by(f"import dasd_lite.stages.{stage}"), stage
