"""Where the metrics of training go beside metrics.jsonl: trackio, wandb or TensorBoard, each by its own calls.

    with open_tracker(config.tracker, name, out, config.model_dump()) as tracker:
        tracker.log(step, {"loss": 0.5})

Input: the metrics of a step. Invariant: no package is imported and nothing is sent anywhere unless `train.tracker`
names it. trackio keeps its own database on this machine, wandb talks to its server (WANDB_MODE=offline: to files in the
stage's folder), TensorBoard reads the stage's folder.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal, Self

from dasd_lite.errors import ConfigError

PROJECT = "dasd-lite"


class Tracker:
    """Takes the metrics of each step; this one does nothing with them."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Pass on the metrics of a step, counted from 1; steps only rise."""

    def close(self) -> None:
        """Wait until all is passed on."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close, whatever happened: the last metrics of a run that failed are those one wants to see."""
        self.close()


def open_tracker(
    kind: Literal["none", "trackio", "wandb", "tensorboard"], name: str, folder: Path, config: dict[str, Any]
) -> Tracker:
    """Begin a run called `name` with what `config` holds; files go into `folder`, where the package lets us choose.

    Training that goes on after a stop begins a run of its own in trackio and wandb, in the same group.
    Raises ConfigError when the package is not installed, or wandb knows no account.
    """
    if kind == "none":
        return Tracker()
    if kind == "tensorboard":
        return _TensorBoard(_imported("torch.utils.tensorboard", kind), folder / "tensorboard", config)
    package = _imported(kind, kind)
    # Standard output is for results, and trackio tells its own there.
    with contextlib.redirect_stdout(sys.stderr):
        if kind == "trackio":
            package.init(project=PROJECT, name=name, group=name, config=config)
            return _Run(package)
        # It would put itself between the terminal and the progress bar, and send what is printed.
        settings = package.Settings(console="off")
        try:
            package.init(project=PROJECT, name=name, group=name, config=config, dir=folder, settings=settings)
        except package.Error as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ConfigError(
                f"train.tracker = 'wandb': {reason}; WANDB_MODE=offline keeps all of it on this machine"
            ) from error
        return _Run(package)


def _imported(module: str, package: str) -> ModuleType:
    """Import a module of a package that need not be installed."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"train.tracker = {package!r}: {error}; it comes with: pip install {package}") from error
    # The folder ./wandb of earlier runs imports as an empty package where the real one is not installed.
    if found.__file__ is None:
        raise ConfigError(
            f"train.tracker = {package!r}: {package} is not installed; it comes with: pip install {package}"
        )
    return found


class _Run(Tracker):
    """The run that trackio or wandb is at; they have the same calls."""

    def __init__(self, package: ModuleType) -> None:
        self._package = package

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._package.log(metrics, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._package.finish()


class _TensorBoard(Tracker):
    """A file of events; it begins with the first step, for only then it is known what an earlier one has too much."""

    def __init__(self, module: ModuleType, folder: Path, config: dict[str, Any]) -> None:
        self._module, self._folder, self._config = module, folder, config
        self._writer: Any = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is None:
            # Training goes on from a checkpoint: what was written of the steps after it is read no more.
            self._writer = self._module.SummaryWriter(str(self._folder), purge_step=step)
            text = json.dumps(self._config, indent=2, default=str)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # or a kill -9 takes up to two minutes of it

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
