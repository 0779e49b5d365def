"""What evaluations will cost, in one line for `check`: answers, tokens, hours.

Input: the answers that are asked for, a model's shape and the GPU of this machine. Invariant: hours are at most, as if
every answer had its maximum length, and rest on the assumptions below.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from dasd_lite.config.models import Student, Vllm
from dasd_lite.costs.cache import answers_that_fit
from dasd_lite.costs.hardware import Gpu, peak_flops
from dasd_lite.costs.shape import ModelShape

STEP_SECONDS = 0.028
"""One token of each answer in a batch by transformers, which launches its kernels from Python; assumed, for any GPU."""

VLLM_RATE = 20_000.0
"""Tokens per second of a 4B model by vLLM on an H200; assumed."""
_RATED_PARAMETERS, _RATED_PEAK = 4e9, 989e12


@dataclass(frozen=True)
class Load:
    """What one evaluation asks: answers of some length.

    Attributes:
        num_questions: How many questions.
        num_answers: How many answers to them in all.
        max_tokens: Longest answer.
        characters: Of all questions, as often as they are asked.
    """

    num_questions: int
    num_answers: int
    max_tokens: int
    characters: int = 0

    @property
    def tokens(self) -> int:
        """The most that it writes."""
        return self.num_answers * self.max_tokens


def batch_that_fits(shape: ModelShape, gpu: Gpu, max_tokens: int, batch_size: int) -> int:
    """Return how many answers transformers can write side by side: keys and values of each fill the memory."""
    return min(batch_size, answers_that_fit(shape, gpu.usable - 2 * shape.num_parameters, max_tokens))


def transformers_hours(shape: ModelShape, gpu: Gpu, loads: Sequence[Load], batch_size: int) -> float:
    """Return the hours of evaluations by transformers."""
    seconds = 0.0
    for load in loads:
        batch = batch_that_fits(shape, gpu, load.max_tokens, batch_size)
        seconds += -(-load.num_answers // batch) * load.max_tokens * STEP_SECONDS
    return seconds / 3600


def vllm_hours(shape: ModelShape, gpu: Gpu, loads: Sequence[Load]) -> float | None:
    """Return the hours of evaluations by vLLM; None if the speed of the GPU is not known."""
    if (peak := peak_flops(gpu.name)) is None:
        return None
    rate = VLLM_RATE * (_RATED_PARAMETERS / shape.num_parameters) * (peak / _RATED_PEAK)
    return sum(load.tokens for load in loads) / rate / 3600


def evaluation_line(
    loads: Sequence[Load],
    num_evaluations: int,
    student: Student,
    shape: ModelShape | None,
    gpu: Gpu | None,
) -> str:
    """Say what all evaluations of the student ask and how long they take, and what would be faster.

    Args:
        loads: Those of all evaluations together.
        num_evaluations: How many there are: before training, and after each phase.
        student: How the student is run.
        shape: Its shape; None: not known.
        gpu: The GPU; None: there is none here.
    """
    answers, tokens = sum(load.num_answers for load in loads), sum(load.tokens for load in loads)
    times = "1 evaluation" if num_evaluations == 1 else f"{num_evaluations} evaluations"
    line = f"evaluation: {answers:,} answers in {times}, at most {tokens:,} tokens"
    if shape is None or gpu is None:
        return line
    fast = vllm_hours(shape, gpu, loads)
    if isinstance(student, Vllm):
        return line if fast is None else f"{line}; at most {_time(fast)} with vLLM, assumed"
    longest = max(load.max_tokens for load in loads)
    batch = batch_that_fits(shape, gpu, longest, student.batch_size)
    hours = transformers_hours(shape, gpu, loads, student.batch_size)
    line += (
        f"; at most {_time(hours)} with transformers ({batch} at a time, {STEP_SECONDS * 1000:.0f} ms a step assumed)"
    )
    if fast is None or fast > hours / 2:
        return line
    how = "is installed" if importlib.util.find_spec("vllm") else "needs pip install 'dasd-lite[vllm]'"
    return f"{line}; student.kind = 'vllm' takes at most {_time(fast)}, and vLLM {how}"


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} h" if hours >= 1 else f"{max(hours * 60, 1):,.0f} min"
