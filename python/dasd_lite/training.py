"""What the loop of training works with: the model in its processes, the forward pass, what is told of each step.

Input: checked rows and a model folder. Invariants: only the first process writes; a loss that is no number, or that
jumps, is found before it reaches the weights.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dasd_lite import checkpoint, distributed, flops, memory, student
from dasd_lite.config import Full, TrainConfig, semantic
from dasd_lite.console import Progress, progress
from dasd_lite.dataset import disk_errors
from dasd_lite.distributed import Ranks
from dasd_lite.errors import ConfigError, MissingExtraError, TrainError
from dasd_lite.fit import has_liger, smallest_change
from dasd_lite.logprobs import target_terms
from dasd_lite.objectives import Objective, Targets
from dasd_lite.records import Prompt, derive_seed
from dasd_lite.rows import Row, Rows
from dasd_lite.schedule import Schedule
from dasd_lite.trackers import Tracker, open_tracker

try:
    import torch
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

_HISTORY = 32  # steps whose median a loss is held against
_LEAST_HISTORY = 8


@dataclass(frozen=True)
class Estimate:
    """What training should take."""

    shape: flops.ModelShape
    machine: memory.Machine
    row_flops: npt.NDArray[np.float64]
    """Work of each row."""
    predicted_bytes: float
    """What memory_bytes should come to at the most."""
    checkpointing: bool
    """Whether layers are to be computed again."""


@dataclass
class Job:
    """A model and all that its training needs."""

    model: Any
    rows: Rows
    schedule: Schedule
    out: Path
    fingerprint: str
    ranks: Ranks
    dtype: Any
    """Of the computation."""
    is_sharded: bool
    """Weights are spread over the processes by FSDP2, which casts them as well."""
    source: Path
    """Where the tokenizer is."""
    estimate: Estimate | None
    """None for an architecture that is not understood."""
    peak_flops: float | None
    """Of all devices, per second; None where it is not known."""
    questions: list[Prompt] = field(default_factory=list)
    watch_tokens: int = 0

    def autocast(self) -> Any:
        """Return the context in which the model computes in `dtype`."""
        enabled = self.dtype != torch.float32 and not self.is_sharded
        return torch.autocast(torch.device(self.ranks.device).type, self.dtype, enabled=enabled)

    def read(self, step: int) -> list[tuple[Row, bool]]:
        """Read this process's micro-batches of a step, and whether each counts.

        Spread weights are brought together by all processes at once, so one that has run out of rows does another's
        work along with it, for nothing.
        """
        ranks, rows = self.ranks, self.rows
        found = []
        for micro in self.schedule.share(step, ranks.rank, ranks.size):
            if micro:
                found.append((Row.join([rows[i] for i in micro]), True))
            elif self.is_sharded:
                found.append((rows[self.schedule.rows_of(step)[-1]], False))
        return found

    def forward(self, objective: Objective, row: Row, num_targets: int) -> tuple[Any, dict[str, Any]]:
        """Return the loss of a micro-batch in a step of `num_targets` target tokens, and sums to report."""
        targets = Targets.of(row, num_targets, self.ranks.device)
        offload = self.schedule.config.offload_activations
        with self.autocast():
            terms = target_terms(
                self.model, row.ids, targets.positions, row.doc_lengths, objective.terms, offload=offload
            )
            return objective.loss(terms, targets)

    def clip(self, trained: list[Any]) -> float:
        """Clip the gradients; return their norm before."""
        norm = torch.nn.utils.clip_grad_norm_(trained, self.schedule.config.max_grad_norm)
        return float(distributed.whole(norm))

    def memory_bytes(self) -> int:
        """Return the peak so far: of the GPU's memory as torch counts it, or of this process's on a CPU."""
        if torch.device(self.ranks.device).type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def build(
    model: Path,
    rows: Rows,
    schedule: Schedule,
    out: Path,
    fingerprint: str,
    ranks: Ranks,
    *,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
) -> Job:
    """Load the model to train, spread over the processes where all of it is trained."""
    config = schedule.config
    device = student.pick_device(ranks.device)
    dtype = student.pick_dtype(config.dtype, device)
    ranks = Ranks(ranks.rank, ranks.size, str(device))
    to_shard = ranks.size > 1 and isinstance(config.method, Full)
    if to_shard and dtype == torch.float16:
        raise ConfigError(
            "train.dtype = 'float16' with method full on several GPUs: its loss cannot be scaled; use lora or qlora,"
            " or train.num_processes = 1"
        )
    estimate = _estimate(model, rows, schedule, ranks, dtype)
    if estimate is not None:
        twice = estimate.checkpointing
    elif (wanted := config.gradient_checkpointing) != "auto":
        twice = wanted
    else:
        twice = int(rows.num_tokens.max()) * config.micro_batch_size > memory.AUTO_CHECKPOINTING
    torch.manual_seed(derive_seed(schedule.seed, "train"))  # of a new adapter
    trained = student.load_trainable(
        model,
        config.method,
        dtype=config.dtype,
        device=str(device),
        gradient_checkpointing=twice,
        liger=config.liger,
        adapter=adapter,
        to_shard=to_shard,
        trust_remote_code=trust_remote_code,
    )
    if to_shard:
        trained = distributed.shard(trained, dtype, ranks)
    peak = flops.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Job(
        *(trained, rows, schedule, out, fingerprint, ranks, dtype, to_shard, model),
        estimate=estimate,
        peak_flops=peak and peak * ranks.size,
    )


def _estimate(model: Path, rows: Rows, schedule: Schedule, ranks: Ranks, dtype: Any) -> Estimate | None:
    config, device = schedule.config, torch.device(ranks.device)
    try:
        shape = flops.read_shape(model)
    except ConfigError:
        return None
    documents = np.split(rows.doc_lengths, rows.doc_offsets[1:-1])
    work = np.array([flops.training_flops(shape, lengths.tolist(), config.method) for lengths in documents])
    on_gpu = device.type == "cuda"
    machine = memory.Machine(
        element_bytes=dtype.itemsize,
        varlen=on_gpu and torch.cuda.get_device_capability(device) >= (8, 0),
        liger=on_gpu and has_liger(),
        on_gpu=on_gpu,
    )
    longest = int(rows.num_tokens.max())
    found = memory.predict(shape, config, seq_len=longest, num_processes=ranks.size, machine=machine)
    step = memory.Step(shape, config, longest * config.micro_batch_size, ranks.size, machine)
    # torch does not count CUDA's own, nor what lies fallow between tensors.
    return Estimate(shape, machine, work, found.total - found.overhead, step.checkpointed)


def out_of_memory(job: Job | None, config: TrainConfig) -> TrainError:
    """Say what there is, what was predicted, and the smallest change that needs less."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    message = f"{torch.cuda.get_device_name()}: its {total / 1e9:.1f} GB are full"
    if job is None or (estimate := job.estimate) is None:
        return TrainError(f"{message}; try train.method qlora, train.offload_activations = true or shorter rows")
    change = smallest_change(
        estimate.shape,
        config,
        seq_len=int(job.rows.num_tokens.max()),
        card_bytes=0.98 * min(float(total), estimate.predicted_bytes),
        num_processes=job.ranks.size,
        machine=estimate.machine,
    )
    message += f", {estimate.predicted_bytes / 1e9:.1f} GB were predicted"
    if change is None:
        return TrainError(f"{message}; no smaller training of this model is known")
    goes_on = semantic(change.config) == semantic(config) and change.seq_len == int(job.rows.num_tokens.max())
    then = "it goes on from the last checkpoint" if goes_on else "it trains afresh, with --force"
    return TrainError(f"{message}; try {change}: {then}")


