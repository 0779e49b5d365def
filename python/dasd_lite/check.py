"""Look a recipe over before it costs anything: a ladder whose every rung tells all its faults at once.

Rungs: `config` (load.py has climbed it when this starts), `models` (questions readable, models and
tokenizers there, packages installed, the card fit for it, space on the disk), `trial` (the first 16
prompts through the whole chain, in a temporary folder). Printed with it: what the run will cost.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dasd_lite.chat import Chat, model_folder
from dasd_lite.config import SCORED_RULES, Phase, RecipeConfig
from dasd_lite.console import out
from dasd_lite.dataset import free_bytes
from dasd_lite.errors import ConfigError, DasdError
from dasd_lite.prompts import read_prompts
from dasd_lite.records import Prompt

TRIAL_PROMPTS = 16
_BYTES_PER_TOKEN = 20  # on disk: ids, log-probability, byte length and text, with a margin over what zstd makes of it


def check(recipe: RecipeConfig, until: str) -> None:
    """Climb the rungs up to `until`; raises ConfigError with all faults of the first rung that fails."""
    for line in unread(recipe):
        out().print(f"note: {line}", markup=False, soft_wrap=True)
    if until == "config":
        return
    faults = [*_questions(recipe), *_models(recipe), *_machine(recipe)]
    if faults:
        raise ConfigError("\n".join(faults))
    _print_costs(recipe)
    if until == "trial":
        _trial(recipe)


def unread(recipe: RecipeConfig) -> Iterator[str]:
    """Name settings that are written but that nothing reads."""
    for phase in recipe.phase:
        defaults = Phase(name=phase.name)
        used = {"score", "select", "pack", "train", "evaluate", phase.source}
        if phase.select.rule not in SCORED_RULES:
            used.discard("score")
        for stage in ("sample", "ingest", "mix", "score"):
            written = getattr(phase, stage)
            if stage not in used and written != getattr(defaults, stage) and not _used_elsewhere(recipe, stage):
                yield f"phase {phase.name!r} has source = {phase.source!r}: its [{stage}] settings are not read"
        if phase.select.rule == "all" and phase.select.keep != defaults.select.keep:
            yield f"phase {phase.name!r}: select.keep = {phase.select.keep} is not read, select.rule = 'all' keeps all"
    if recipe.teacher is not None and all(phase.source == "ingest" for phase in recipe.phase):
        yield "[teacher] is not read: every phase ingests its answers"


def _used_elsewhere(recipe: RecipeConfig, stage: str) -> bool:
    """A table under the phases is read when any of them has its stage."""
    scored = stage == "score" and any(phase.select.rule in SCORED_RULES for phase in recipe.phase)
    return scored or any(phase.source == stage for phase in recipe.phase)


# --- the rung of models and data --------------------------------------------------------------------


def _questions(recipe: RecipeConfig) -> Iterator[str]:
    """Read every file of questions once."""
    files = {("prompts.path", recipe.prompts.path)} if recipe.prompts.path and _asks(recipe) else set()
    files |= {("evaluate.prompts", p.evaluate.prompts) for p in recipe.phase if p.evaluate.prompts is not None}
    for key, path in sorted(files):
        try:
            prompts = read_prompts(path)
        except DasdError as error:
            yield f"{key}: {error}"
            continue
        if key == "evaluate.prompts" and (without := [p.uid for p in prompts if p.answer is None]):
            yield f"{key}: {path}: {len(without)} questions have no `answer`, the first is {without[0]}"
    domains = {prompt.domain for prompt in _prompts(recipe)}
    for phase in recipe.phase if domains else ():
        for domain in sorted(phase.select.budget.keys() - domains if phase.source == "sample" else ()):
            found = ", ".join(sorted(domains))
            yield f"phase {phase.name!r}: select.budget: no prompt is of domain {domain!r}; there are {found}"
    for phase in recipe.phase:
        for path in phase.ingest.paths if phase.source == "ingest" else ():
            if not path.is_file():
                yield f"ingest.paths: {path}: no such file"


def _asks(recipe: RecipeConfig) -> bool:
    return any(phase.source == "sample" for phase in recipe.phase)


def _models(recipe: RecipeConfig) -> Iterator[str]:
    """Open each model's tokenizer and template; hold the prompts against its context."""
    tables = {"student": recipe.student, "teacher": recipe.teacher}
    for name, table in tables.items():
        if table is None:
            continue
        if table.kind == "endpoint":
            if name == "teacher" and not os.environ.get(table.api_key_env):
                out().print(f"note: the environment has no {table.api_key_env}; servers are asked without a key")
            if any(phase.source == "mix" for phase in recipe.phase):
                yield (
                    f"teacher: source = 'mix' needs one that continues a given answer, which {table.base_urls[0]}"
                    " cannot; run it here (kind = 'vllm' or 'transformers') or leave that phase out"
                )
            continue
        try:
            chat = Chat(model_folder(table.model))
            rows = max(phase.pack.seq_len for phase in recipe.phase)
            if name == "student" and rows > chat.context:
                out().print(f"note: answers over the student's context of {chat.context} tokens will be rejected")
            if _asks(recipe) and (too_long := _too_long(recipe, chat)):
                yield f"{name}: {too_long}"
        except DasdError as error:
            yield f"{name}: {error}"


