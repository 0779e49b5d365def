"""Training that is killed at any instant, or runs out of disk, and the same call after it."""

import random
import signal

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.kills import KILLS, Moment, kill_again_and_again
from tests.trainer import Trainer, metrics, result


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("train"))
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def reference(trainer):
    """A run without interruption."""
    out = trainer.base / "reference"
    assert trainer.run(out) == 0, trainer.errors.read_text()
    return out


@pytest.mark.kills
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_nothing_changes(trainer, reference):
    draw, kills, run = random.Random(0), 0, 0
    while kills < KILLS:
        out = trainer.base / f"killed-{run}"
        moments = [Moment(f".*/{out.name}/", draw.randint(1, 60), draw.uniform(0, 0.1)) for _ in range(4)]
        kills += kill_again_and_again(lambda moment, out=out: trainer.run(out, moment=moment), moments)
        assert result(out) == result(reference)
        assert [line["step"] for line in metrics(out)] == list(range(1, 37))
        run += 1


@pytest.mark.parametrize(("method", "optimizer"), [("full", "adamw_8bit"), ("lora", "adamw_8bit"), ("qlora", "adamw")])
def test_adapters_and_moments_in_8_bits_resume_to_the_bit(trainer, method, optimizer):
    shape = {} if method == "full" else {"rank": 8, "alpha": 16.0}
    config = {"method": {"kind": method, **shape}, "optimizer": optimizer, "learning_rate": 2e-3}
    folder = trainer.base / f"{method}-{optimizer}"
    assert trainer.run(folder / "reference", config=config) == 0, trainer.errors.read_text()
    fifth = Moment(r"rename .*checkpoints/step-\d+$", 5)  # after ten steps, before its checkpoint is there
    assert trainer.run(folder / "killed", config=config, moment=fifth) == -signal.SIGKILL
    assert trainer.run(folder / "killed", config=config) == 0, trainer.errors.read_text()
    assert result(folder / "killed") == result(folder / "reference")


def test_a_full_disk_is_one_line_and_the_same_call_resumes(trainer, reference):
    out = trainer.base / "full"
    for limit, written in ((60_000, False), (300_000, True)):  # too little for the weights, and for a checkpoint
        assert trainer.run(out, limit=limit) == 2
        message = trainer.errors.read_text().splitlines()[-1]
        assert "no space left on the device" in message
        assert out.exists() == written, "the trial of the export comes before anything is written"
        assert not [p.name for p in out.glob("checkpoints/*") if p.suffix != ".tmp"]
    assert trainer.run(out) == 0
    assert result(out) == result(reference)
