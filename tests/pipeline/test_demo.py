"""The demo as a user runs it: all stages, three phases, a student that learns."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "dasd_lite", "demo", "--out", "run"]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def counts(folder: Path) -> dict[str, float]:
    return json.loads((folder / "manifest.json").read_text())["counts"]


def test_the_student_rises_by_more_than_three_standard_errors(demo_run: tuple[Path, str]) -> None:
    run, _ = demo_run
    before = counts(run / "base" / "evaluate")
    assert 0.1 <= before["accuracy"] <= 0.4
    after = counts(run / "mixed" / "evaluate")
    error = (before["standard_error"] ** 2 + after["standard_error"] ** 2) ** 0.5
    assert after["accuracy"] - before["accuracy"] > 3 * error


def test_every_stage_of_every_phase_is_there(demo_run: tuple[Path, str]) -> None:
    run, _ = demo_run
    chain = ["score", "select", "pack", "train", "evaluate"]
    wanted = [f"{phase}/{stage}" for phase in ("low", "high") for stage in ["sample", *chain]]
    wanted += [f"mixed/{stage}" for stage in ("mix", "select", "pack", "train", "evaluate")]
    for name in wanted:
        assert (run / name / "manifest.json").exists(), name
    assert counts(run / "mixed" / "mix")["cut_off"] > 0


def test_what_the_terminal_says(demo_run: tuple[Path, str]) -> None:
    run, printed = demo_run
    for name in ("base", "low", "high", "mixed"):
        accuracy = counts(run / name / "evaluate")["accuracy"]
        assert re.search(rf"{name}/evaluate +accuracy {100 * accuracy:.1f} ±", printed)
    sampled = counts(run / "low" / "sample")["rollouts"]
    assert re.search(rf"low/sample +{sampled:,} rollouts of 400 prompts, [\d,]+ tokens/s", printed)
    fill = counts(run / "high" / "pack")["fill"]
    assert f"{fill:.1%} full" in printed
    rejected = counts(run / "high" / "select")["rejected"]
    assert f"rank {rejected['rank']:,}" in printed
    assert re.search(r"run/report/report\.html", printed)
    page = (run / "report" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:|url\(["']?https?:""", page)


def test_the_same_command_again_has_nothing_to_do(demo_run: tuple[Path, str]) -> None:
    run, _ = demo_run
    command = [sys.executable, "-m", "dasd_lite", "demo", "--out", "run"]
    done = subprocess.run(command, cwd=run.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Nothing to do." in done.stdout
