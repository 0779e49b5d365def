"""Check a recipe before it costs anything, in levels; each level reports all of its faults at once.

Levels: `config` (what load_recipe does), `models` (prompts readable, models and tokenizers present, servers probed,
packages installed, enough memory and disk), `trial` (the first prompts through the whole chain). If there are no
faults, what the run will cost is printed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dasd_lite.chat.chat import Chat
from dasd_lite.config.chain import ASKING, SOURCES
from dasd_lite.config.extensions import is_extension
from dasd_lite.config.models import CustomTeacher, Endpoint, Student, Teacher, Transformers, Vllm
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.config.train import Lora
from dasd_lite.console import say, say_note
from dasd_lite.costs.estimate import (
    answers_line,
    disk_bytes,
    format_bytes,
    hours_line,
    memory_line,
    price_line,
    too_big,
    trainings_of,
)
from dasd_lite.data.files import free_bytes
from dasd_lite.data.hub import configured_stop_ids, model_folder
from dasd_lite.data.prompts import Prompts
from dasd_lite.data.records import Prompt
from dasd_lite.data.run_folder import RunFolder, StageFolder
from dasd_lite.errors import ConfigError, DasdError, DataError, MissingExtraError
from dasd_lite.grading import open_grader
from dasd_lite.inference.custom import load_custom
from dasd_lite.run.endpoint_check import probe_teacher
from dasd_lite.run.engine_check import gpu_faults, memory_faults
from dasd_lite.run.evaluation_check import (
    contamination_lines,
    evaluation_faults,
    evaluations_line,
    reference_lines,
    teacher_load,
)
from dasd_lite.run.existing import answers_there, folder_bytes, in_the_way, orphans, unknown_runs
from dasd_lite.run.ingest_check import check_ingest, check_logprobs
from dasd_lite.run.model_check import architecture_faults, architecture_notes
from dasd_lite.run.pipeline import plan
from dasd_lite.run.questions import Questions, overlong
from dasd_lite.run.trial import run_trial
from dasd_lite.stages.ingest import tokenizer_name
from dasd_lite.stages.select import open_rule
from dasd_lite.training.requirements import conflicts, missing_layers


def check_recipe(recipe: RecipeConfig, until: str) -> None:
    """Check a recipe up to the level `until`.

    Raises:
        ConfigError: All faults of the first level that has any, a line for each.
    """
    for line in unread_settings(recipe):
        say_note(line)
    for key, name in recipe.extensions:
        say(f"code: {key} = {name!r} will be imported and run")
    if recipe.engine_line:
        say_note(recipe.engine_line)
    if until == "config":
        return
    questions, faults = Questions(), list(extension_faults(recipe))
    faults += [] if faults else _columns(recipe)
    prompts: Prompts | None = None
    faults += _prompt_files(recipe, questions)
    faults += evaluation_faults(recipe, questions)
    if not faults and _samples(recipe.phase):
        try:
            prompts = questions.to_sample(recipe)
        except DataError as error:
            faults.append(f"prompts.path: {error}")
        except ConfigError:
            pass  # of a model; what follows reports it
        faults += _no_references(recipe.phase, prompts or ())
        for line in _ungraded(recipe.phase, prompts or ()):
            say_note(line)
        if prompts is not None:
            unreadable, notes = reference_lines(recipe, prompts)
            faults += unreadable
            for line in notes:
                say_note(line)
        if prompts is not None and not recipe.prompts.drop_contaminated:
            for line in contamination_lines(recipe, questions, prompts):
                say_note(line)
    faults += _student(recipe.student, recipe.phase, prompts)
    if recipe.teacher is not None:
        faults += _teacher(recipe.teacher, recipe.phase, prompts)
    faults += _budgets(recipe.phase, prompts)
    faults += _packages(recipe)
    faults += architecture_faults(recipe)
    if not faults:
        for line in architecture_notes(recipe):
            say_note(line)
    faults += _training(recipe, len(prompts or ()))
    faults += [] if faults else memory_faults(recipe, questions)
    faults += unknown_runs(recipe)
    steps = [] if faults else plan(recipe, questions)
    faults += in_the_way(steps, recipe)
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    _say_costs(recipe, prompts, questions)
    for line in answers_there(recipe, steps, questions):
        say(line)
    for folder in orphans(recipe):
        say_note(f"{folder}: no phase of this recipe; nothing reads it")
    if until == "trial":
        run_trial(recipe, questions)


# --- settings that nothing reads ----------------------------------------------------------------------


def unread_settings(recipe: RecipeConfig) -> Iterator[str]:
    """Name settings that are written but have no effect."""
    for phase in recipe.phase:
        yield from _unread_tables(phase, recipe.phase)
        yield from _wasted_answers(phase)
        if phase.pack.replay_from is not None and not phase.replays:
            yield f"phase {phase.name!r}: pack.replay_from has no effect: pack.replay = 0"
        if phase.select.rule == "all" and phase.select.keep != Phase(name=phase.name).select.keep:
            yield (
                f"phase {phase.name!r}: select.keep = {phase.select.keep} has no effect: select.rule = 'all' keeps all"
            )
        if phase.select.uses_weights and all(
            p.train.objective == "sft" for p in recipe.phase if p is phase or p.replays
        ):
            yield (
                f"phase {phase.name!r}: select.weighting has no effect: train.objective = 'sft' weighs all tokens alike"
            )
    yield from _unread_starts(recipe.phase)
    is_scorer = any(phase.is_scored_by_teacher or phase.evaluate.teacher for phase in recipe.phase)
    if recipe.prompts.drop_contaminated and any(phase.source == "ingest" for phase in recipe.phase):
        yield (
            "prompts.drop_contaminated has no effect on phases with source = 'ingest', whose questions come with their"
            " answers; the report lists those that are evaluation questions"
        )
    if recipe.teacher is not None and not is_scorer and not any(phase.source in ASKING for phase in recipe.phase):
        is_tokenizer = any(
            tokenizer_name(phase.ingest, recipe.teacher) != phase.ingest.tokenizer for phase in recipe.phase
        )
        but = ", but for its tokenizer" if is_tokenizer else ""
        yield f"[teacher] has no effect{but}: every phase takes existing answers (source = 'ingest' or 'replay')"


def _unread_tables(phase: Phase, phases: Sequence[Phase]) -> Iterator[str]:
    """Name the tables of stages that the phase does not run, if no other phase does either."""
    defaults = Phase(name=phase.name)
    for stage in (*SOURCES, "score"):
        is_read = any(stage in other.stages or (stage == "score" and other.score.when == "never") for other in phases)
        if not is_read and getattr(phase, stage) != getattr(defaults, stage):
            yield f"phase {phase.name!r} has source = {phase.source!r}: its [{stage}] settings have no effect"


def _wasted_answers(phase: Phase) -> Iterator[str]:
    """Say when answers are sampled that the rule does not use: only the random one compares nothing."""
    bought, keep = phase.sample.num_samples, phase.select.keep
    if phase.source == "sample" and phase.select.rule == "random" and keep < bought:
        yield (
            f"phase {phase.name!r}: select.rule = 'random' keeps {keep} of {bought} answers: sample.num_samples ="
            f" {keep} saves {1 - keep / bought:.0%}; spare answers only replace those that a filter rejects"
        )


def _unread_starts(phases: Sequence[Phase]) -> Iterator[str]:
    """Name phases that should continue with an adapter where the phase before leaves none."""
    for before, phase in zip([None, *phases], phases, strict=False):
        method = phase.train.method
        leaves_adapter = before is not None and isinstance(before.train.method, Lora)
        if isinstance(method, Lora) and method.start == "adapter" and not leaves_adapter:
            why = f"phase {before.name!r} leaves no adapter" if before else "it is the first phase"
            yield f"phase {phase.name!r}: train.method.start = 'adapter' has no effect: {why}"


# --- extensions, prompts, models ----------------------------------------------------------------------


def extension_faults(recipe: RecipeConfig) -> Iterator[str]:
    """Import the code that the recipe names, and yield what is wrong with it."""
    from dasd_lite.training.objectives import open_objective

    for key, name in recipe.extensions:
        try:
            match key:
                case "teacher.kind" if isinstance(recipe.teacher, CustomTeacher):
                    load_custom(recipe.teacher, scoring=any(p.is_scored_by_teacher for p in recipe.phase))
                case "select.rule":
                    open_rule(name)
                case "train.objective" if importlib.util.find_spec("torch") is not None:
                    open_objective(name)
                case "evaluate.grader":
                    open_grader(name)
        except DasdError as error:
            yield str(error)


def _columns(recipe: RecipeConfig) -> Iterator[str]:
    """Name columns that a phase's own objective needs and that nothing gives."""
    from dasd_lite.training.objectives import open_objective
    from dasd_lite.training.objectives.objective import BUILT_IN_COLUMNS

    for phase in recipe.phase if importlib.util.find_spec("torch") is not None else ():
        name, path = phase.train.objective, phase.pack.columns
        needs = open_objective(name).needs if is_extension(name) else ()
        key = f"phase {phase.name!r}: train.objective = {name!r}"
        if "weight" in needs and phase.select.weighting is None and not phase.replays:
            yield f"{key} needs weights; set select.weighting, e.g. {{ effective_sample_size = 0.7 }}"
        has_logprobs = not isinstance(recipe.teacher, Endpoint) or recipe.teacher.logprobs
        if "teacher_logprobs" in needs and phase.source == "sample" and not has_logprobs:
            yield f"{key} needs teacher_logprobs, but teacher.logprobs = false; set it to true"
        columns = [need for need in needs if need not in BUILT_IN_COLUMNS]
        if not columns:
            continue
        wanted = f"a Parquet file with uid and {', '.join(columns)}"
        if path is None:
            yield f"{key} needs the column {columns[0]!r}; set pack.columns to {wanted}"
        elif not path.exists():  # it may be made from the rollouts, between sample and pack
            say_note(f"pack.columns = {path}: no such file yet; before pack runs it must be {wanted}")
        else:
            yield from (f"{key}: {problem}" for problem in _missing_columns(path, ("uid", *columns)))


