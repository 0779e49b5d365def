"""The command line on a run of a few seconds: what is done is not done again, what differs is refused by name."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dasd_lite.data.dataset import read_table
from dasd_lite.data.manifest import read_manifest


def stages_of(run):
    return sorted(str(path.parent.relative_to(run)) for path in run.rglob("manifest.json"))


def snapshot(folder):
    """Every file but the lock and the report, with its content."""
    skipped = ("report.html", ".lock")
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skipped
    }


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run that may be changed; its fingerprints know nothing of places."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_run_goes_down_the_chain(finished):
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


def test_the_same_command_says_nothing_to_do_and_does_nothing(finished, cli):
    before = snapshot(finished / "run")
    done = cli("run", "run.toml", cwd=finished)
    assert (done.rc, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "Nothing to do."
    assert "report.html" in done.stdout
    assert snapshot(finished / "run") == before


def test_a_stage_by_its_name_is_the_same_stage(finished, cli):
    done = cli("select", "run.toml", "--phase", "low", cwd=finished)
    assert (done.rc, done.stdout.splitlines()[0]) == (0, "Nothing to do.")
    assert "Next: dasd-lite run run.toml" in done.stdout
    for stage in ("sample", "train"):
        done = cli(stage, "run.toml", cwd=finished)
        folder = done.stdout.splitlines()[-1].rpartition(" ")[2]
        assert cli("show", folder, cwd=finished).rc == 0, folder


def test_the_same_seed_gives_the_same_bytes(finished, small_recipe, tmp_path, cli):
    small_recipe(tmp_path)
    done = cli("run", "run.toml", cwd=tmp_path)
    assert done.rc == 0, done.stderr
    one, other = snapshot(finished / "run"), snapshot(tmp_path / "run")
    assert one.keys() == other.keys()
    same = [name for name in one if name.endswith((".parquet", "manifest.json", "model.safetensors", "recipe.json"))]
    assert len(same) > 25
    assert [name for name in same if one[name] != other[name]] == []


def test_a_changed_option_is_refused_by_name_and_nothing_changes(copied, cli):
    before = snapshot(copied / "run")
    done = cli("run", "run.toml", "select.keep=2", cwd=copied)
    assert done.rc == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("dasd-lite: run/low/select: made with another configuration (keep: 1 there, 2 now)")
    assert "--force" in line
    assert snapshot(copied / "run") == before, "recipe.json included"


def test_force_replaces_what_differs_and_only_that(copied, cli):
    before = snapshot(copied / "run")
    done = cli("select", "run.toml", "--phase", "low", "--force", "select.keep=2", cwd=copied)
    assert done.rc == 0, done.stderr
    assert read_manifest(copied / "run" / "low" / "select")["config"]["keep"] == 2
    per_prompt = read_table(copied / "run" / "low" / "select", "kept")["prompt_uid"].value_counts().to_pylist()
    assert max(entry["counts"] for entry in per_prompt) == 2
    after = snapshot(copied / "run")
    changed = {name for name in before if after.get(name) != before[name]}
    assert all(name.startswith("low/select/") or name == "recipe.json" for name in changed), changed


def test_a_stage_alone_refuses_what_other_options_have_made(copied, cli):
    before = snapshot(copied / "run")
    for stage in ("pack", "train"):
        for force in ((), ("--force",)):
            done = cli(stage, "run.toml", "--phase", "low", *force, "select.keep=2", cwd=copied)
            (line,) = done.stderr.splitlines()
            assert line.startswith("dasd-lite: run/low/select: made with another configuration (keep: 1 there, 2 now)")
            assert "run select and what follows it with --force" in line
            assert done.rc == 2 and snapshot(copied / "run") == before


def test_what_a_stage_puts_in_place_of_an_option_is_no_other_one(small_recipe, tmp_path, cli):
    """A longest answer over the student's context is its context: the same folder, whichever way it is written."""
    small_recipe(tmp_path)
    long = ("select.keep=2", "pack.seq_len=5000", "select.max_tokens=4000")
    for options in (long, long[:2]):
        done = cli("select", "run.toml", "--phase", "low", *options, cwd=tmp_path)
        assert done.rc == 2 and "low/sample" in done.stderr  # there is nothing yet
    for stage in ("sample", "score", "select", "pack"):
        assert cli(stage, "run.toml", "--phase", "low", *long, cwd=tmp_path).rc == 0
    for options in (long, long[:2]):
        done = cli("pack", "run.toml", "--phase", "low", *options, cwd=tmp_path)
        assert (done.rc, done.stdout.splitlines()[:1]) == (0, ["Nothing to do."]), done.stderr
    weighted = "low.select.weighting={ lam = 1.0 }"
    assert cli("select", "run.toml", "--phase", "low", "--force", *long, weighted, cwd=tmp_path).rc == 0
    done = cli("pack", "run.toml", "--phase", "low", *long, cwd=tmp_path)
    assert done.rc == 2 and "low/select: made with another configuration (weighting: {" in done.stderr


def test_an_option_that_only_says_how_fast_is_no_other_configuration(finished, cli):
    done = cli("run", "run.toml", "score.batch_tokens=77", "teacher.batch_size=3", cwd=finished)
    assert (done.rc, done.stdout.splitlines()[0]) == (0, "Nothing to do.")


def test_a_folder_that_is_gone_is_made_again_and_the_rest_stays(copied, cli):
    before = snapshot(copied / "run")
    shutil.rmtree(copied / "run" / "low" / "select")
    shutil.rmtree(copied / "run" / "mixed" / "pack")
    done = cli("run", "run.toml", cwd=copied)
    assert done.rc == 0, done.stderr
    assert re.findall(r"^(\w+/\w+) ", done.stdout, re.MULTILINE)[:2] == ["low/select", "mixed/pack"]
    after = snapshot(copied / "run")
    assert {name for name in before if after.get(name) != before[name]} <= {
        "low/select/timing.json",
        "mixed/pack/timing.json",
    }


def test_a_stage_or_phase_that_is_not_in_the_recipe(finished, cli):
    done = cli("select", "run.toml", "--phase", "lo", cwd=finished)
    assert (done.rc, done.stderr) == (
        2,
        "dasd-lite: this recipe has no stage select in phase lo; its phases are low, mixed\n",
    )
    assert cli("ingest", "run.toml", cwd=finished).rc == 2


def test_check_says_what_a_run_costs_and_what_nothing_reads(finished, cli):
    done = cli("check", "run.toml", "ingest.paths=['x']", cwd=finished)
    assert done.rc == 0, done.stderr
    assert "low: 16 answers of 8 prompts at T=0.6, at most 3,072 tokens" in done.stdout
    assert "phase 'low' has source = 'sample': its [ingest] settings have no effect" in done.stdout
    assert "Next: dasd-lite run run.toml 'ingest.paths=['" in done.stdout


def test_usage_errors_exit_with_two(tmp_path, cli):
    for arguments in (["nonsense"], ["run"], ["init", "moon"], ["check", "run.toml", "--until", "never"]):
        done = cli(*arguments, cwd=tmp_path)
        assert done.rc == 2, arguments
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_screen_of_help_names_every_verb(tmp_path, cli):
    done = cli("--help", cwd=tmp_path)
    verbs = re.findall(r"^  (\w+) +\w", done.stdout.partition("Commands:")[2], re.MULTILINE)
    stages = ["sample", "ingest", "mix", "score", "select", "pack", "train", "evaluate"]
    assert verbs == ["init", "check", "run", *stages, "report", "show", "demo"]
    assert len(verbs) == 14
