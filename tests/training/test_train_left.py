"""What an earlier call of training left, damaged or out of reach: one line each, and nothing is lost."""

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from tests.rows import make_model, make_rows, write_rows

from dasd_lite.config.train import TrainConfig
from dasd_lite.errors import CheckpointError, ConfigError, DataError, TrainError
from dasd_lite.stages import train
from dasd_lite.training import checkpoint

CONFIG = TrainConfig(epochs=2, learning_rate=1e-2, min_learning_rate=1e-3, grad_accum_steps=2, checkpoint_every=2)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A training that ended in its sixth step, with the checkpoint of the fourth; what goes on with it."""
    model = make_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows", make_rows(16))

    def go_on():
        return train.run(rows, model, CONFIG, tmp_path / "out", seed=0)

    monkeypatch.setattr("dasd_lite.training.guard.check_step", lambda *a: "a fault" if len(a[2]) == 5 else None)
    with pytest.raises(TrainError, match="the checkpoint of step 4 is kept"):
        go_on()
    monkeypatch.undo()
    (newest,) = (tmp_path / "out" / "checkpoints").iterdir()
    return newest, go_on


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
    newest, go_on = stopped
    metrics = newest.parents[1] / "metrics.jsonl"
    lines = metrics.read_text()
    DAMAGE[case](newest)
    with pytest.raises(CheckpointError, match=r"damaged .* remove it, and training goes on from step 1$") as caught:
        go_on()
    assert str(caught.value).startswith(f"{newest}: ") and "\n" not in str(caught.value)
    assert metrics.read_text() == lines


def test_other_names_are_no_checkpoints_and_damaged_metrics_are_said(stopped):
    newest, go_on = stopped
    (newest.parent / "step-abcdefgh").mkdir()
    metrics = newest.parents[1] / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("\n".join(["rubbish", *whole.splitlines()[1:]]) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: damaged"):
        go_on()
    metrics.write_bytes(b"\xff" + whole.encode())
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: damaged \(.*utf-8"):
        go_on()
    assert metrics.read_bytes() == b"\xff" + whole.encode()
    metrics.write_text(whole)
    assert go_on()["counts"]["steps"] == 16


def refuse(path, *arguments):
    """A superuser, as tests may run, is refused nothing."""
    raise PermissionError(13, "Permission denied", str(path))


def test_a_folder_that_cannot_be_read_is_not_taken_for_none(stopped, monkeypatch):
    newest, go_on = stopped
    lines = (newest.parents[1] / "metrics.jsonl").read_text()
    monkeypatch.setattr(checkpoint, "os", SimpleNamespace(**vars(os) | {"listdir": refuse}))
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\); training would begin anew"):
        go_on()
    assert (newest.parents[1] / "metrics.jsonl").read_text() == lines


def test_a_folder_that_cannot_be_written_is_said_before_the_first_step(stopped, monkeypatch):
    newest, go_on = stopped
    lines = (newest.parents[1] / "metrics.jsonl").read_text()
    monkeypatch.setattr(checkpoint.Path, "write_bytes", refuse)
    with pytest.raises(DataError, match=r"checkpoints/try.tmp: Permission denied; what is committed stays"):
        go_on()
    assert (newest.parents[1] / "metrics.jsonl").read_text() == lines


def test_what_is_there_stays_until_training_can_begin(stopped):
    newest, go_on = stopped
    go_on()
    out = newest.parents[1]
    before = {path.name: path.stat().st_mtime_ns for path in out.rglob("*")}
    for config, refused in ((CONFIG.model_copy(update={"grad_accum_steps": 99}), TrainError), (CONFIG, ConfigError)):
        model = out.parent / "model"
        if config is CONFIG:  # an odd model comes up later yet
            (weights,) = model.glob("*.safetensors")
            weights.write_bytes(weights.read_bytes()[:4000])
        with pytest.raises(refused):
            train.run(out.parent / "rows", model, config, out, seed=1, force=True)
        assert {path.name: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_model_that_lacks_weights_is_no_model(tmp_path):
    model = make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights.pop("model.layers.0.mlp.down_proj.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = write_rows(tmp_path / "rows", make_rows(16))
    with pytest.raises(ConfigError, match=r"model: its files lack the weights of model.layers.0.mlp.down_proj.weight;"):
        train.run(rows, model, CONFIG, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


def test_others_may_read_what_was_trained(stopped):
    newest, go_on = stopped
    go_on()
    model = newest.parents[1] / "model"
    assert len({path.stat().st_mode for path in model.iterdir()}) == 1