def _missing_columns(path: Path, names: Iterable[str]) -> Iterator[str]:
    """Name the columns that a Parquet file does not have, or say that it is none."""
    try:
        present = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        yield f"pack.columns = {path}: not a Parquet file ({' '.join(str(error).split())})"
        return
    for name in names:
        if name not in present:
            yield f"pack.columns = {path}: has no column {name!r}; it has {', '.join(present)}"


def _samples(phases: Sequence[Phase]) -> bool:
    return any(phase.source == "sample" for phase in phases)


def _prompt_files(recipe: RecipeConfig, questions: Questions) -> Iterator[str]:
    """Read every file of prompts to its end."""
    system = recipe.prompts.system
    if recipe.prompts.path and _samples(recipe.phase):
        try:
            questions.read(recipe.prompts.path, recipe.prompts, None, system)
        except DasdError as error:
            yield from (f"prompts.path: {line}" for line in str(error).splitlines())
    yield from check_ingest(recipe.phase, system)
    yield from check_logprobs(recipe.phase, recipe.teacher)
    for phase in recipe.phase:
        folder = phase.pack.replay_from if phase.replays and recipe.replayed_phase(phase) is None else None
        if folder is not None and not StageFolder.at(folder).is_finished:
            yield (
                f"phase {phase.name!r}: pack.replay_from = {folder}: neither an earlier phase nor a finished folder of"
                " select"
            )