# --- a step ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What one process tells the others at the end of a step."""

    sums: dict[str, float]
    """Of the objective's metrics."""
    worst: tuple[bool, float, tuple[str, ...]]
    """Its worst micro-batch: whether its loss is no number, its loss, the rollouts in it."""
    stop: bool
    memory_bytes: int

    @classmethod
    def of(cls, losses: list[Any], metrics: list[dict[str, Any]], rows: list[Row], stop: bool, memory: int) -> Told:
        """Put together what came of the micro-batches."""
        sums = _add_up([{name: float(value) for name, value in found.items()} for found in metrics])
        values = [float(loss) for loss in losses]
        worst = max(
            ((not math.isfinite(v), v if math.isfinite(v) else 0.0, r.uids) for v, r in zip(values, rows, strict=True)),
            default=(False, -math.inf, ()),
        )
        return cls(sums, worst, stop, memory)


def means(told: list[Told], num_targets: int) -> dict[str, float]:
    """Return the objective's metrics, over all target tokens of the step."""
    return {name: value / num_targets for name, value in _add_up([t.sums for t in told]).items()}


def _add_up(parts: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def fault(loss: float, grad_norm: float, history: list[float], max_jump: float) -> str | None:
    """Say what is wrong with a step whose gradients have not reached the weights yet; None when nothing is."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient is {grad_norm}, the loss {loss:.4g}"
    if len(history) >= _LEAST_HISTORY:
        usual = statistics.median(history[-_HISTORY:])
        if loss > usual + max_jump:
            return f"the loss is {loss:.4g}, {usual:.4g} in the steps before (train.max_loss_jump = {max_jump:g})"
    return None


def blame(told: list[Told]) -> str:
    """Name the rollouts of the worst micro-batch."""
    uids = max(t.worst for t in told)[2]
    more = f" and {len(uids) - 8} more" if len(uids) > 8 else ""
    return f"rollouts: {', '.join(uids[:8]) or 'unnamed'}{more}"


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Let the first Ctrl-C or SIGTERM set a flag instead of breaking off; the second one breaks off."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may take signals
        return
    numbers = distributed.stop_numbers()
    before = [signal.getsignal(number) for number in numbers]

    def ask(number: int, frame: object) -> None:
        asked.set()
        restore()

    def restore() -> None:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()


# --- what is told ---------------------------------------------------------------------------------------


class Log:
    """metrics.jsonl, the progress bar and the tracker; in other processes than the first it does nothing."""

    def __init__(self, job: Job, first: int) -> None:
        """Go on after `first` steps; lines of later ones are of a run that was stopped, and go."""
        self._job, self._is_first = job, job.ranks.is_first
        schedule, path = job.schedule, job.out / "metrics.jsonl"
        self.tokens = [int(job.rows.num_tokens[schedule.rows_of(step)].sum()) for step in range(schedule.num_steps)]
        if self._is_first:
            checkpoint.truncate_metrics(path, first)
        kept = path.read_text(encoding="utf-8").splitlines()[:first] if first else []
        self.losses = [float(json.loads(line)["loss"]) for line in kept]
        """Of the steps so far."""
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
            **figures,
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

    def sync(self) -> None:
        """Make the lines so far survive a power cut."""
        if self._file is not None:
            checkpoint.sync(self._file)
