"""What the models of a recipe allow: refused before anything is sampled, or done in another way, and said.

Input: a recipe. Output: faults, one line each, for `check` and `run`; and notes for `check`. Reads configurations and
headers, never weights.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from dasd_lite.config.chain import ASKING
from dasd_lite.config.models import Student, Transformers
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.config.train import Full, Lora
from dasd_lite.data.hub import context_hint, model_folder, read_json
from dasd_lite.errors import ConfigError, DasdError
from dasd_lite.model.architecture import read_architecture
from dasd_lite.training.requirements import has_experts, model_conflicts

_LONGEST_HEADER = 100 << 20  # what the format allows


def architecture_faults(recipe: RecipeConfig) -> Iterator[str]:
    """Refuse models that cannot be scored, trained or sampled rightly."""
    if not _is_installed():
        return
    yield from _student_faults(recipe)
    if isinstance(recipe.teacher, Transformers):
        yield from _teacher_faults(recipe.teacher, recipe.phase)


def architecture_notes(recipe: RecipeConfig) -> Iterator[str]:
    """Say what is done differently for this student; it has no faults."""
    if not _is_installed():
        return
    student = recipe.student
    folder = model_folder(student.model)
    found = read_architecture(folder, trust_remote_code=student.trust_remote_code)
    if hint := context_hint(read_json(folder / "config.json")):
        yield f"student: {hint}"
    if found.apart:
        yield (
            f"the student's documents are computed one at a time, not packed ({found.kind}: {found.apart}): as exact,"
            " and slower for short answers"
        )
    if found.original_positions is not None:
        yield _longrope_line(student, found.original_positions)
    yield from _reader_notes(student, recipe.phase)


def _is_installed() -> bool:
    """Return whether there is what runs models here; `check` reports what is missing."""
    return all(importlib.util.find_spec(package) is not None for package in ("torch", "transformers"))


def _student_faults(recipe: RecipeConfig) -> Iterator[str]:
    student, phases = recipe.student, recipe.phase
    key = f"student.model = {student.model!r}"
    try:
        folder = model_folder(student.model)
        found = read_architecture(folder, trust_remote_code=student.trust_remote_code)
    except DasdError as error:
        yield f"student: {error}"
        return
    faults = list(model_conflicts(folder, [phase.train.method for phase in phases]))
    if not faults:
        try:
            _reader_notes(student, phases)
        except ConfigError as error:  # a model that takes no such adapter
            faults = [f"student: {error}"]
    yield from faults
    if Path(student.model).is_dir():
        yield from (f"{key}: {fault}" for fault in _weight_faults(folder))
    if found.refusal:
        yield f"{key}: {found.refusal}; use another student"
        return
    is_sampled = any(phase.evaluate.has_questions or phase.source == "mix" for phase in phases)
    if found.unsampled and is_sampled and isinstance(student, Transformers):
        yield f"{key}: {found.unsampled}; use kind = 'vllm'"
    if found.no_four_bit and any(
        phase.train.method.kind == "qlora" or phase.score.four_bit or phase.evaluate.four_bit for phase in phases
    ):
        yield f"{key}: {found.no_four_bit}; use lora, or four_bit = false"


def _weight_faults(folder: Path) -> Iterator[str]:
    """Report a folder without weights, and files that were cut short."""
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        yield "the folder has no weights (*.safetensors)"
    for path in files:
        if path.stat().st_size != _size_by_header(path):
            yield f"{path.name} is not whole, or no file of safetensors; download it again"


def _size_by_header(path: Path) -> int:
    """Return the bytes that a file of safetensors has by its header; -1 if that cannot be read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            tensors = json.loads(file.read(min(length, _LONGEST_HEADER)))
            ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return -1
    return 8 + length + max(ends, default=0)


def _teacher_faults(teacher: Transformers, phases: Sequence[Phase]) -> Iterator[str]:
    from dasd_lite.model.load import quantization_conflict

    key, trusts = f"teacher.model = {teacher.model!r}", teacher.trust_remote_code
    try:
        folder = model_folder(teacher.model)
    except DasdError:
        return  # `check` reports it
    try:
        found = read_architecture(folder, trust_remote_code=trusts)
        conflict = quantization_conflict(folder, trust_remote_code=trusts)
    except DasdError as error:
        yield f"teacher: {error}"
        return
    is_sampled = any(phase.source in ASKING or phase.evaluate.teacher for phase in phases)
    is_scorer = any(phase.is_scored_by_teacher for phase in phases)
    if conflict and (is_sampled or is_scorer):
        yield f"{key}: {conflict}; install what it needs, or use kind = 'vllm'"
    if found.unsampled and is_sampled:
        yield f"{key}: {found.unsampled}; use kind = 'vllm'"
    elif found.refusal and is_scorer:
        yield f"{key}: {found.refusal}; use kind = 'vllm', or score.by = 'student'"


def _reader_notes(student: Student, phases: Sequence[Phase]) -> list[str]:
    """Say which other programs read the adapters of a mixture of experts."""
    methods: list[Full | Lora] = [phase.train.method for phase in phases]
    folder, adapters = model_folder(student.model), [method for method in methods if isinstance(method, Lora)]
    if not adapters or not has_experts(read_json(folder / "config.json")) or importlib.util.find_spec("peft") is None:
        return []
    from dasd_lite.training.adapter import reader_notes

    return list(dict.fromkeys(reader_notes(folder, adapters, trust_remote_code=student.trust_remote_code)))


def _longrope_line(student: Student, original: int) -> str:
    long = student.max_model_len is None or student.max_model_len > original
    which = f"contexts over {original:,} tokens" if long else f"contexts of up to {original:,} tokens"
    other = f"at most {original}" if long else f"over {original}"
    return (
        f"the student's rope (longrope) has its factors for {which} throughout; student.max_model_len {other} chooses"
        " the others. Serve the trained model with a max_model_len on the same side"
    )