def _no_references(phases: Sequence[Phase], prompts: Sequence[Prompt]) -> Iterator[str]:
    """Report mixed policy of wrong answers where no answer can be found wrong."""
    for phase in phases if prompts and all(prompt.answer is None for prompt in prompts) else ():
        if phase.source == "mix" and phase.mix.rescue == "wrong":
            yield f"phase {phase.name!r}: mix.rescue = 'wrong' needs reference answers, but no prompt has an `answer`"


def _ungraded(phases: Sequence[Phase], prompts: Sequence[Prompt]) -> Iterator[str]:
    """Say how many wrong answers mixed policy cannot see."""
    without = sum(prompt.answer is None for prompt in prompts)
    for phase in phases if without else ():
        if phase.source == "mix" and phase.mix.rescue != "cut_off":
            yield (
                f"phase {phase.name!r}: mix.rescue = {phase.mix.rescue!r} cannot see wrong answers to {without:,} of"
                f" {len(prompts):,} prompts, which have no `answer`"
            )


def _budgets(phases: Sequence[Phase], prompts: Prompts | None) -> Iterator[str]:
    """Name domains in select.budget that no prompt has."""
    domains = {prompt.domain for prompt in prompts or ()}
    for phase in phases if domains else ():
        for domain in sorted(phase.select.budget.keys() - domains if phase.source == "sample" else ()):
            known = ", ".join(sorted(domains))
            yield f"phase {phase.name!r}: select.budget: no prompt has the domain {domain!r}; the domains are {known}"