def _too_long(recipe: RecipeConfig, chat: Chat) -> str:
    """Say which prompt leaves no room for an answer."""
    context = chat.context
    for prompt in _prompts(recipe):
        length = len(chat.prompt_ids(prompt.messages))
        if length >= context:
            return (
                f"prompt {prompt.uid} has {length} tokens, over the context of {chat.folder}, which is {context};"
                " shorten it or leave it out"
            )
    return ""


def _machine(recipe: RecipeConfig) -> Iterator[str]:
    """Say which packages are missing, and which settings want a card that is not there."""
    needed = {"torch": "train", "transformers": "train", "safetensors": "train"}
    kinds = {phase.train.method.kind for phase in recipe.phase}
    needed |= {"peft": "train"} if kinds & {"lora", "qlora"} else {}
    needed |= {"bitsandbytes": "train", "accelerate": "train"} if "qlora" in kinds else {}
    if "vllm" in (recipe.student.kind, recipe.teacher.kind if recipe.teacher else None):
        needed |= {"vllm": "vllm"}
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            yield f"{package} is not installed; it comes with: pip install 'dasd-lite[{extra}]'"
    wanting = [phase.name for phase in recipe.phase if phase.train.dtype == "bfloat16"]
    if wanting and importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name()
            yield f"train.dtype = 'bfloat16' in {', '.join(wanting)}, which {name} has not; use 'auto' or 'float16'"
    free, wanted = free_bytes(recipe.out), _disk_bytes(recipe)
    if wanted > free:
        yield f"out = {recipe.out}: needs up to {wanted / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"


# --- costs ------------------------------------------------------------------------------------------


def _num_prompts(recipe: RecipeConfig) -> int:
    return len(_prompts(recipe)) if _asks(recipe) else 0


def _prompts(recipe: RecipeConfig) -> list[Prompt]:
    """Read the questions; none when they cannot be read, which `_questions` tells."""
    if recipe.prompts.path is None:
        return []
    try:
        return read_prompts(recipe.prompts.path, limit=recipe.prompts.limit, system=recipe.prompts.system)
    except DasdError:
        return []


def _disk_bytes(recipe: RecipeConfig) -> int:
    """Return the most that the run can write: every answer at its longest, and each phase's model."""
    samples = sum(p.sample.num_samples * p.sample.max_tokens for p in recipe.phase if p.source == "sample")
    weights = sum(f.stat().st_size for f in _weights(recipe))
    return samples * _num_prompts(recipe) * _BYTES_PER_TOKEN + 5 * weights * len(recipe.phase)  # model and checkpoints


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _weights(recipe: RecipeConfig) -> list[Path]:
    folder = Path(recipe.student.model)
    return list(folder.glob("*.safetensors")) if folder.is_dir() else []


def _print_costs(recipe: RecipeConfig) -> None:
    prompts = _num_prompts(recipe)
    for phase in recipe.phase:
        if phase.source == "sample":
            answers = prompts * phase.sample.num_samples
            out().print(
                f"{phase.name}: {answers:,} answers of {prompts:,} prompts at T={phase.sample.temperature},"
                f" at most {answers * phase.sample.max_tokens:,} tokens",
                soft_wrap=True,
            )
    weights = sum(f.stat().st_size for f in _weights(recipe))
    out().print(f"disk: at most {_size(_disk_bytes(recipe))} in {recipe.out}", soft_wrap=True)
    if weights:
        # Full training: weights, gradients and two moments, in the weights' own format or fp32.
        full = any(phase.train.method.kind == "full" for phase in recipe.phase)
        out().print(f"memory for training, without activations: about {_size(weights * (4 if full else 1))}")


# --- the trial --------------------------------------------------------------------------------------


def _trial(recipe: RecipeConfig) -> None:
    """Send the first prompts through every stage in a folder that is thrown away."""
    from dasd_lite import recipe as recipes

    with tempfile.TemporaryDirectory(prefix="dasd-trial-") as folder:
        phases = [_small(phase) for phase in recipe.phase if phase.source != "mix"]
        limit = min(recipe.prompts.limit or TRIAL_PROMPTS, TRIAL_PROMPTS)
        prompts = recipe.prompts.model_copy(update={"limit": limit})
        small = recipe.model_copy(update={"out": Path(folder), "prompts": prompts, "phase": phases})
        recipes.run(small, announce=lambda step, done: out().print(f"trial: {step.name}") if done else None)


def _small(phase: Phase) -> Phase:
    return phase.model_copy(
        update={
            "ingest": phase.ingest.model_copy(update={"limit": TRIAL_PROMPTS}),
            "train": phase.train.model_copy(update={"epochs": 1e-9}),  # one step
            "evaluate": phase.evaluate.model_copy(update={"limit": TRIAL_PROMPTS, "num_samples": 1}),
        }
    )
