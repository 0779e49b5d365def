"""What the loop of training works with: the model in its processes, the forward pass, what is told of each step.

Input: checked rows and a model folder. Invariants: only the first process writes; a loss that is no number, or that
jumps, is found before it reaches the weights.
"""

from __future__ import annotations

import dataclasses
import math
import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_lite.config.models import result_options
from dasd_lite.config.train import Full, TrainConfig
from dasd_lite.console import err
from dasd_lite.costs import flops, hardware, memory
from dasd_lite.costs.fit import smallest_change
from dasd_lite.costs.hardware import has_liger
from dasd_lite.costs.shape import ModelShape, read_shape
from dasd_lite.data.records import Prompt
from dasd_lite.data.seeds import derive_seed
from dasd_lite.errors import ConfigError, MissingExtraError, TrainError
from dasd_lite.model import load as student
from dasd_lite.model.logprobs import target_terms
from dasd_lite.model.row import Row
from dasd_lite.training import trainable
from dasd_lite.training.objectives import CheckedObjective, Targets
from dasd_lite.training.ranks import Ranks, full_tensor, shard
from dasd_lite.training.rows import Rows
from dasd_lite.training.schedule import Schedule

try:
    import torch
except ImportError as error:
    raise MissingExtraError("train", "torch") from error


@dataclass(frozen=True)
class Estimate:
    """What training should take."""

    shape: ModelShape
    machine: hardware.Hardware
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

    def forward(self, objective: CheckedObjective, row: Row, num_targets: int) -> tuple[Any, dict[str, Any]]:
        """Return the loss of a micro-batch in a step of `num_targets` target tokens, and sums to report."""
        targets = Targets.of(row, num_targets, self.ranks.device)
        offload = self.schedule.config.offload_activations
        with self.autocast():
            per_token = target_terms(
                self.model, row.ids, targets.positions, row.doc_lengths, objective.terms(targets), offload=offload
            )
            return objective.loss(per_token, targets)

    def clip(self, trained: list[Any]) -> float:
        """Clip the gradients; return their norm before."""
        norm = torch.nn.utils.clip_grad_norm_(trained, self.schedule.config.max_grad_norm)
        return float(full_tensor(norm))

    def forget_peak(self) -> None:
        """Count a GPU's peak from here on: what came before, or in between, is not training."""
        if torch.device(self.ranks.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()

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
    ranks = dataclasses.replace(ranks, device=str(device))
    to_shard = ranks.size > 1 and isinstance(config.method, Full)
    turns = math.ceil(schedule.rows_per_step / config.micro_batch_size)
    if ranks.is_first and turns < ranks.size:
        err().print(
            f"note: {ranks.size} processes, but {turns} micro-batch{'es' * (turns > 1)} a step, so that some wait;"
            " raise train.grad_accum_steps",
            soft_wrap=True,
        )
    estimate = _estimate(model, rows, schedule, ranks, dtype)
    if estimate is not None:
        twice = estimate.checkpointing
    elif config.gradient_checkpointing != "auto":
        twice = config.gradient_checkpointing == "on"
    else:
        twice = int(rows.num_tokens.max()) * config.micro_batch_size > memory.AUTO_CHECKPOINTING
    torch.manual_seed(derive_seed(schedule.seed, "train"))  # of a new adapter
    trained = trainable.load_trainable(
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
        trained = shard(trained, dtype, ranks)
    peak = hardware.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Job(
        *(trained, rows, schedule, out, fingerprint, ranks, dtype, to_shard, model),
        estimate=estimate,
        peak_flops=peak and peak * ranks.size,
    )


def _estimate(model: Path, rows: Rows, schedule: Schedule, ranks: Ranks, dtype: Any) -> Estimate | None:
    config, device = schedule.config, torch.device(ranks.device)
    try:
        shape = read_shape(model)
    except ConfigError:
        return None
    documents = zip(np.split(rows.doc_lengths, rows.doc_offsets[1:-1]), rows.facts.num_targets.tolist(), strict=True)
    work = np.array([flops.training_flops(shape, part.tolist(), config.method, targets) for part, targets in documents])
    on_gpu = device.type == "cuda"
    machine = hardware.Hardware(
        element_bytes=dtype.itemsize,
        varlen=on_gpu and torch.cuda.get_device_capability(device) >= (8, 0),
        liger=on_gpu and has_liger(),
        on_gpu=on_gpu,
    )
    longest = int(rows.num_tokens.max())
    found = memory.predict(shape, config, seq_len=longest, num_processes=ranks.size, machine=machine)
    step = memory.TrainingStep(shape, config, longest * config.micro_batch_size, ranks.size, machine)
    # torch does not count CUDA's own, nor what lies fallow between tensors.
    return Estimate(shape, machine, work, found.total - found.overhead, step.checkpointed)


def out_of_memory(job: Job | None, config: TrainConfig) -> TrainError:
    """Say what there is, what was predicted, and the smallest change that needs less."""
    name, total = _card()
    message = f"{name}: its {total / 1e9:.1f} GB are full"
    if job is None or (estimate := job.estimate) is None:
        return TrainError(f"{message}; try train.method qlora, train.offload_activations = true or shorter rows")
    change = smallest_change(
        estimate.shape,
        config,
        seq_len=int(job.rows.num_tokens.max()),
        card_bytes=0.98 * min(total, estimate.predicted_bytes),
        num_processes=job.ranks.size,
        machine=estimate.machine,
    )
    message += f", {estimate.predicted_bytes / 1e9:.1f} GB were predicted"
    if change is None:
        return TrainError(f"{message}; no smaller training of this model is known")
    same_length = change.seq_len == int(job.rows.num_tokens.max())
    goes_on = result_options(change.config) == result_options(config) and same_length
    then = "it goes on from the last checkpoint" if goes_on else "it trains afresh, with --force"
    return TrainError(f"{message}; try {change}: {then}")


def _card() -> tuple[str, float]:
    return torch.cuda.get_device_name(), float(
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    )


# --- a step ---------------------------------------------------------------------------------------------
