"""The house: a table of rooms and what each may import, and a command line that starts without anything heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dasd_lite
from dasd_lite.config.chain import STAGES

PACKAGE = Path(dasd_lite.__file__).parent
GROUND = {"errors", "console"}
DATA = GROUND | {"config", "method", "data"}
WRITERS = DATA | {"chat", "model", "costs", "grading", "inference"}
# Each room and the other rooms it may import, from the ground up. `__main__` and `cli` are files at the top.
ROOMS = {
    "errors": set(),
    "console": {"errors"},
    "method": {"errors"},
    "config": GROUND,
    "data": GROUND | {"config", "method"},
    "chat": DATA,
    "model": DATA | {"chat"},
    "costs": DATA | {"chat", "model"},
    "grading": DATA | {"chat"},
    "inference": WRITERS - {"inference"},
    "training": WRITERS,
    "stages": WRITERS | {"training"},
    "report": DATA | {"chat", "grading", "costs", "model"},
    "run": WRITERS | {"training", "stages"},
    "cli": WRITERS | {"training", "stages", "report", "run"},
    "__main__": {"cli"},
}
# What takes long to load, or is not there without an extra: only these files may import it while they are loaded.
TORCH = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")
HEAVY_AT_TOP = {name: {"model", "training"} for name in TORCH} | {
    "vllm": set(),
    "httpx": {"inference"},
    "matplotlib": set(),
}
# Nothing of this may be loaded by `dasd-lite --help`.
HEAVY = {
    *("torch", "transformers", "vllm", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers"),
    *("pyarrow", "numpy", "pydantic", "rich", "httpx", "matplotlib", "jinja2", "huggingface_hub"),
}


def module_name(path):
    """`stages.score` for dasd_lite/stages/score.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module):
    return module.split(".")[0]


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes_of(node, *, inside):
    """All nodes that run; with `inside` also those in functions, which run when they are called."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child) or (not inside and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        yield child
        yield from nodes_of(child, inside=inside)


def imports_of(source, *, inside=True):
    """Modules that a source text imports, at the top or in any block: ours without the package, others as they are."""
    names = set()
    for node in nodes_of(ast.parse(source), inside=inside):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if is_module(name) else node.module for name in full}
    return {name.removeprefix("dasd_lite.") for name in names if name != "dasd_lite"}


def is_module(name):
    return name.startswith("dasd_lite.") and (name.removeprefix("dasd_lite.") in MODULES or name == "dasd_lite._rust")


def forbidden(module, source):
    """What `module` with this source imports from rooms that its room may not import."""
    ours = {name for name in imports_of(source) if name in MODULES}
    return {name for name in ours if room(name) != room(module) and room(name) not in ROOMS[room(module)]}


def heavy_at_top(module, source):
    """Packages that `module` loads with itself although its room may not."""
    packages = {name.split(".")[0] for name in imports_of(source, inside=False)}
    return {name for name in packages & HEAVY_AT_TOP.keys() if room(module) not in HEAVY_AT_TOP[name]}


def sources(prefix=""):
    return {name: path.read_text(encoding="utf-8") for name, path in MODULES.items() if name.startswith(prefix)}


def test_every_room_is_in_the_table():
    assert {room(name) for name in MODULES} - {"__init__", "demo", "recipes"} == set(ROOMS)
    for name, below in ROOMS.items():
        if name == "__main__":
            continue
        assert all(ROOMS[other] <= below for other in below), f"{name} may import more than what it imports may"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_a_room_imports_only_what_the_table_allows(module):
    assert not forbidden(module, sources()[module])


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_heavy_packages_are_loaded_only_where_they_are_the_work(module):
    assert not heavy_at_top(module, sources()[module])


IMPORT = "from dasd_lite.stages import sample"
PLACES = {
    "at the top": "{}",
    "in a try": "try:\n    {}\nexcept ImportError as error:\n    raise SystemExit from error",
    "in an except": "try:\n    import json\nexcept ImportError:\n    {}",
    "in a with": "import contextlib\nwith contextlib.suppress(ImportError):\n    {}",
    "in an if": "import sys\nif sys.platform:\n    {}",
    "in a class": "class A:\n    {}",
}


@pytest.mark.parametrize("place", PLACES)
def test_an_import_is_seen_wherever_it_stands(place):
    assert forbidden("data.dataset", PLACES[place].format(IMPORT)) == {"stages.sample"}
    assert heavy_at_top("stages.sample", PLACES[place].format("import torch.nn")) == {"torch"}
    assert heavy_at_top("model.load", PLACES[place].format("import torch")) == set()


def test_functions_import_when_they_are_called_and_types_never():
    inside = "def f():\n    {}"
    assert forbidden("data.dataset", inside.format(IMPORT)) == {"stages.sample"}
    assert heavy_at_top("stages.sample", inside.format("import torch")) == set()
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}"
    assert forbidden("data.dataset", for_types.format(IMPORT)) == set()
    assert heavy_at_top("stages.sample", for_types.format("import torch")) == set()


def test_torch_is_seen_where_it_is_used():
    """The rule above would hold for an empty set as well."""
    assert "torch" in {name for source in sources("model").values() for name in imports_of(source, inside=False)}


def circles():
    """Sets of files that import each other, directly or not; imports for type checkers alone do not count."""
    graph = {name: imports_of(source) & MODULES.keys() - {name} for name, source in sources().items()}
    reached = {name: set(others) for name, others in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    return [name for name in graph if name in reached[name]]


def test_no_import_circle_not_even_inside_functions():
    assert circles() == []


def test_no_private_name_is_imported():
    for name, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dasd_lite"):
                private = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "_rust"]
                assert not private, f"{name} imports {private}"


def test_stages_never_import_each_other():
    stages = {name for name in MODULES if name.startswith("stages.")}
    assert stages == {f"stages.{name}" for name in STAGES}
    for stage, source in sources("stages.").items():
        assert not imports_of(source) & stages, stage


def test_only_four_modules_know_the_rust_core():
    knowing = {name for name, source in sources().items() if any(i.startswith("_rust") for i in imports_of(source))}
    assert knowing == {"method.packing", "method.divergence", "method.sentences", "config.load"}


def test_only_the_program_of_the_engine_knows_vllm():
    knowing = {name for name, source in sources().items() if any(room(i) == "vllm" for i in imports_of(source))}
    assert knowing == {"inference.vllm.engine"}


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
    modules = ("run.check", "run.pipeline", "data.prompts", "report.page")
    stages = (f"stages.{name}" for name in ("sample", "ingest", "select", "pack", "mix"))
    loaded = loaded_by("\n".join(f"import dasd_lite.{name}" for name in (*modules, *stages)))
    assert "pyarrow" in loaded
    assert not loaded & {"torch", "transformers", "vllm", "peft", "bitsandbytes"}


def test_seeing_that_nothing_is_to_do_needs_no_torch():
    for stage in ("score", "train", "evaluate"):
        assert "torch" not in loaded_by(f"import dasd_lite.stages.{stage}"), stage
