"""kill -9 in every long stage, at named and at random moments: the same command finishes, nothing lost or twice."""

import json
import random
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.kills import DEATHS, KILLS, Commands, Moment, kill_again_and_again
from tests.recipes import write_recipe

from dasd_lite.data.dataset import read_table
from dasd_lite.data.manifest import read_manifest

# Moments of each long stage, in the order of the run: inside a transaction, around a commit, and between the steps that
# write a shard, a checkpoint, a model, or the end of the stage.
JOURNAL = ["INSERT .*{}/", "COMMIT .*{}/", "rename .*{}/.*parquet", "DELETE .*{}/", "remove .*{}/.*journal"]
TRAIN = ["open .*{}/.*shard", "rename .*{}/.*state", r"rename .*{}/.*step-\d+$", "rename .*{}/model"]
END = ["rename .*{}/manifest"]
NAMED = {
    "high/sample": JOURNAL + END,
    "high/score": JOURNAL + END,
    "high/train": TRAIN + END,
    "mixed/mix": JOURNAL + END,
    "mixed/evaluate": JOURNAL + END,
}
RECIPE = {
    "prompts": {"path": "demo:train.jsonl", "limit": 32},
    "teacher": {"kind": "transformers", "model": "demo:teacher", "batch_size": 8},
    "student": {"kind": "transformers", "model": "demo:student", "batch_size": 8},
    "sample": {"num_samples": 2, "max_tokens": 160},
    "select": None,
    "pack": {"seq_len": 256},
    "train": {"epochs": 4, "grad_accum_steps": 1, "checkpoint_every": 2, "learning_rate": 1e-3},
    "evaluate": {"prompts": "demo:validation.jsonl", "limit": 16, "num_samples": 1, "max_tokens": 160},
    "phase": [
        {"name": "high", "sample.temperature": 1.0},
        {
            "name": "mixed",
            "source": "mix",
            "mix": {"max_length_ratio": 0.6, "num_prompts": 16, "max_tokens": 160},
            "select": {"rule": "all", "require_think": False},
            "pack.replay": 1.0,
            "train.epochs": 1,
        },
    ],
}
TABLES = {
    "base/evaluate": "graded",
    "high/sample": "rollouts",
    "high/score": "scores",
    "high/evaluate": "graded",
    "mixed/mix/student": "rollouts",
    "mixed/mix": "rollouts",
    "mixed/evaluate": "graded",
}


@pytest.fixture
def commands(tmp_path):
    write_recipe(tmp_path, **RECIPE)
    commands = Commands(tmp_path)
    yield commands
    commands.close()


@pytest.mark.kills
@pytest.mark.timeout(7200)
def test_killed_at_any_moment_nothing_is_lost_or_twice(tmp_path, commands):
    reference, log = tmp_path / "reference", tmp_path / "events"
    assert commands.run("run", "run.toml", "out=reference", events=log) == 0, commands.stderr
    events = [line.split(" ", 1) for line in log.read_text().splitlines()]
    rng, deaths = random.Random(0), dict.fromkeys(NAMED, 0)
    number = compared = 0
    while sum(deaths.values()) < KILLS or not all(deaths.values()):
        number += 1
        killed = tmp_path / f"killed-{number}"

        def attempt(moment, killed=killed):
            code = commands.run("run", "run.toml", f"out={killed.name}", moment=moment)
            if code and (stage := unfinished(killed)) in deaths:
                deaths[stage] += 1
            return code

        kill_again_and_again(attempt, list(moments(events, rng)))
        check_data(reference, killed)
        compared += same_weights(reference, killed)
    assert compared, "no killed run trained on the very rows of the one that was not"


def moments(events, rng):
    """A named moment of each long stage in turn, and before some of them a random one."""
    for stage, named in NAMED.items():
        event = rng.choice(named).format(stage)
        number = rng.randint(1, sum(re.match(event, other) is not None for _, other in events))
        if rng.random() < 0.5:
            first = next(float(seconds) for seconds, other in events if f"/{stage}/" in other)
            last = next(float(seconds) for seconds, other in events if re.match(END[0].format(stage), other))
            yield Moment(f".*/{stage}/", cpu_s=rng.uniform(0, 0.6) * (last - first))
            number = 1  # how often it is still to happen depends on what was done
        yield Moment(event, number)


def unfinished(folder: Path) -> str | None:
    """Return the stage that was under way when the process died."""
    stages = (str(path.parent.relative_to(folder)) for path in folder.rglob("unfinished.json"))
    return next((name.removesuffix("/student") for name in stages), None)


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob(pattern))}


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_data(reference: Path, killed: Path) -> None:
    for name, table in TABLES.items():
        expected, rows = (read_rows(folder / name, table) for folder in (reference, killed))
        assert [row["uid"] for row in rows] == [row["uid"] for row in expected], name
        # Batches differ after a kill, so sums may be rounded otherwise; the seeds make the text the same.
        same = sum(a.get("completion") == b.get("completion") for a, b in zip(rows, expected, strict=True))
        assert same >= 0.98 * len(expected), f"{name}: {same} of {len(expected)} texts are the same"
    for phase in ("high", "mixed"):
        assert steps(killed / phase / "train") == list(range(1, len(steps(killed / phase / "train")) + 1))


