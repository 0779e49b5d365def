"""One training run, ready for its first step: the task, and everything that was loaded for it.

Input: a TrainTask and the processes that share it. Output: a `Job`. Invariant: whatever can be checked before the first
step is checked here, before `task.out` is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import resource
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dasd_lite.config.models import result_options
from dasd_lite.config.train import Full, TrainConfig
from dasd_lite.console import note
from dasd_lite.costs import flops, memory
from dasd_lite.costs.estimate import format_bytes
from dasd_lite.costs.fit import OptionChange, smallest_change
from dasd_lite.costs.hardware import Hardware, has_liger, peak_flops
from dasd_lite.costs.shape import ModelShape, read_shape
from dasd_lite.data.seeds import derive_seed
from dasd_lite.errors import ConfigError, MissingExtraError, TrainError
from dasd_lite.grading import CheckedGrader
from dasd_lite.model.architecture import read_architecture
from dasd_lite.model.attention import Documents
from dasd_lite.model.kernels import HeadSizes, pick_kernel
from dasd_lite.model.load import model_spec, pick_device, pick_dtype
from dasd_lite.model.logprobs import target_terms
from dasd_lite.model.packed_check import check_packing, comparison_row, documents_of
from dasd_lite.model.row import Row
from dasd_lite.training import trainable
from dasd_lite.training.batches import MicroBatch, Share
from dasd_lite.training.checks import answer_end_ids, check_tokenizer
from dasd_lite.training.objectives import CheckedObjective, open_objective
from dasd_lite.training.objectives.objective import Targets
from dasd_lite.training.ranks import Ranks, full_tensor, gathered, mesh_of, shard
from dasd_lite.training.requirements import model_conflicts
from dasd_lite.training.rows import MappedRows, copy_rows
from dasd_lite.training.schedule import Schedule
from dasd_lite.training.task import TrainTask

try:
    import torch
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

if TYPE_CHECKING:
    from dasd_lite.model.logprobs import LanguageModel
    from dasd_lite.training.objectives.objective import Metrics

_SHARED = 1e9  # bytes of a GPU that CUDA's context and a display take; more is held by other processes
_USED = 0.9  # of a GPU's free memory that a prediction may fill
_UNCERTAINTY = 0.05  # of the prediction without overhead, which is within 3 % of what is traced
_LONG = 16384  # tokens of a forward pass from which on attention is what takes the time
_COMPARISON_TOKENS = 128  # of each document on which the exported model is compared with the trained one


@dataclass(frozen=True)
class Recomputing:
    """What is computed again in the backward pass; see recompute.py."""

    layers: bool
    layers_kept: int = 0
    keep_attention: bool = False


@dataclass(frozen=True)
class ExpectedCost:
    """What training should take.

    Attributes:
        shape: Of the model.
        hardware: That it was computed for.
        row_flops: Work of each row; float64 [num_rows].
        memory_bytes: Peak of the GPU's memory as torch counts it.
        recomputing: What is computed again in the backward pass.
    """

    shape: ModelShape
    hardware: Hardware
    row_flops: npt.NDArray[np.float64]
    memory_bytes: float
    recomputing: Recomputing


@dataclass
class Job:
    """A task and what was loaded for it, in one of its processes.

    Attributes:
        task: What was asked for.
        ranks: The processes, and the device of this one.
        objective: What is minimized.
        grader: Of the answers during training; None: the one that the task names.
        rows: All of the data.
        schedule: Which rows each step reads, and at which learning rate.
        model: In train mode, with an adapter if there is one.
        dtype: Format that the model computes in.
        is_sharded: Whether FSDP shards the weights over the processes; it casts them too.
        cost: None for an architecture whose costs are not known.
        peak_flops: Of all devices together, per second; None where it is not known.
        comparison_row: Beginnings of a few documents, to compare the exported model with the trained one.
        end_ids: Tokens that end the answers.
        is_monitored: Whether the model answers the task's questions during training.
        patches: What Liger needs in transformers' modules during training.
    """

    task: TrainTask
    ranks: Ranks
    objective: CheckedObjective
    grader: CheckedGrader | None
    rows: MappedRows
    schedule: Schedule
    model: LanguageModel
    dtype: torch.dtype
    is_sharded: bool
    cost: ExpectedCost | None
    peak_flops: float | None
    comparison_row: Row
    end_ids: frozenset[int]
    is_monitored: bool
    patches: trainable.GlobalPatches = field(default_factory=trainable.GlobalPatches)

    def autocast(self) -> torch.autocast:
        """Return the context in which the model computes in `dtype`."""
        enabled = self.dtype != torch.float32 and not self.is_sharded
        return torch.autocast(torch.device(self.ranks.device).type, self.dtype, enabled=enabled)

    def share(self, step: int) -> Share:
        """Return what this process computes in a step.

        All processes gather sharded weights together, so one that has run out of rows repeats another's, for nothing.
        """
        all_rows = self.schedule.rows_of(step)
        micro_batches = []
        for rows in self.schedule.share(step, self.ranks.rank, self.ranks.size):
            if rows:
                micro_batches.append((tuple(rows), True))
            elif self.is_sharded:
                micro_batches.append(((all_rows[-1],), False))
        return Share(int(self.rows.stats.num_targets[all_rows].sum()), tuple(micro_batches))

    def read(self, rows: tuple[int, ...], num_targets: int, counts: bool = True) -> MicroBatch:
        """Read the rows of a micro-batch in a step of `num_targets` target tokens."""
        return self.prepare(Row.join([self.rows[i] for i in rows]), num_targets, counts)

    def prepare(self, row: Row, num_targets: int, counts: bool = True) -> MicroBatch:
        """Make a row ready for the model and the objective."""
        device = self.ranks.device
        targets = Targets.of(row, num_targets, device)
        return MicroBatch(row, Documents.of(row.doc_lengths, device), targets, counts)

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        """Return the loss of a micro-batch, and sums to report."""
        row, targets = batch.row, batch.targets
        terms, offload = self.objective.terms(targets), self.task.config.offload_activations
        weights = self.objective.token_weights(targets) if self.task.config.one_pass_loss else None
        with self.autocast():
            per_token = target_terms(
                self.model,
                row.ids,
                targets.positions,
                row.doc_lengths,
                terms,
                offload=offload,
                weights=weights,
                documents=batch.documents,
            )
            return self.objective.loss(per_token, targets)

    def generating(self) -> contextlib.AbstractContextManager[None] | None:
        """Return the context in which the model answers token by token; None if that would take too long.

        Sharded weights would be gathered for every token: 36 s for 1,024 tokens of a 4B model over NVLink, 13 minutes
        without a direct link between the GPUs. So they stay whole meanwhile, if every GPU has room.
        """
        if not self.is_sharded:
            return contextlib.nullcontext()
        device, has_room, is_linked = torch.device(self.ranks.device), True, True
        if device.type == "cuda":
            needed = sum(p.numel() for p in self.model.parameters()) * self.dtype.itemsize
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            has_room = needed < _USED * (torch.cuda.mem_get_info(device)[0] + unused)
            others = set(range(torch.cuda.device_count())) - {self.ranks.local}
            is_linked = all(torch.cuda.can_device_access_peer(self.ranks.local, other) for other in others)
        if all(self.ranks.gather(has_room)):
            return gathered(self.model)
        return contextlib.nullcontext() if all(self.ranks.gather(is_linked)) else None

    def clip(self, trained: list[torch.nn.Parameter]) -> float:
        """Clip the gradients; return their norm before."""
        norm = torch.nn.utils.clip_grad_norm_(trained, self.task.config.max_grad_norm)
        return float(full_tensor(norm))

    def forget_peak(self) -> None:
        """Measure a GPU's peak from here on: what came before, or in between, is not training."""
        if torch.device(self.ranks.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def memory_bytes(self) -> int:
        """Return the peak so far: of the GPU's memory as torch counts it, or of this process on a CPU."""
        if torch.device(self.ranks.device).type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def load_job(
    task: TrainTask,
    ranks: Ranks,
    objective: CheckedObjective | None = None,
    grader: CheckedGrader | None = None,
) -> Job:
    """Check rows and model against each other, and load the model; all processes have to call it.

    Args:
        task: What to train.
        ranks: The processes.
        objective: The one that the task names, where it was handed over as an object.
        grader: Likewise.

    Raises:
        TrainError: The rows cannot be trained on, or packed documents leak into each other.
        ConfigError: There is no such model, or an option does not fit it.
    """
    config = task.config
    objective = objective or open_objective(config.objective)
    for fault in model_conflicts(task.model, [config.method]):
        raise TrainError(fault)
    spec = model_spec(task.model, trust_remote_code=task.trust_remote_code)
    vocab_size = check_tokenizer(task.rows, task.model, spec.vocab_size)
    rows = _open_rows(task, objective, ranks, vocab_size, spec.max_positions)
    end_ids = answer_end_ids(task.model, rows)
    token_and_pair = (6.0 * spec.hidden_size, 1.0)  # their costs; a pair is two tokens in attention
    schedule = Schedule(rows.doc_lengths, rows.doc_offsets, config, task.seed, token_and_pair, task.max_steps)

    device = pick_device(ranks.device)
    ranks = dataclasses.replace(ranks, device=str(device))
    dtype = pick_dtype(config.dtype, device)
    _note_short_steps(schedule, ranks)
    cost = _expected_cost(task, rows, ranks, dtype)
    if cost is not None and config.must_fit:
        _check_room(cost, config, rows, ranks)
    recomputing = cost.recomputing if cost is not None else _unknown_recomputing(config, rows)
    is_sharded = ranks.size > 1 and isinstance(config.method, Full)
    torch.manual_seed(derive_seed(task.seed, "train"))  # for a new adapter
    patches = trainable.GlobalPatches()
    load = partial(
        trainable.load_trainable,
        task.model,
        config.method,
        dtype=config.dtype,
        device=str(device),
        gradient_checkpointing=recomputing.layers,
        layers_kept=recomputing.layers_kept,
        keep_attention=recomputing.keep_attention,
        liger=config.liger,
        adapter=task.adapter,
        to_shard=is_sharded,
        patches=patches,
        trust_remote_code=task.trust_remote_code,
        context=task.context,
    )
    if is_sharded:  # each process reads the whole model, and keeps its part
        mesh = mesh_of(ranks)
        model: LanguageModel = ranks.in_turn(lambda: shard(load(), dtype, mesh))
    else:
        model = load()
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    documents = documents_of([rows[i] for i in _examined_rows(rows)])
    job = Job(
        task=task,
        ranks=ranks,
        objective=objective,
        grader=grader,
        rows=rows,
        schedule=schedule,
        model=model,
        dtype=dtype,
        is_sharded=is_sharded,
        cost=cost,
        peak_flops=peak and peak * ranks.size,
        comparison_row=comparison_row(documents, _COMPARISON_TOKENS),
        end_ids=end_ids,
        is_monitored=bool(task.questions),
        patches=patches,
    )
    with job.autocast(), patches.active():
        check_packing(model, documents, dtype)
    return job


def _examined_rows(rows: MappedRows) -> list[int]:
    """Return the first rows, each of which may be one long document, and the one with the longest of all."""
    longest = int(np.searchsorted(rows.doc_offsets, int(rows.doc_lengths.argmax()), side="right")) - 1
    return sorted({*range(min(4, len(rows))), longest})


def _open_rows(
    task: TrainTask, objective: CheckedObjective, ranks: Ranks, vocab_size: int, max_positions: int | None
) -> MappedRows:
    """Copy the rows once per machine to a file beside `task.out`, which is not there yet, and map it in every process.

    The file loses its name as soon as all have opened it, and its space when they end.
    """
    mapped = task.out.with_name(f".{task.out.name}.rows-{platform.node()}")
    try:
        stats = None
        if ranks.local == 0:
            stats = copy_rows(
                task.rows,
                mapped,
                vocab_size=vocab_size,
                max_positions=max_positions,
                needs=objective.needs,
                groups=objective.groups,
            )
        rows = MappedRows(mapped, next(each for each in ranks.gather(stats) if each is not None))
        ranks.gather(None)
        return rows
    finally:
        if ranks.local == 0:
            mapped.unlink(missing_ok=True)


def _note_short_steps(schedule: Schedule, ranks: Ranks) -> None:
    wanted = schedule.config.micro_batch_size * schedule.config.grad_accum_steps
    if schedule.num_rows < wanted:
        rows = f"{schedule.num_rows} row" + ("s" if schedule.num_rows > 1 else "")
        note(
            f"there are only {rows}, fewer than the {wanted} of an optimizer step (train.micro_batch_size ×"
            " train.grad_accum_steps), so each step reads all of them"
        )
    num_micro_batches = math.ceil(schedule.rows_per_step / schedule.config.micro_batch_size)
    if num_micro_batches < ranks.size:
        each = f"{num_micro_batches} micro-batch{'es' if num_micro_batches > 1 else ''}"
        note(f"{ranks.size} processes, but only {each} per step, so some wait; raise train.grad_accum_steps")


# --- memory -----------------------------------------------------------------------------------------


def _expected_cost(task: TrainTask, rows: MappedRows, ranks: Ranks, dtype: torch.dtype) -> ExpectedCost | None:
    config, device = task.config, torch.device(ranks.device)
    try:
        shape = read_shape(task.model)
    except ConfigError:
        return None
    documents = zip(np.split(rows.doc_lengths, rows.doc_offsets[1:-1]), rows.stats.num_targets.tolist(), strict=True)
    work = np.array([flops.training_flops(shape, part.tolist(), config.method, targets) for part, targets in documents])
    on_gpu = device.type == "cuda"
    heads = HeadSizes(shape.num_heads, shape.num_kv_heads, *[shape.head_dim] * 3)
    free, size = torch.cuda.mem_get_info(device) if on_gpu else (0, 0)
    # All processes do the same: the least free one says what.
    free = min(ranks.gather(free))
    hardware = Hardware(
        element_bytes=dtype.itemsize,
        is_float16=dtype == torch.float16,
        varlen=pick_kernel(device, dtype, heads) is not None,
        liger=on_gpu and has_liger(read_architecture(task.model, trust_remote_code=task.trust_remote_code).kind),
        on_gpu=on_gpu,
        memory=size if on_gpu else None,
        free=free if on_gpu else None,
    )
    longest = int(rows.num_tokens.max()) * config.micro_batch_size
    step = memory.TrainingStep(shape, config, longest, ranks.size, hardware)
    recomputing = _recomputing(step, free)
    step = dataclasses.replace(step, layers_kept=recomputing.layers_kept, keeps_attention=recomputing.keep_attention)
    prediction = memory.predict_step(step)
    # torch's peak excludes the CUDA context and fragmentation, so compare without the overhead.
    return ExpectedCost(shape, hardware, work, prediction.total - prediction.overhead, recomputing)


def _check_room(cost: ExpectedCost, config: TrainConfig, rows: MappedRows, ranks: Ranks) -> None:
    """Refuse what surely does not fit the GPU, before the model is loaded.

    Raises:
        TrainError: The prediction is over the GPU's free memory by more than it may be wrong.
    """
    free = cost.hardware.free
    if free is None or cost.memory_bytes <= (1 + _UNCERTAINTY) * free:
        return
    change = _smaller(cost, config, rows, ranks, free)
    remedy = f"smallest change that fits: {change}" if change else "no option makes it fit; use a smaller student"
    raise TrainError(
        f"training needs about {format_bytes(cost.memory_bytes)}, but {_described_gpu()}; {remedy}; the prediction may"
        " be wrong, and train.must_fit=false tries it anyway"
    )


def _smaller(
    cost: ExpectedCost, config: TrainConfig, rows: MappedRows, ranks: Ranks, gpu_bytes: float
) -> OptionChange | None:
    """Return the smallest change with which the longest row fits into `gpu_bytes`."""
    longest = int(rows.num_tokens.max())
    return smallest_change(
        cost.shape, config, seq_len=longest, gpu_bytes=gpu_bytes, num_processes=ranks.size, hardware=cost.hardware
    )


def _recomputing(step: memory.TrainingStep, free: float) -> Recomputing:
    """Choose what is computed again, so that training takes most of `free` bytes of the GPU; 0 on a CPU."""
    config = step.config
    if not step.checkpointing:
        return Recomputing(layers=False)
    room = 0.0 if config.offload_activations else _USED * free
    keep_attention = config.keep_attention == "on"
    if config.keep_attention == "auto" and step.tokens >= _LONG:
        keep_attention = memory.predict_step(dataclasses.replace(step, keeps_attention=True)).total <= room
    step = dataclasses.replace(step, keeps_attention=keep_attention)
    layers_kept = memory.most_layers_kept(step, room) if config.keep_layers == "auto" else config.keep_layers
    return Recomputing(True, layers_kept, keep_attention)


def _unknown_recomputing(config: TrainConfig, rows: MappedRows) -> Recomputing:
    """Choose likewise for an architecture whose memory cannot be predicted: nothing is kept unless it is asked for."""
    long = int(rows.num_tokens.max()) * config.micro_batch_size > memory.AUTO_CHECKPOINTING
    layers = long if config.gradient_checkpointing == "auto" else config.gradient_checkpointing == "on"
    kept = 0 if config.keep_layers == "auto" else config.keep_layers
    return Recomputing(layers, kept, config.keep_attention == "on")


def out_of_memory(job: Job | None, config: TrainConfig) -> TrainError:
    """Return the error of a full GPU: what it has, what was predicted, and the smallest change that needs less.

    `job` is None when even the model did not fit.
    """
    if (gpu := _gpu()) is None:
        return TrainError("out of host memory; try train.micro_batch_size = 1, train.method qlora or shorter rows")
    _, _, free = gpu
    message = f"out of GPU memory: {_described_gpu()}"
    if job is None or job.cost is None:
        return TrainError(f"{message}; try train.method qlora, train.offload_activations = true or shorter rows")
    longest = int(job.rows.num_tokens.max())
    change = _smaller(job.cost, config, job.rows, job.ranks, 0.98 * min(free, job.cost.memory_bytes))
    message += f"; the prediction was {format_bytes(job.cost.memory_bytes)}"
    if job.cost.recomputing.layers_kept and config.keep_layers == "auto":
        return TrainError(f"{message}; try train.keep_layers=0: training resumes from the last checkpoint")
    if change is None:
        return TrainError(f"{message}; no option makes the training of this model smaller")
    resumes = result_options(change.config) == result_options(config) and change.seq_len == longest
    effect = "training resumes from the last checkpoint" if resumes else "training starts over, with --force"
    return TrainError(f"{message}; try {change}: {effect}")


def _described_gpu() -> str:
    """Say what this process's GPU is, what it has, and what of that other processes hold."""
    name, total, free = _gpu() or ("the GPU", 0.0, 0.0)
    text = f"{name} has {format_bytes(total)}"
    return text + (f", of which other processes hold {format_bytes(total - free)}" if free < total - _SHARED else "")


def _gpu() -> tuple[str, float, float] | None:
    """Return the name of this process's GPU, its memory, and what of it other processes leave, in bytes."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.get_device_name(), float(total), float(free + torch.cuda.memory_reserved())
