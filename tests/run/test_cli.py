"""The command line on a run of a few seconds: finished work is not repeated, and differences are refused by name."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dasd_lite.data.dataset import read_table
from dasd_lite.data.manifest import read_manifest
from dasd_lite.grading.grade import VERDICTS
from dasd_lite.report.results import read_accuracy


def stages_of(run):
    return sorted(str(path.parent.relative_to(run)) for path in run.rglob("manifest.json"))


def snapshot(folder):
    """The content of every file except the lock and the report."""
    skipped = ("report.html", ".lock")
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skipped
    }


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run that a test may change; fingerprints do not depend on the path."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_run_runs_every_stage_of_both_phases(finished):
    low = ["low/evaluate", "low/pack", "low/sample", "low/score", "low/select", "low/train"]
    mixed = ["mixed/evaluate", "mixed/mix", "mixed/mix/student", "mixed/pack", "mixed/select", "mixed/train"]
    assert stages_of(finished / "run") == ["base/evaluate", *low, *mixed]
    assert (finished / "run" / "report" / "report.html").stat().st_size > 1000
    recipe = json.loads((finished / "run" / "recipe.json").read_text())
    assert recipe["phase"][0]["sample"]["temperature"] == 0.6
    sampled = read_table(finished / "run" / "low" / "sample", "rollouts")
    assert len(sampled) == 16
    for row in sampled.to_pylist():
        assert sum(row["token_bytes"]) == len(row["completion"].encode())
        assert len(row["token_ids"]) == len(row["logprobs"]) == len(row["token_bytes"])
        assert max(row["logprobs"]) <= 0
    for row in read_table(finished / "run" / "mixed" / "mix", "rollouts").to_pylist():
        assert 0 < row["prefix_bytes"] < len(row["completion"].encode())
        assert sum(row["token_bytes"]) == len(row["completion"].encode()) - row["prefix_bytes"]


def test_every_graded_answer_counts_once(finished):
    truncated = 0
    for phase in ("base", "low", "mixed"):
        folder = finished / "run" / phase / "evaluate"
        counts, own = read_manifest(folder)["counts"], read_accuracy(folder).tasks["prompts"]
        assert sum(counts[kind] for kind in VERDICTS) == counts["samples"] == 4
        assert (own.truncated, own.verdicts["unparseable"]) == (counts["truncated"], counts["unparseable"])
        assert (own.mean, own.standard_error) == (counts["accuracy"], counts["standard_error"])
        truncated += own.truncated
    assert truncated > 0


def test_the_same_command_has_nothing_to_do(finished, cli):
    before = snapshot(finished / "run")
    result = cli("run", "run.toml", cwd=finished)
    assert (result.rc, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == "Nothing to do."
    assert "report.html" in result.stdout
    assert snapshot(finished / "run") == before


def test_a_stage_command_runs_that_stage_of_the_recipe(finished, cli):
    result = cli("select", "run.toml", "--phase", "low", cwd=finished)
    assert (result.rc, result.stdout.splitlines()[0]) == (0, "Nothing to do.")
    assert "Next: dasd-lite run run.toml" in result.stdout
    for stage in ("sample", "train"):
        result = cli(stage, "run.toml", cwd=finished)
        folder = result.stdout.splitlines()[-1].rpartition(" ")[2]
        assert cli("show", folder, cwd=finished).rc == 0, folder


def test_the_student_before_training_is_a_phase_of_its_own(finished, cli):
    result = cli("evaluate", "run.toml", "--phase", "base", cwd=finished)
    assert (result.rc, result.stdout.splitlines()[0]) == (0, "Nothing to do.")
    assert result.stdout.splitlines()[-1].endswith("dasd-lite show run/base/evaluate")


def test_the_same_seed_gives_the_same_bytes(finished, small_recipe, tmp_path, cli):
    small_recipe(tmp_path)
    result = cli("run", "run.toml", cwd=tmp_path)
    assert result.rc == 0, result.stderr
    one, other = snapshot(finished / "run"), snapshot(tmp_path / "run")
    assert one.keys() == other.keys()
    same = [name for name in one if name.endswith((".parquet", "manifest.json", "model.safetensors", "recipe.json"))]
    assert len(same) > 25
    assert [name for name in same if one[name] != other[name]] == []


def test_a_changed_option_is_refused_by_name_and_nothing_changes(copied, cli):
    before = snapshot(copied / "run")
    result = cli("run", "run.toml", "select.keep=2", cwd=copied)
    assert result.rc == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("dasd-lite: run/low/select: made with another configuration (keep: 1 there, 2 now)")
    assert "--force" in line
    assert snapshot(copied / "run") == before, "recipe.json included"


def test_force_replaces_only_what_differs(copied, cli):
    before = snapshot(copied / "run")
    result = cli("select", "run.toml", "--phase", "low", "--force", "select.keep=2", cwd=copied)
    assert result.rc == 0, result.stderr
    assert read_manifest(copied / "run" / "low" / "select")["config"]["keep"] == 2
    per_prompt = read_table(copied / "run" / "low" / "select", "kept")["prompt_uid"].value_counts().to_pylist()
    assert max(entry["counts"] for entry in per_prompt) == 2
    after = snapshot(copied / "run")
    changed = {name for name in before if after.get(name) != before[name]}
    assert all(name.startswith("low/select/") or name == "recipe.json" for name in changed), changed


def test_a_stage_command_refuses_inputs_made_with_other_options(copied, cli):
    before = snapshot(copied / "run")
    for stage in ("pack", "train"):
        for force in ((), ("--force",)):
            result = cli(stage, "run.toml", "--phase", "low", *force, "select.keep=2", cwd=copied)
            (line,) = result.stderr.splitlines()
            assert line.startswith("dasd-lite: run/low/select: made with another configuration (keep: 1 there, 2 now)")
            assert "run select and what follows it with --force" in line
            assert result.rc == 2 and snapshot(copied / "run") == before


def test_equivalent_spellings_of_an_option_are_the_same_configuration(small_recipe, tmp_path, cli):
    """select.max_tokens above the student's context is clamped to it, so it can also be left out."""
    small_recipe(tmp_path)
    long = ("select.keep=2", "pack.seq_len=5000", "select.max_tokens=4000")
    for options in (long, long[:2]):
        result = cli("select", "run.toml", "--phase", "low", *options, cwd=tmp_path)
        assert result.rc == 2 and "low/sample" in result.stderr  # it has not run yet
    for stage in ("sample", "score", "select", "pack"):
        assert cli(stage, "run.toml", "--phase", "low", *long, cwd=tmp_path).rc == 0
    for options in (long, long[:2]):
        result = cli("pack", "run.toml", "--phase", "low", *options, cwd=tmp_path)
        assert (result.rc, result.stdout.splitlines()[:1]) == (0, ["Nothing to do."]), result.stderr
    weighted = "low.select.weighting={ lam = 1.0 }"
    assert cli("select", "run.toml", "--phase", "low", "--force", *long, weighted, cwd=tmp_path).rc == 0
    result = cli("pack", "run.toml", "--phase", "low", *long, cwd=tmp_path)
    assert result.rc == 2 and "low/select: made with another configuration (weighting: {" in result.stderr


