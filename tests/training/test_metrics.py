"""Trackers: TensorBoard's file read back, the message for a missing package, how the others are called."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dasd_lite.config.train import TrainConfig
from dasd_lite.errors import ConfigError
from dasd_lite.training.metrics import open_tracker

CONFIG = TrainConfig(learning_rate=1e-3).model_dump(mode="json")


def read_back(folder):
    """Every scalar of the folder as (step, value), and its texts, as TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in tags["scalars"]}
    texts = [event.tensor_proto.string_val[0].decode() for name in tags["tensors"] for event in events.Tensors(name)]
    return scalars, texts


def log_steps(kind, folder, steps, shift=0.0):
    with open_tracker(kind, "demo low", folder, CONFIG) as tracker:
        for step in steps:
            tracker.log(step, {"loss": 1 / step + shift, "grad_norm": float(step)})


def test_tensorboard_s_file_holds_what_was_logged(tmp_path):
    log_steps("tensorboard", tmp_path, range(1, 6))
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    scalars, texts = read_back(tmp_path / "tensorboard")
    assert scalars.keys() == {"loss", "grad_norm"}
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4, 5]
    assert [value for _, value in scalars["loss"]] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert json.loads(texts[0]) == CONFIG


def test_tensorboard_has_every_step_once_after_training_resumed(tmp_path):
    log_steps("tensorboard", tmp_path, range(1, 6))
    log_steps("tensorboard", tmp_path, range(4, 9), shift=10)
    scalars, _ = read_back(tmp_path / "tensorboard")
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [value > 10 for _, value in scalars["loss"]] == [False] * 3 + [True] * 5


def test_what_is_logged_is_on_disk_before_the_next_step(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = open_tracker("tensorboard", "demo low", tmp_path, CONFIG)
    tracker.log(1, {"loss": 0.5})
    assert read_back(tmp_path / "tensorboard")[0] == {"loss": [(1, 0.5)]}
    tracker.close()


def test_nothing_is_written_before_a_step_or_without_a_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    log_steps("tensorboard", tmp_path, [])
    log_steps("none", tmp_path, range(1, 6))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio"), ("wandb", "wandb")]
)
def test_a_missing_package_is_one_line_with_key_and_command(monkeypatch, tmp_path, kind, module):
    def missing(name):
        assert name == module
        raise ModuleNotFoundError(f"No module named {kind!r}", name=kind)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError) as caught:
        open_tracker(kind, "demo low", tmp_path, CONFIG)
    wanted = f"train.tracker = {kind!r}: No module named {kind!r}; run: pip install {kind}"
    assert str(caught.value) == wanted


def test_the_folder_that_wandb_leaves_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"wandb is not installed; run: pip install wandb$"):
        open_tracker("wandb", "demo low", tmp_path, CONFIG)
    monkeypatch.delitem(sys.modules, "wandb")


class Recorder(SimpleNamespace):
    """Stands for the package: it keeps the calls, and prints as trackio does."""

    Error = type("Error", (Exception,), {})

    def __init__(self, refusal=""):
        super().__init__(__file__="package", calls=[], refusal=refusal)

    def Settings(self, **options):
        return options

    def init(self, **options):
        print("* project initialized")
        if self.refusal:
            raise self.Error(self.refusal)
        self.calls.append(("init", options))

    def log(self, metrics, step):
        self.calls.append(("log", step, metrics))

    def finish(self):
        print("* run finished")
        self.calls.append(("finish",))


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_how_trackio_and_wandb_are_called(monkeypatch, tmp_path, capsys, kind):
    package = Recorder()
    monkeypatch.setitem(sys.modules, kind, package)
    with pytest.raises(KeyboardInterrupt), open_tracker(kind, "demo low", tmp_path, CONFIG) as tracker:
        tracker.log(3, {"loss": 0.5})
        raise KeyboardInterrupt
    options = {"project": "dasd-lite", "name": "demo low", "group": "demo low", "config": CONFIG}
    if kind == "wandb":
        options |= {"dir": tmp_path, "settings": {"console": "off"}}
    assert package.calls == [("init", options), ("log", 3, {"loss": 0.5}), ("finish",)]
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "* project initialized\n* run finished\n")


def test_wandb_without_an_account_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", Recorder("No API key configured. Use `wandb login` to log in.\nmore"))
    with pytest.raises(ConfigError) as caught:
        open_tracker("wandb", "demo low", tmp_path, CONFIG)
    assert str(caught.value) == (
        "train.tracker = 'wandb': No API key configured. Use `wandb login` to log in;"
        " or set WANDB_MODE=offline to keep everything on this machine"
    )


def test_no_tracker_is_imported_unless_it_is_named(tmp_path):
    code = (
        "import sys; from pathlib import Path; from dasd_lite.training.metrics import open_tracker\n"
        "with open_tracker('none', 'x', Path(), {}) as tracker: tracker.log(1, {'loss': 0.5})\n"
        "print({'torch', 'tensorboard', 'trackio', 'wandb'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert TrainConfig().tracker == "none"
