"""What a recipe will cost, in lines for `check`: answers, money, disk, memory, and hours; and what does not fit.

Input: the phases of a recipe, its models, and the GPU of this machine, if any. Invariant: nothing is loaded or run; all
figures are predictions, and say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dasd_lite.config.models import Endpoint
from dasd_lite.config.stages import Phase
from dasd_lite.config.train import Full
from dasd_lite.costs.evaluation import Load
from dasd_lite.costs.fit import OptionChange, sizes_that_fit, smallest_change
from dasd_lite.costs.flops import training_hours
from dasd_lite.costs.hardware import GPU_SIZES, Gpu, Hardware, assumed_mfu, has_liger, peak_flops, visible_gpu
from dasd_lite.costs.memory import Prediction, predict
from dasd_lite.costs.shape import ModelShape, read_shape
from dasd_lite.data.hub import model_folder
from dasd_lite.data.prompts import Prompts
from dasd_lite.data.usage import Usage
from dasd_lite.errors import DasdError

_BYTES_PER_TOKEN = 20  # on disk: id, log-probability, byte length and text, with a margin over what zstd makes of it
_CHARACTERS_PER_TOKEN = 4
_DISPLAY = 1e9  # bytes that a display and the driver take


# --- answers, money, disk -----------------------------------------------------------------------------


def answers_line(phase: Phase, num_prompts: int) -> str:
    """Say how many answers a phase samples, and how many tokens at most."""
    answers = num_prompts * phase.sample.num_samples
    return (
        f"{phase.name}: {answers:,} answers of {num_prompts:,} prompts at T={phase.sample.temperature},"
        f" at most {answers * phase.sample.max_tokens:,} tokens"
    )


def price_line(
    teacher: Endpoint, phases: Sequence[Phase], prompts: Prompts | None, evaluated: Sequence[Load] = ()
) -> str:
    """Say the most that sampling can cost at the teacher's prices, and where the budget stops it."""
    limits = [f"{name} = {value:g}" for name, value in teacher.budget.model_dump().items() if value is not None]
    stops = f"; the run stops at teacher.budget.{' or '.join(limits)}" if limits else ""
    if teacher.prices is None:
        hint = "" if limits else "; set teacher.prices to see the cost, and teacher.budget to limit it"
        return f"price: unknown{hint}{stops}"
    sampling = [phase.sample for phase in phases if phase.source == "sample"]
    num_prompts = len(prompts or ())
    written = sum(num_prompts * options.num_samples * options.max_tokens for options in sampling)
    characters = sum(len(message["content"]) for prompt in prompts or () for message in prompt.messages)
    read = characters / _CHARACTERS_PER_TOKEN * sum(options.num_samples for options in sampling)
    written += sum(load.tokens for load in evaluated)
    read += sum(load.characters for load in evaluated) / _CHARACTERS_PER_TOKEN
    cost, what = Usage(round(read), written).cost(teacher.prices), "sampling"
    what += " and the teacher's evaluation" if evaluated else ""
    return f"price: at most {cost:,.2f} for {what}, if every answer has the maximum length{stops}"


def disk_bytes(phases: Sequence[Phase], student: str, num_prompts: int) -> int:
    """Return the most that a run can write: every answer at its longest, and each phase's model."""
    tokens = sum(p.sample.num_samples * p.sample.max_tokens for p in phases if p.source == "sample")
    answers = tokens * num_prompts * _BYTES_PER_TOKEN
    return answers + sum(_model_bytes(phase, Path(student)) for phase in phases)


def _model_bytes(phase: Phase, student: Path) -> int:
    """Return the most that a model and two checkpoints take: weights and two moments in float32.

    The trial of the export before the first step takes a model's size too, but there is no checkpoint then.
    """
    weights = sum(file.stat().st_size for file in student.glob("*.safetensors")) if student.is_dir() else 0
    try:
        shape = read_shape(student)
    except DasdError:
        return 7 * weights
    method = phase.train.method
    trained = shape.num_parameters if isinstance(method, Full) else shape.adapter_parameters(method)
    adapter = 0 if isinstance(method, Full) else 4 * trained
    return weights + adapter + 2 * 12 * trained


# --- memory and hours of training ---------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """Phases whose training needs the same memory, and how much they need."""

    phases: list[Phase]
    shape: ModelShape
    gpu: Gpu | None
    model_type: str = ""

    @property
    def num_processes(self) -> int:
        """As many as are asked for, or one per visible GPU, or one."""
        return self.phases[0].train.num_processes or (self.gpu.number if self.gpu else 1)

    @property
    def hardware(self) -> Hardware:
        """The GPU of this machine; without one, a GPU with the packages that are installed."""
        known = self.gpu.hardware if self.gpu else Hardware(liger=has_liger())
        width = self.shape.head_dim  # kernels for documents of any length take no others
        return replace(
            known,
            varlen=known.varlen and width % 8 == 0 and width <= 256,
            liger=known.liger and has_liger(self.model_type),
        )

    @cached_property
    def prediction(self) -> Prediction:
        """The memory that it needs."""
        phase = self.phases[0]
        return predict(
            self.shape,
            phase.train,
            seq_len=phase.pack.seq_len,
            num_processes=self.num_processes,
            hardware=self.hardware,
        )

    def change(self, gpu_bytes: float) -> OptionChange | None:
        """Return the smallest change with which it fits a GPU."""
        phase = self.phases[0]
        return smallest_change(
            self.shape,
            phase.train,
            seq_len=phase.pack.seq_len,
            gpu_bytes=gpu_bytes,
            num_processes=self.num_processes,
            hardware=self.hardware,
        )


