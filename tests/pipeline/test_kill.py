"""kill -9 in every long stage, at named and at random moments: the same command finishes, nothing lost or twice."""

import json
import random
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.kills import KILLS, Commands, Moment, kill_again_and_again
from tests.recipes import write_recipe

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