def test_an_option_that_only_affects_speed_is_not_another_configuration(finished, cli):
    result = cli("run", "run.toml", "score.batch_tokens=77", "teacher.batch_size=3", cwd=finished)
    assert (result.rc, result.stdout.splitlines()[0]) == (0, "Nothing to do.")


def test_only_a_deleted_folder_is_made_again(copied, cli):
    before = snapshot(copied / "run")
    shutil.rmtree(copied / "run" / "low" / "select")
    shutil.rmtree(copied / "run" / "mixed" / "pack")
    result = cli("run", "run.toml", cwd=copied)
    assert result.rc == 0, result.stderr
    assert re.findall(r"^(\w+/\w+) ", result.stdout, re.MULTILINE)[:2] == ["low/select", "mixed/pack"]
    after = snapshot(copied / "run")
    assert {name for name in before if after.get(name) != before[name]} <= {
        "low/select/timing.json",
        "mixed/pack/timing.json",
    }


def test_a_stage_or_phase_that_is_not_in_the_recipe(finished, cli):
    result = cli("select", "run.toml", "--phase", "lo", cwd=finished)
    assert (result.rc, result.stderr) == (
        2,
        "dasd-lite: this recipe has no stage select in phase lo; its phases are low, mixed\n",
    )
    assert cli("ingest", "run.toml", cwd=finished).rc == 2


def test_check_reports_the_size_of_a_run_and_options_without_effect(finished, cli):
    result = cli("check", "run.toml", "ingest.paths=['x']", cwd=finished)
    assert result.rc == 0, result.stderr
    assert "low: 16 answers of 8 prompts at T=0.6, at most 3,072 tokens" in result.stdout
    assert "phase 'low' has source = 'sample': its [ingest] settings have no effect" in result.stdout
    assert "Next: dasd-lite run run.toml 'ingest.paths=['" in result.stdout


def test_usage_errors_exit_with_two(tmp_path, cli):
    for arguments in (["nonsense"], ["run"], ["init", "moon"], ["check", "run.toml", "--until", "never"]):
        result = cli(*arguments, cwd=tmp_path)
        assert result.rc == 2, arguments
        assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_command(tmp_path, cli):
    result = cli("--help", cwd=tmp_path)
    commands = re.findall(r"^  (\w+) +\w", result.stdout.partition("Commands:")[2], re.MULTILINE)
    stages = ["sample", "ingest", "mix", "score", "select", "pack", "train", "evaluate"]
    assert commands == ["init", "check", "run", *stages, "report", "show", "export", "clean", "demo"]
    assert len(commands) == 16


def test_a_phase_that_replays_trains_on_answers_of_another(copied, cli):
    """As many steps on plain data as mixed policy took; the answers may come from another run's folder."""
    path, kept = copied / "run.toml", read_manifest(copied / "run" / "low" / "select")["counts"]["kept"]
    again = copied / "elsewhere" / "select"
    shutil.copytree(copied / "run" / "low" / "select", again)
    path.write_text(
        f"""{path.read_text()}
[[phase]]
name = "control"
source = "replay"
pack.replay_from = "low"
pack.replay_answers = {kept - 1}
[[phase]]
name = "all"
source = "replay"
pack.replay_from = "elsewhere/select"
"""
    )
    assert cli("check", "run.toml", "--until", "models", cwd=copied).rc == 0
    result = cli("run", "run.toml", cwd=copied)
    assert result.rc == 0, result.stderr
    lines = [line.split()[0] for line in result.stdout.splitlines() if re.match(r"(low|mixed|control|all)/", line)]
    assert lines == [f"{phase}/{stage}" for phase in ("control", "all") for stage in ("pack", "train", "evaluate")]
    counts = [read_manifest(copied / "run" / phase / "pack")["counts"] for phase in ("control", "all")]
    assert [(own["rollouts"], own["replayed"]) for own in counts] == [(kept - 1, kept - 1), (kept, kept)]
    shutil.rmtree(again)
    result = cli("check", "run.toml", "--until", "models", cwd=copied)
    assert result.rc == 2
    assert "phase 'all': pack.replay_from = elsewhere/select: neither an earlier phase nor a finished" in result.stderr