def _student(student: Student, phases: Sequence[Phase], prompts: Prompts | None) -> Iterator[str]:
    """Open the student's tokenizer and template, and check that the prompts fit its context."""
    try:
        chat = Chat(model_folder(student.model))
        stops = configured_stop_ids(chat.folder)
        if stops and chat.eos_id not in stops:
            say_note(
                f"the student's template ends an answer with token {chat.eos_id}, but engines stop at"
                f" {', '.join(map(str, sorted(stops)))}; trained models get both in their generation_config.json"
            )
        if max(phase.pack.seq_len for phase in phases) > chat.context:
            say_note(f"answers longer than the student's context of {chat.context} tokens will be rejected")
        if too_long := _too_long(prompts, chat):
            yield f"student: {too_long}"
    except DasdError as error:
        yield f"student: {error}"


def _teacher(teacher: Teacher, phases: Sequence[Phase], prompts: Prompts | None) -> Iterator[str]:
    """Open the teacher's tokenizer and template, or probe its servers; check that the prompts fit its context."""
    try:
        if isinstance(teacher, Endpoint):
            yield from _servers(teacher, phases, prompts)
        elif isinstance(teacher, Transformers | Vllm):
            chat = Chat(model_folder(teacher.model))
            if not chat.supports_thinking and any(phase.select.require_think for phase in phases):
                yield (
                    f"teacher: neither its template nor its vocabulary in {chat.folder} has <think> or channels;"
                    " use a teacher that thinks, or set select.require_think = false"
                )
            if too_long := _too_long(prompts, chat):
                yield f"teacher: {too_long}"
    except DasdError as error:
        yield f"teacher: {error}"


def _servers(teacher: Endpoint, phases: Sequence[Phase], prompts: Prompts | None) -> Iterator[str]:
    if not os.environ.get(teacher.api_key_env):
        say_note(f"the environment variable {teacher.api_key_env} is not set; requests are sent without a key")
    if teacher.tokenizer and (too_long := _too_long(prompts, Chat(model_folder(teacher.tokenizer)))):
        yield f"teacher: {too_long}"
    yield from probe_teacher(teacher, phases, prompts)


def _too_long(prompts: Prompts | None, chat: Chat) -> str:
    """Name the first prompt that leaves no room for an answer, and how many there are."""
    long = list(overlong(prompts, chat)) if prompts is not None else []
    if not long:
        return ""
    prompt, length = long[0]
    more = f" ({len(long) - 1:,} more are too long)" if len(long) > 1 else ""
    return (
        f"prompt {prompt.name} has {length:,} tokens, but the context of {chat.folder} is {chat.context:,}{more};"
        " shorten it, or leave such prompts out with prompts.skip_overlong = true"
    )


