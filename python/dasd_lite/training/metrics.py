"""What is told of training: metrics.jsonl, the progress bar, the tracker.

Input: the figures of each step. Invariant: only the first process writes; after a stop the lines are those of the steps
that the checkpoint knows.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from typing import IO

from dasd_lite.console import Progress, progress
from dasd_lite.data.dataset import disk_errors
from dasd_lite.errors import CheckpointError
from dasd_lite.training import checkpoint
from dasd_lite.training.job import Job
from dasd_lite.training.trackers import Tracker, open_tracker


class Log:
    """metrics.jsonl, the progress bar and the tracker; in other processes than the first it does nothing."""

    def __init__(self, job: Job, first: int) -> None:
        """Go on after `first` steps; lines of later ones are of a run that was stopped, and go."""
        self._job, self._is_first = job, job.ranks.is_first
        schedule, path = job.schedule, job.out / "metrics.jsonl"
        self.tokens = [int(job.rows.num_tokens[schedule.rows_of(step)].sum()) for step in range(schedule.num_steps)]
        try:
            kept = path.read_text(encoding="utf-8").splitlines()[:first] if first else []
            self.losses = [float(json.loads(line)["loss"]) for line in kept]
            """Of the steps so far."""
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); remove {job.out} to train afresh") from error
        if self._is_first:
            checkpoint.truncate_metrics(path, first)
        self._left, self._began, self._done = sum(self.tokens[first:]), time.perf_counter(), 0
        self._stack = contextlib.ExitStack()
        self._file: IO[str] | None = None
        self._tracker = Tracker()
        self._bar: Progress | None = None
        if self._is_first:
            name, config = f"{job.out.parent.name}-{job.fingerprint[:8]}", schedule.config
            self._file = self._stack.enter_context(path.open("a", encoding="utf-8"))
            self._tracker = self._stack.enter_context(
                open_tracker(config.tracker, name, job.out, config.model_dump(mode="json"))
            )
            total, done = sum(self.tokens), sum(self.tokens[:first])
            label = f"{job.out.parent.name}: train"
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
        if peak and self._job.estimate is not None:
            work = float(self._job.estimate.row_flops[self._job.schedule.rows_of(step)].sum())
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
        with disk_errors(self._job.out):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._tracker.log(step + 1, {k: float(v) for k, v in line.items() if v is not None and k != "step"})
        utilisation = f", MFU {line['mfu']:.0%}" if line["mfu"] is not None else ""
        self._bar.advance(tokens, f"loss {figures['loss']:.3f}, {memory_bytes / 1e9:.1f} GB{utilisation}")

    def keeps(self, step: int) -> str:
        """Say what is left after a fault: the checkpoint of `step`, or none."""
        if not step:
            return "there is no checkpoint yet"
        return f"the checkpoint of step {step} is kept, from which the same command goes on"

    def sync(self) -> None:
        """Make the lines so far survive a power cut."""
        if self._file is not None:
            checkpoint.sync(self._file)
