"""What the tests share: the demo's files, a small recipe, the command line, and vLLM's engine and server."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from tests.recipes import write_recipe

import dasd_lite

if TYPE_CHECKING:
    from dasd_lite.config.models import Vllm
    from dasd_lite.inference.vllm.sampler import VllmSampler

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # tiny models: threads only get in each other's way
    "HF_HUB_OFFLINE": "1",
    "PYTHONUTF8": "1",
    "COLUMNS": "200",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less; each takes 8 s to import what it needs
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # or vLLM's first token costs 20 s
}
os.environ.update(ENVIRONMENT)
ONE_ENGINE = {"test_vllm.py", "test_vllm_server.py", "test_score.py"}
"""Files that share the fixture `engine`."""
# A run that a script starts with `&` or nohup inherits SIGINT as ignored, and so would every process of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes is no matter of right or wrong.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes long first, so that two processes end at the same time."""
    items.sort(key=lambda item: (item.path.name not in ONE_ENGINE, item.path.parent.name != "pipeline"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all tests of a file, or of the files that share `engine`, to the same process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "engine" if Path(path).name in ONE_ENGINE else path

    config.option.loadscopereorder = False
    return ByFile(config, log)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    rc: int
    stdout: str
    stderr: str


def run_process(*args: object, cwd: Path, **environment: str) -> Ended:
    """Run `dasd-lite` with `args` in the folder `cwd`, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "dasd_lite", *map(str, args)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def run_here(*args: object, cwd: Path, **environment: str) -> Ended:
    """Run `dasd-lite` with `args` in the folder `cwd`, in this process; a traceback is the test's."""
    from dasd_lite import cli, console

    stdout, stderr, rc = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["dasd-lite", *map(str, args)])
        for name, value in environment.items():
            patch.setenv(name, value)
        console.out.cache_clear(), console.err.cache_clear()
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                cli.main()
        except SystemExit as ended:
            rc = int(ended.code or 0)
    return Ended(rc, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Ended]:
    """`cli(*args, cwd=folder)` runs the command line in this process, which has imported everything already."""
    return run_here


@pytest.fixture(scope="session")
def cli_process() -> Callable[..., Ended]:
    """`cli_process(*args, cwd=folder)` runs the command line in a process of its own."""
    return run_process


@pytest.fixture(scope="session")
def demo() -> Path:
    """The folder of the demo's files: teacher, student, train.jsonl, heldout.jsonl, validation.jsonl."""
    return Path(dasd_lite.__file__).parent / "demo"


@pytest.fixture(scope="session")
def small_recipe() -> Callable[..., Path]:
    """`small_recipe(folder)` writes a run.toml of two phases over 8 questions there; a run takes a few seconds."""
    return write_recipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.toml, and what running it wrote to `run`; to be read, not changed."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder)
    ended = run_process("run", recipe.name, cwd=folder)
    assert ended.rc == 0, ended.stderr
    return folder


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    """Skip the tests of vLLM where it is not; importing it here is what must not happen."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")


@pytest.fixture(scope="session")
def engine(vllm_installed: None, demo: Path) -> Iterator[VllmSampler]:
    """The demo's teacher in vLLM: the one engine of all tests that need no other; see `vllm_teacher`."""
    from dasd_lite.config.models import Vllm
    from dasd_lite.inference.vllm.sampler import VllmSampler

    table = Vllm(kind="vllm", model=str(demo / "teacher"), dtype="float32", enforce_eager=True)
    sampler = VllmSampler(table, scoring=True)
    yield sampler
    sampler.close()


@pytest.fixture
def vllm_teacher(engine: VllmSampler, demo: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The table of a teacher that opens `engine` in this process, and that nobody can close."""

    class Shared:
        def __init__(self, config: Vllm, folder: Path | None = None, *, scoring: bool = False) -> None:
            assert (folder or Path(config.model)) == demo / "teacher"

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def close(self) -> None:
            """Leave it to the others."""

    monkeypatch.setattr("dasd_lite.inference.vllm.sampler.VllmSampler", Shared)
    return {"kind": "vllm", "model": str(demo / "teacher"), "dtype": "float32", "enforce_eager": True}
