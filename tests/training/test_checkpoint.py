"""Checkpoints: large ones, and those that are damaged or cannot be read."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import loss_sum, make_model, make_rows, write_rows

from dasd_lite.config.train import Full, TrainConfig
from dasd_lite.errors import CheckpointError, DataError, TrainError
from dasd_lite.stages.train import train
from dasd_lite.training import checkpoint
from dasd_lite.training.optimizer import make_optimizer
from dasd_lite.training.trainable import load_trainable

CONFIG = TrainConfig(epochs=2, learning_rate=1e-2, min_learning_rate=1e-3, grad_accum_steps=2, checkpoint_every=2)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The checkpoint of the fourth step of a training run that failed in its sixth, and a function that resumes it."""
    model = make_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows", make_rows(16))

    def resume():
        return train(rows, model, CONFIG, out=tmp_path / "out")

    monkeypatch.setattr("dasd_lite.training.loop.check_step", lambda *a: "a fault" if len(a[2]) == 5 else None)
    with pytest.raises(TrainError, match="the checkpoint of step 4 is kept"):
        resume()
    monkeypatch.undo()
    (newest,) = (tmp_path / "out" / "checkpoints").iterdir()
    return newest, resume


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit": lambda newest: flip(next(newest.glob("*.safetensors"))),
    "no weights": lambda newest: next(newest.glob("*.safetensors")).unlink(),
    "no state": lambda newest: (newest / "state.json").unlink(),
    "empty state": lambda newest: (newest / "state.json").write_text("{}"),
    "a list": lambda newest: (newest / "state.json").write_text("[]"),
    "half of it": lambda newest: (newest / "state.json").write_text((newest / "state.json").read_text()[:40]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_anything_is_touched(stopped, case):
    newest, resume = stopped
    metrics = newest.parents[1] / "metrics.jsonl"
    lines = metrics.read_text()
    DAMAGE[case](newest)
    with pytest.raises(CheckpointError, match=r"damaged .* remove it to resume from step 1$") as caught:
        resume()
    assert str(caught.value).startswith(f"{newest}: ") and "\n" not in str(caught.value)
    assert metrics.read_text() == lines


def test_other_names_are_no_checkpoints_and_damaged_metrics_are_refused(stopped):
    newest, resume = stopped
    (newest.parent / "step-abcdefgh").mkdir()
    metrics = newest.parents[1] / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text("\n".join(["rubbish", *text.splitlines()[1:]]) + "\n")
    with pytest.raises(DataError, match=r"metrics.jsonl:1: damaged .*; remove .* to train from scratch"):
        resume()
    metrics.write_bytes(b"\xff" + text.encode())
    with pytest.raises(DataError, match=r"metrics.jsonl:1: damaged \(.*utf-8"):
        resume()
    assert metrics.read_bytes() == b"\xff" + text.encode()
    metrics.write_text(text)
    assert resume().counts["steps"] == 16


def refuse(path, *arguments):
    """What a file system does to everybody but the superuser, as whom tests may run."""
    raise PermissionError(13, "Permission denied", str(path))


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(stopped, monkeypatch):
    newest, resume = stopped
    lines = (newest.parents[1] / "metrics.jsonl").read_text()
    monkeypatch.setattr(checkpoint, "os", SimpleNamespace(**vars(os) | {"listdir": refuse}))
    with pytest.raises(
        CheckpointError,
        match=r"cannot be read \(Permission denied\), and training would start from",
    ):
        resume()
    assert (newest.parents[1] / "metrics.jsonl").read_text() == lines


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(stopped, monkeypatch):
    newest, resume = stopped
    lines = (newest.parents[1] / "metrics.jsonl").read_text()
    monkeypatch.setattr(checkpoint.Path, "write_bytes", refuse)
    with pytest.raises(DataError, match=r"checkpoints/try.tmp: Permission denied; finished work is kept"):
        resume()
    assert (newest.parents[1] / "metrics.jsonl").read_text() == lines


def test_checkpoints_of_many_files(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 20_000)

    def fresh():
        model = load_trainable(tiny, Full(), device="cpu")
        return model, make_optimizer(model, TrainConfig())

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model, optimizer = fresh()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(3):
        loss_sum(model, np.arange(30), np.ones(30, dtype=bool), [30]).backward()
        optimizer.step()
    checkpoint.save(tmp_path, 3, model, optimizer, scaler, "f")
    assert len(list((tmp_path / "step-00000003").glob("*.safetensors"))) > 3
    again, its_optimizer = fresh()
    assert checkpoint.restore(tmp_path, again, its_optimizer, scaler, "f") == 3
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(its_optimizer.state[q], optimizer.state[p], rtol=0, atol=0)
    with pytest.raises(checkpoint.CheckpointError, match="another configuration"):
        checkpoint.restore(tmp_path, again, its_optimizer, scaler, "g")
