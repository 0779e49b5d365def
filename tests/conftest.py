"""What the tests share: the demo's files, a recipe of a few seconds, and the command line in a process of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import dasd_lite

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads only get in each other's way
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "COLUMNS": "200"}

SMALL = """\
seed = 3
out = "run"

[prompts]
path = "{demo}/train.jsonl"
limit = 8

[teacher]
kind = "transformers"
model = "{demo}/teacher"

[student]
kind = "transformers"
model = "{demo}/student"

[sample]
num_samples = 2
max_tokens = 192

[select]
require_think = false
max_duplicate_lines = 1.0
max_duplicate_sentences = 1.0

[pack]
seq_len = 512

[train]
epochs = 1
grad_accum_steps = 1
learning_rate = 1e-3

[evaluate]
prompts = "{demo}/heldout.jsonl"
limit = 4
num_samples = 1
max_tokens = 48

[[phase]]
name = "low"
sample.temperature = 0.6

[[phase]]
name = "mixed"
source = "mix"
mix.max_length_ratio = 0.5
mix.max_tokens = 192
mix.num_prompts = 6
select.rule = "all"
pack.replay = 1.0
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    rc: int
    stdout: str
    stderr: str


def run_cli(*args: object, cwd: Path, **environment: str) -> Ended:
    """Run `dasd-lite` with `args` in the folder `cwd`."""
    done = subprocess.run(
        [sys.executable, "-m", "dasd_lite", *map(str, args)],
        cwd=cwd,
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def cli():
    """`cli(*args, cwd=folder)` runs the command line in a process of its own."""
    return run_cli


@pytest.fixture(scope="session")
def demo() -> Path:
    """The folder of the demo's files: teacher, student, train.jsonl, heldout.jsonl, validation.jsonl."""
    return Path(dasd_lite.__file__).parent / "demo"


def write_small_recipe(folder: Path, demo: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(SMALL.format(demo=demo), encoding="utf-8")
    return path


@pytest.fixture
def small_recipe(demo):
    """`small_recipe(folder)` writes a run.toml of two phases over 8 questions there; a run takes a few seconds."""
    return lambda folder: write_small_recipe(folder, demo)


@pytest.fixture(scope="session")
def finished(demo, tmp_path_factory) -> Path:
    """A folder with run.toml, and what running it wrote to `run`; to be read, not changed."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_small_recipe(folder, demo)
    ended = run_cli("run", recipe.name, cwd=folder)
    assert ended.rc == 0, ended.stderr
    return folder