def same_weights(reference: Path, killed: Path) -> bool:
    """Hold the weights of the first phase against each other, to the bit; False when the rows differ by rounding."""
    if files(reference / "high" / "pack", "*.parquet") != files(killed / "high" / "pack", "*.parquet"):
        return False
    model = Path("high") / "train" / "model"
    assert files(reference / model, "*.safetensors") == files(killed / model, "*.safetensors")
    return True


def read_rows(folder: Path, table: str) -> list[dict[str, object]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [shard["file"] for shard in manifest["tables"][table]]
    assert sorted(names) == sorted(p.name for p in folder.glob(f"{table}-*")), "files that no manifest names"
    return [row for name in names for row in pq.read_table(folder / name).to_pylist()]


# --- folders that grow, and folders that are set aside --------------------------------------------------

TAKING_UP = ["COMMIT .*{}/", "rename .*{}/unfinished", "remove .*{}/manifest"]
GROWING = [*TAKING_UP, *JOURNAL, "rename .*{}/.*order", *END]
MORE = ("prompts.limit=40", "sample.num_samples=3", "sample.max_tokens=170")


@pytest.fixture
def sampled(tmp_path, commands):
    """A finished sample and score, as `base`; how a growing folder looks in the end, as `reference`; and its events."""
    for stage in ("sample", "score"):
        assert commands.run(stage, "run.toml", "out=base", "--phase", "high") == 0, commands.stderr
    shutil.copytree(tmp_path / "base", tmp_path / "reference")
    log = tmp_path / "events"
    for stage in ("sample", "score"):
        command = [stage, "run.toml", *MORE, "out=reference", "--phase", "high"]
        assert commands.run(*command, events=tmp_path / stage) == 0, commands.stderr
    log.write_text("".join((tmp_path / stage).read_text() for stage in ("sample", "score")))
    return [line.split(" ", 1)[1] for line in log.read_text().splitlines()]


@pytest.mark.kills
@pytest.mark.timeout(7200)
def test_killed_while_growing_nothing_is_lost_or_asked_twice(tmp_path, commands, sampled):
    rng = random.Random(1)
    base = {path.name: path.read_bytes() for path in (tmp_path / "base/high/sample").glob("*.parquet")}
    deaths = number = 0
    while deaths < KILLS or number < 2:
        number += 1
        killed = tmp_path / f"killed-{number}"
        shutil.copytree(tmp_path / "base", killed)
        for stage, table in (("sample", "rollouts"), ("score", "scores")):

            def attempt(moment, stage=stage, killed=killed):
                return commands.run(stage, "run.toml", *MORE, f"out={killed.name}", "--phase", "high", moment=moment)

            events = [event.format(f"high/{stage}") for event in GROWING]
            happens = {event: sum(re.match(event, other) is not None for other in sampled) for event in events}
            chosen = rng.sample([event for event in events if happens[event]], k=3)
            deaths += kill_again_and_again(attempt, [Moment(event, rng.randint(1, happens[event])) for event in chosen])
            expected, rows = (read_table(folder / "high" / stage, table) for folder in (tmp_path / "reference", killed))
            assert rows["uid"].to_pylist() == expected["uid"].to_pylist()
        shards = {path.name: path.read_bytes() for path in (killed / "high/sample").glob("rollouts-*.parquet")}
        assert shards.items() >= base.items(), "what was there before is there to the byte"
        stored = [row for name in shards for row in pq.read_table(killed / "high/sample" / name).to_pylist()]
        counted = json.loads((killed / "high/sample/timing.json").read_text())["completion_tokens"]
        assert counted == sum(row["num_tokens"] for row in stored), "every answer that was sampled is there, once"
        limits = [(row["uid"], row["max_tokens"]) for row in stored]
        assert len(set(limits)) == len(limits)


@pytest.mark.kills
@pytest.mark.timeout(7200)
def test_killed_under_force_the_plain_command_goes_on(tmp_path, commands, sampled):
    before = read_table(tmp_path / "base/high/sample", "rollouts")
    command = ["sample", "run.toml", "high.sample.temperature=0.8", "--phase", "high"]
    moments = [
        "rename .*sample .*replaced",
        "rename .*high/sample/unfinished",
        *JOURNAL[:3],
        "rename .*sample/manifest",
    ]
    for number, event in enumerate(event.format("high/sample") for event in moments):
        killed = tmp_path / f"forced-{number}"
        shutil.copytree(tmp_path / "base", killed)
        code = commands.run(*command, f"out={killed.name}", "--force", moment=Moment(event))
        assert code in DEATHS
        is_aside = (killed / "high/sample.replaced-1").is_dir()
        assert is_aside or number == 0
        code = commands.run(*command, f"out={killed.name}", *([] if is_aside else ["--force"]))
        assert code == 0, commands.stderr
        assert read_table(killed / "high/sample.replaced-1", "rollouts").equals(before), "to the last answer"
        assert read_manifest(killed / "high/sample")["config"]["temperature"] == 0.8
        assert not (killed / "high/sample.replaced-2").exists()