def trainings_of(phases: Sequence[Phase], student: str) -> list[Training]:
    """Group phases that need the same memory.

    Empty if the architecture is unknown; `check` has already reported why.
    """
    try:
        folder = model_folder(student)
        shape = read_shape(folder)
    except DasdError:
        return []
    gpu, model_type = visible_gpu(), str(json.loads((folder / "config.json").read_text()).get("model_type", ""))
    groups: list[Training] = []
    for phase in phases:
        training = Training([phase], shape, gpu, model_type)
        same = next((group for group in groups if group.prediction == training.prediction), None)
        if same is None:
            groups.append(training)
        else:
            same.phases.append(phase)
    return groups


def too_big(trainings: list[Training]) -> Iterator[str]:
    """Report each training run that does not fit the GPU of this machine, and what would make it fit."""
    for training in trainings:
        gpu, needed = training.gpu, training.prediction.total
        must_fit = any(phase.train.must_fit for phase in training.phases)
        if gpu is None or needed <= gpu.usable or not must_fit:
            continue
        change = training.change(gpu.usable)
        remedy = f"smallest change that fits: {change}" if change else "no option makes it fit; use a smaller student"
        names = ", ".join(repr(phase.name) for phase in training.phases)
        subject = f"phases {names} need" if len(training.phases) > 1 else f"phase {names} needs"
        yield (
            f"train: {subject} about {format_bytes(needed)}, but the GPU ({gpu.name}) has {_memory_of(gpu)}; {remedy}"
        )


def _memory_of(gpu: Gpu) -> str:
    """Say what a GPU has, what others hold of it, and that there are others with more."""
    text = format_bytes(gpu.memory)
    if gpu.memory - gpu.usable > _DISPLAY:
        text += f", of which other processes hold {format_bytes(gpu.memory - gpu.usable)}"
    if others := [name for name in gpu.names if name != gpu.name]:
        text += f", the least of {gpu.number} GPUs; CUDA_VISIBLE_DEVICES can leave only {', '.join(others)}"
    return text


def memory_line(training: Training) -> str:
    """Say how much memory a training run needs and, without a GPU here, which GPUs have it."""
    prediction, names = training.prediction, ", ".join(phase.name for phase in training.phases)
    parts = {
        "weights": prediction.weights,
        "gradients": prediction.gradients,
        "optimizer": prediction.optimizer,
        "activations": prediction.activations,
        "loss": prediction.loss,
        "overhead": prediction.overhead,
    }
    peak = ", ".join(f"{name} {format_bytes(value)}" for name, value in parts.items() if value)
    one = "the GPU" if training.gpu else "a GPU"
    where = one if training.num_processes == 1 else f"each of {training.num_processes} GPUs"
    line = f"{names}/train: about {format_bytes(prediction.total)} on {where} ({peak})"
    line += f", {format_bytes(prediction.host)} of host memory" if prediction.host else ""
    if training.gpu is not None:
        return f"{line}; predicted"
    sizes = sizes_that_fit(prediction)
    fits = f"fits GPUs of {sizes[0]} GB or more" if sizes else f"fits no GPU up to {GPU_SIZES[-1]} GB"
    return f"{line}; predicted, no GPU is visible here: {fits}"


def hours_line(trainings: list[Training], num_prompts: int) -> str | None:
    """Say how long training takes at most; None if the speed of the GPU is unknown, or nothing is to be sampled."""
    gpu = trainings[0].gpu if trainings else None
    peak = peak_flops(gpu.name) if gpu else None
    phases = [phase for training in trainings for phase in training.phases]
    if gpu is None or peak is None or all(phase.source != "sample" for phase in phases):
        return None
    hours, share = 0.0, assumed_mfu(gpu.name)
    for training in trainings:
        for phase in (p for p in training.phases if p.source == "sample"):
            length = min(phase.sample.max_tokens, phase.pack.seq_len)
            tokens = num_prompts * min(phase.select.keep, phase.sample.num_samples) * length
            epochs = phase.train.epochs
            hours += training_hours(
                training.shape, phase.train, length, tokens * epochs, share * peak, training.num_processes
            )
    rest = ", ".join(phase.name for phase in phases if phase.source != "sample")
    return (
        f"time: training takes at most {hours:,.1f} h if every kept answer has the maximum length, at an assumed"
        f" {share:.0%} of the {peak / 1e12:,.0f} TFLOP/s of {gpu.name}{f'; not counted: {rest}' if rest else ''}"
    )


def format_bytes(num_bytes: float) -> str:
    """Return a number of bytes for people: in GB from 1e9 on, else in MB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