# --- this machine -------------------------------------------------------------------------------------


def _packages(recipe: RecipeConfig) -> Iterator[str]:
    """Name packages that are missing, and GPUs that vLLM does not have."""
    needed = {"torch": "train", "transformers": "train", "safetensors": "train"}
    methods = {phase.train.method.kind for phase in recipe.phase}
    needed |= {"peft": "train"} if methods & {"lora", "qlora"} else {}
    four_bit = "qlora" in methods or any(phase.score.four_bit or phase.evaluate.four_bit for phase in recipe.phase)
    needed |= {"bitsandbytes": "train", "accelerate": "train"} if four_bit else {}
    engines = {phase.score.engine for phase in recipe.phase if phase.is_scored}
    tables = {"student": recipe.student, "teacher": recipe.teacher}
    uses_vllm = "vllm" in engines or any(isinstance(table, Vllm) for table in tables.values())
    needed |= {"vllm": "vllm"} if uses_vllm else {}
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            yield str(MissingExtraError(extra, package))
    for name, table in tables.items():
        if isinstance(table, Vllm) and importlib.util.find_spec("vllm") is not None:
            yield from gpu_faults(name, table)


def _training(recipe: RecipeConfig, num_prompts: int) -> Iterator[str]:
    """Report what training needs and this machine does not have: options, memory, disk."""
    if importlib.util.find_spec("torch") is not None:
        yield from dict.fromkeys(line for phase in recipe.phase for line in conflicts(phase.train))
    yield from missing_layers((phase.train.method for phase in recipe.phase), Path(recipe.student.model))
    yield from too_big(trainings_of(recipe.phase, recipe.student.model))
    for phase in recipe.phase:
        for line in _too_few_rows(phase, num_prompts):
            say_note(line)
    # What a killed trial of an export left is removed before the next one.
    free = free_bytes(recipe.out) + sum(map(folder_bytes, RunFolder(recipe.out).export_trials))
    wanted = disk_bytes(recipe.phase, recipe.student.model, num_prompts)
    if wanted > free:
        yield f"out = {recipe.out}: needs up to {format_bytes(wanted)}, but the disk has {format_bytes(free)} free"


def _too_few_rows(phase: Phase, num_prompts: int) -> Iterator[str]:
    """Say that a step reads more rows than all kept answers could fill, even with one answer per row."""
    train, select = phase.train, phase.select
    wanted = train.micro_batch_size * train.grad_accum_steps
    each = phase.sample.num_samples if select.rule == "all" else min(select.keep, phase.sample.num_samples)
    most = num_prompts * each + (phase.pack.replay_answers or round(phase.pack.replay * num_prompts * each))
    if phase.source == "sample" and 0 < most < wanted:
        yield (
            f"phase {phase.name!r}: train.micro_batch_size × train.grad_accum_steps = {wanted} rows per step,"
            f" but at most {most:,} answers of {num_prompts:,} prompts are kept, so each step reads all of them; lower"
            " train.grad_accum_steps for more steps"
        )


def _say_costs(recipe: RecipeConfig, prompts: Prompts | None, questions: Questions) -> None:
    """Print what the run will cost: answers, money, disk, memory, and hours."""
    num_prompts = len(prompts or ())
    for phase in recipe.phase:
        if phase.source == "sample":
            say(answers_line(phase, num_prompts))
    if isinstance(recipe.teacher, Endpoint):
        say(price_line(recipe.teacher, recipe.phase, prompts, teacher_load(recipe, questions)))
    say(f"disk: at most {format_bytes(disk_bytes(recipe.phase, recipe.student.model, num_prompts))} in {recipe.out}")
    trainings = trainings_of(recipe.phase, recipe.student.model)
    if not trainings:
        say("memory for training: unknown, because sizes of the student's architecture cannot be predicted")
    evaluations = evaluations_line(recipe, questions, trainings)
    for line in (*map(memory_line, trainings), hours_line(trainings, num_prompts), evaluations):
        if line is not None:
            say(line)
