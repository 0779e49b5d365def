"""What is told of training: metrics.jsonl, the progress bar, the tracker.

Input: the figures of each step. Invariant: only the first process writes; after a stop the lines are those of the steps
that the checkpoint knows.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import sys
import time
from itertools import islice
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, Self

from dasd_lite.console import Progress, progress
from dasd_lite.data.files import disk_errors, sync_open_file
from dasd_lite.data.metrics import read_metrics, truncate_metrics
from dasd_lite.errors import ConfigError

if TYPE_CHECKING:
    from dasd_lite.training.job import Job


class Log:
    """metrics.jsonl, the progress bar and the tracker; in other processes than the first it does nothing."""

    def __init__(self, job: Job, first: int) -> None:
        """Go on after `first` steps; lines of later ones are of a run that was stopped, and go."""
        self._job, self._is_first = job, job.ranks.is_first
        schedule, path = job.schedule, job.task.out / "metrics.jsonl"
        self.tokens = [int(job.rows.num_tokens[schedule.rows_of(step)].sum()) for step in range(schedule.num_steps)]
        self.losses = [float(line["loss"]) for line in islice(read_metrics(path), first)]
        """Of the steps so far."""
        if self._is_first:
            truncate_metrics(path, first)
        self._left, self._began, self._done = sum(self.tokens[first:]), time.perf_counter(), 0
        self._stack = contextlib.ExitStack()
        self._file: IO[str] | None = None
        self._tracker = Tracker()
        self._bar: Progress | None = None
        if self._is_first:
            name, config = f"{job.task.out.parent.name}-{job.task.identity.fingerprint[:8]}", job.task.config
            self._file = self._stack.enter_context(path.open("a", encoding="utf-8"))
            self._tracker = self._stack.enter_context(
                open_tracker(config.tracker, name, job.task.out, config.model_dump(mode="json"))
            )
            total, done = sum(self.tokens), sum(self.tokens[:first])
            label = f"{job.task.out.parent.name}: train"
            self._bar = self._stack.enter_context(progress(label, total, "tokens", done=done))

    def __enter__(self) -> Log:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close all of them."""
        self._stack.close()

    def write(self, step: int, figures: dict[str, float], memory_bytes: int, seconds: float) -> None:
        """Tell of a step, counted from 0."""
        self.losses.append(figures["loss"])
        tokens, peak = self.tokens[step], self._job.peak_flops
        work = None
        if peak and self._job.cost is not None:
            work = float(self._job.cost.row_flops[self._job.schedule.rows_of(step)].sum())
        self._done += tokens
        self._left -= tokens
        line = {
            "step": step + 1,
            **{name: value if math.isfinite(value) else None for name, value in figures.items()},
            "tokens": tokens,
            "seconds": round(seconds, 6),
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": round(work / seconds / peak, 4) if peak and work else None,
            "memory_bytes": memory_bytes,
            "seconds_left": round(self._left * (time.perf_counter() - self._began) / self._done, 1),
        }
        if self._file is None or self._bar is None:
            return
        with disk_errors(self._job.task.out):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._tracker.log(step + 1, {k: float(v) for k, v in line.items() if v is not None and k != "step"})
        utilisation = f", MFU {line['mfu']:.0%}" if line["mfu"] is not None else ""
        self._bar.advance(tokens, f"loss {figures['loss']:.3f}, {memory_bytes / 1e9:.1f} GB{utilisation}")

    def sync(self) -> None:
        """Make the lines so far survive a power cut."""
        if self._file is not None:
            sync_open_file(self._file)


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
