"""Training that is killed at any instant, or runs out of disk, and the same call after it."""

import os
import random
import signal

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.trainer import Trainer, metrics, result

KILLS = int(os.environ.get("DASD_KILLS", "20"))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("train"))
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def whole(trainer):
    """A run that nothing disturbed, and its seconds."""
    out = trainer.base / "whole"
    assert trainer.run(out) == 0, trainer.errors.read_text()
    took = (out / "manifest.json").stat().st_mtime - (trainer.base / "rows").stat().st_mtime
    return out, min(took, sum(line["seconds"] for line in metrics(out)) + 1.0)


@pytest.mark.timeout(3600)
def test_killed_at_random_moments_nothing_changes(trainer, whole):
    reference, seconds = whole
    draw, kills, run = random.Random(0), 0, 0
    while kills < KILLS:
        out, here = reference.with_name(f"killed-{run}"), 0
        while True:
            code = trainer.run(out, kill_after=draw.uniform(0.05, 1.0) * seconds if here < 4 else None)
            if code == 0:
                break
            assert code == -signal.SIGKILL, trainer.errors.read_text()
            here += 1
        assert result(out) == result(reference)
        assert [line["step"] for line in metrics(out)] == list(range(1, 37))
        kills, run = kills + here, run + 1


@pytest.mark.parametrize(("method", "optimizer"), [("full", "adamw_8bit"), ("lora", "adamw_8bit"), ("qlora", "adamw")])
def test_adapters_and_moments_in_8_bits_go_on_to_the_bit(trainer, whole, method, optimizer):
    shape = {} if method == "full" else {"rank": 8, "alpha": 16.0}
    config = {"method": {"kind": method, **shape}, "optimizer": optimizer, "learning_rate": 2e-3}
    folder = trainer.base / f"{method}-{optimizer}"
    assert trainer.run(folder / "whole", config=config) == 0, trainer.errors.read_text()

    def after_some_steps():
        path = folder / "killed" / "metrics.jsonl"
        while not path.exists() or len(path.read_text().splitlines()) < 9:
            pass

    assert trainer.run(folder / "killed", config=config, kill_after=after_some_steps) == -signal.SIGKILL
    assert trainer.run(folder / "killed", config=config) == 0, trainer.errors.read_text()
    assert result(folder / "killed") == result(folder / "whole")


def test_a_full_disk_is_one_line_and_the_same_call_goes_on(trainer, whole):
    reference, _ = whole
    out = reference.with_name("full")
    assert trainer.run(out, limit=60_000) == 2  # the weights are larger, rows and metrics are not
    message = trainer.errors.read_text().splitlines()[-1]
    assert "no space left on the device" in message
    assert [p.name for p in (out / "checkpoints").iterdir() if p.suffix != ".tmp"] == []
    assert trainer.run(out) == 0
    assert result(out) == result(reference)
