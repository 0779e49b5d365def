"""What training reports while it runs: metrics.jsonl, the progress bar, the tracker.

Input: the figures of each step. Invariants: only the first process writes; after a restart, metrics.jsonl has the steps
that the checkpoint has.
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

from dasd_lite.console import Progress, label, progress
from dasd_lite.costs.estimate import format_bytes
from dasd_lite.data.files import disk_errors, sync_open_file
from dasd_lite.data.metrics import read_metrics, truncate_metrics
from dasd_lite.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from dasd_lite.training.job import Job


class Log:
    """metrics.jsonl, the progress bar and the tracker; in other processes than the first it does nothing."""

    def __init__(self, job: Job, first: int) -> None:
        """Continue after `first` steps; lines of later steps, which an earlier run lost, are cut off."""
        self._job, self._is_first = job, job.ranks.is_first
        schedule, path = job.schedule, job.task.out / "metrics.jsonl"
        self._step_tokens = [
            int(job.rows.num_tokens[schedule.rows_of(step)].sum()) for step in range(schedule.num_steps)
        ]
        self.losses = [float(line["loss"]) for line in islice(read_metrics(path), first)]
        """Of the steps so far, for comparison with the next one."""
        if self._is_first:
            truncate_metrics(path, first)
        self._left, self._began, self._done = sum(self._step_tokens[first:]), time.perf_counter(), 0
        self._stack = contextlib.ExitStack()
        self._file: IO[str] | None = None
        self._tracker = Tracker()
        self._bar: Progress | None = None
        if self._is_first:
            phase, config = job.task.out.parent.name, job.task.config
            name = f"{phase or job.task.out.name}-{job.task.identity.fingerprint[:8]}"
            self._file = self._stack.enter_context(path.open("a", encoding="utf-8"))
            self._tracker = self._stack.enter_context(
                open_tracker(config.tracker, name, job.task.out, config.model_dump(mode="json"))
            )
            total, done = sum(self._step_tokens), sum(self._step_tokens[:first])
            self._bar = self._stack.enter_context(progress(label(phase, "train"), total, "tokens", done=done))

    def __enter__(self) -> Log:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close file, tracker and bar."""
        self._stack.close()

    def write(self, step: int, figures: dict[str, float], memory_bytes: int, seconds: float) -> None:
        """Report a step, counted from 0."""
        self.losses.append(figures["loss"])
        tokens, peak = self._step_tokens[step], self._job.peak_flops
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
        mfu = f", MFU {line['mfu']:.0%}" if line["mfu"] is not None else ""
        self._bar.advance(tokens, f"loss {figures['loss']:.3f}, {format_bytes(memory_bytes)}{mfu}")

    def sync(self) -> None:
        """Make the lines so far survive a power cut."""
        if self._file is not None:
            sync_open_file(self._file)


# --- trackers ---------------------------------------------------------------------------------------

PROJECT = "dasd-lite"


class Tracker:
    """Receives the metrics of each step; this one ignores them."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step, counted from 1; steps only increase."""

    def close(self) -> None:
        """Wait until everything is sent."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close even after an error: the last metrics of a failed run are the interesting ones."""
        self.close()


def open_tracker(
    kind: Literal["none", "trackio", "wandb", "tensorboard"], name: str, folder: Path, config: dict[str, Any]
) -> Tracker:
    """Start a run in a tracker.

    Training that resumes starts another run in trackio and wandb, in the same group.

    Args:
        kind: Which tracker.
        name: Of the run and its group.
        folder: Where its files go, if the package lets us choose.
        config: Options to show with the run.

    Raises:
        ConfigError: The package is not installed, or wandb has no account to log in to.
    """
    if kind == "none":
        return Tracker()
    if kind == "tensorboard":
        return _TensorBoard(_imported("torch.utils.tensorboard", kind), folder / "tensorboard", config)
    package = _imported(kind, kind)
    # Standard output is for results, and trackio prints to it.
    with contextlib.redirect_stdout(sys.stderr):
        if kind == "trackio":
            package.init(project=PROJECT, name=name, group=name, config=config)
            return _Run(package)
        # Its console would capture the terminal, disturb the progress bar and upload what is printed.
        settings = package.Settings(console="off")
        try:
            package.init(project=PROJECT, name=name, group=name, config=config, dir=folder, settings=settings)
        except package.Error as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ConfigError(
                f"train.tracker = 'wandb': {reason}; or set WANDB_MODE=offline to keep everything on this machine"
            ) from error
        return _Run(package)


def _imported(module: str, package: str) -> ModuleType:
    """Import a module of a package that may be missing."""
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"train.tracker = {package!r}: {error}; run: pip install {package}") from error
    # The folder ./wandb of earlier runs imports as an empty package if the real one is not installed.
    if imported.__file__ is None:
        raise ConfigError(f"train.tracker = {package!r}: {package} is not installed; run: pip install {package}")
    return imported


class _Run(Tracker):
    """The current run of trackio or wandb, which have the same functions."""

    def __init__(self, package: ModuleType) -> None:
        self._package = package

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._package.log(metrics, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._package.finish()


class _TensorBoard(Tracker):
    """TensorBoard event file, opened at the first step because `purge_step` is the step training resumes from."""

    def __init__(self, module: ModuleType, folder: Path, config: dict[str, Any]) -> None:
        self._module, self._folder, self._config = module, folder, config
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is None:
            # Hides what an earlier run wrote about the steps after the checkpoint.
            self._writer = self._module.SummaryWriter(str(self._folder), purge_step=step)
            text = json.dumps(self._config, indent=2, default=str)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # otherwise a kill -9 loses up to two minutes

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
