"""Phases and stages as an ordered list of steps, and running them.

Input: a resolved recipe. Output: the stage folders of its run. A phase is one pass down the chain; the next
phase starts from its model. A step whose folder is finished is skipped, so the same call resumes after anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dasd_lite.config.chain import ASKING, BASE
from dasd_lite.config.models import Table, Teacher, result_options
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.config.train import Lora
from dasd_lite.console import is_first, is_rank
from dasd_lite.data.files import disk_errors, run_lock
from dasd_lite.data.handles import Evaluation, Kept, Model, Rollouts, Rows, Scores
from dasd_lite.data.hub import model_folder
from dasd_lite.data.journal import read_counts
from dasd_lite.data.manifest import read_manifest, read_timing
from dasd_lite.data.run_folder import RunFolder, StageFolder
from dasd_lite.data.usage import Usage
from dasd_lite.errors import CheckpointError, ConfigError
from dasd_lite.run.questions import Questions

Handle = Rollouts | Scores | Kept | Rows | Model | Evaluation


class Work(Protocol):
    """Runs a stage with all that its phase says; `used` counts only where it asks the teacher."""

    def __call__(self, *, force: bool, used: Usage | None) -> Handle:
        """Run the stage, or return its folder if it is finished."""
        ...


@dataclass(frozen=True)
class Step(StageFolder):
    """One stage of one phase, and how to run it."""

    config: Table
    """The table of the stage."""
    work: Work
    asks: bool = False
    """Whether it asks the teacher."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that the phase gives to options that are left open."""


@dataclass(frozen=True)
class Outcome:
    """What a call of `run_steps` did."""

    steps: tuple[Step, ...]
    """The steps that were asked for, in order; at least one."""
    ran: int
    """How many of them were not finished before."""


@dataclass(frozen=True)
class _Before:
    """What a phase takes over from those before it."""

    model: Path
    """What this phase's student starts from."""
    start: Path
    """The weights under `adapter`; else the same as `model`."""
    adapter: Path | None = None
    """The adapter to continue with."""
    kept: Path | None = None
    """The teacher's answers that the phase before trained on."""
    sampled: Path | None = None
    """The rollouts that they were selected from."""


def plan(recipe: RecipeConfig, questions: Questions | None = None, max_steps: int | None = None) -> list[Step]:
    """Return the steps of a recipe in the order in which they run; downloads the student if it is not here.

    `max_steps` ends every training run early, for a trial.
    """
    questions = questions or Questions()
    base, out = model_folder(recipe.student.model, weights=True), RunFolder(recipe.out)
    steps: list[Step] = []
    if recipe.phase[0].evaluate.prompts is not None:
        steps.append(_evaluate(recipe, recipe.phase[0], BASE, base, questions))
    before = _Before(base, base)
    for phase in recipe.phase:
        method = phase.train.method
        if not (before.adapter and isinstance(method, Lora) and method.keeps_adapter):
            before = _Before(before.model, before.model, None, before.kept, before.sampled)
        steps += _phase_steps(recipe, phase, before, questions, max_steps)
        kept, sampled = before.kept, before.sampled
        if phase.source != "mix":
            kept, sampled = out.stage(phase.name, "select"), out.stage(phase.name, phase.source)
        adapter = out.adapter(phase.name) if isinstance(method, Lora) else None
        before = _Before(out.model(phase.name), before.start, adapter, kept, sampled)
    return steps


def _phase_steps(
    recipe: RecipeConfig, phase: Phase, before: _Before, questions: Questions, max_steps: int | None
) -> Iterator[Step]:
    """Yield one step for each stage of a phase, in the order of the chain."""
    for stage in phase.stages:
        match stage:
            case "sample":
                yield _sample(recipe, phase, questions)
            case "ingest":
                yield _ingest(recipe, phase)
            case "mix":
                yield _mix(recipe, phase, before)
            case "score":
                yield _score(recipe, phase)
            case "select":
                yield _select(recipe, phase)
            case "pack":
                yield _pack(recipe, phase, before)
            case "train":
                yield _train(recipe, phase, before, questions, max_steps)
            case "evaluate":
                yield _evaluate(recipe, phase, phase.name, RunFolder(recipe.out).model(phase.name), questions)
            case _:
                raise AssertionError(f"no step for stage {stage}")


def _sample(recipe: RecipeConfig, phase: Phase, questions: Questions) -> Step:
    from dasd_lite.stages.sample import sample

    run, teacher = RunFolder(recipe.out), _teacher(recipe.teacher)
    folder = run.stage(phase.name, "sample")

    def work(*, force: bool, used: Usage | None) -> Rollouts:
        return sample(
            questions.to_sample(recipe),
            teacher,
            phase.sample,
            out=folder,
            seed=recipe.seed,
            phase=phase.name,
            trial=run.trial.stage(phase.name, "sample"),
            used=used,
            force=force,
        )

    return Step(phase.name, "sample", folder, phase.sample, work, asks=True)


def _ingest(recipe: RecipeConfig, phase: Phase) -> Step:
    from dasd_lite.stages.ingest import ingest

    folder = RunFolder(recipe.out).stage(phase.name, "ingest")

    def work(*, force: bool, used: Usage | None) -> Rollouts:
        system, teacher = recipe.prompts.system, recipe.teacher
        return ingest(config=phase.ingest, out=folder, system=system, teacher=teacher, force=force)

    return Step(phase.name, "ingest", folder, phase.ingest, work)


def _mix(recipe: RecipeConfig, phase: Phase, before: _Before) -> Step:
    from dasd_lite.stages.mix import mix

    folder, teacher = RunFolder(recipe.out).stage(phase.name, "mix"), _teacher(recipe.teacher)

    def work(*, force: bool, used: Usage | None) -> Rollouts:
        assert before.kept is not None, "the recipe has a phase before"
        return mix(
            before.kept,
            before.model,
            teacher,
            phase.mix,
            out=folder,
            student=recipe.student,
            seed=recipe.seed,
            phase=phase.name,
            sampled=before.sampled,
            used=used,
            force=force,
        )

    return Step(phase.name, "mix", folder, phase.mix, work, asks=True)


def _score(recipe: RecipeConfig, phase: Phase) -> Step:
    from dasd_lite.stages.score import score

    run, teacher = RunFolder(recipe.out), recipe.teacher if phase.score.by == "teacher" else None
    folder = run.stage(phase.name, "score")

    def work(*, force: bool, used: Usage | None) -> Scores:
        rollouts = run.stage(phase.name, phase.source)
        return score(rollouts, recipe.student, phase.score, out=folder, teacher=teacher, used=used, force=force)

    return Step(phase.name, "score", folder, phase.score, work, asks=teacher is not None)


def _select(recipe: RecipeConfig, phase: Phase) -> Step:
    from dasd_lite.stages.select import select

    run = RunFolder(recipe.out)
    folder = run.stage(phase.name, "select")

    def work(*, force: bool, used: Usage | None) -> Kept:
        return select(
            run.stage(phase.name, phase.source),
            recipe.student,
            phase.select,
            out=folder,
            scores=run.stage(phase.name, "score") if phase.is_scored else None,
            seq_len=phase.pack.seq_len,
            mask_prefix=phase.source == "mix" and phase.mix.mask_prefix,
            seed=recipe.seed,
            force=force,
        )

    return Step(phase.name, "select", folder, phase.select, work, defaults={"max_tokens": phase.pack.seq_len})


def _pack(recipe: RecipeConfig, phase: Phase, before: _Before) -> Step:
    from dasd_lite.stages.pack import pack

    run = RunFolder(recipe.out)
    folder = run.stage(phase.name, "pack")

    def work(*, force: bool, used: Usage | None) -> Rows:
        return pack(
            run.stage(phase.name, "select"),
            phase.pack,
            out=folder,
            seed=recipe.seed,
            earlier=before.kept,
            rollouts=run.stage(phase.name, phase.source),
            earlier_rollouts=before.sampled,
            objective=phase.train.objective,
            force=force,
        )

    return Step(phase.name, "pack", folder, phase.pack, work)


def _train(recipe: RecipeConfig, phase: Phase, before: _Before, questions: Questions, max_steps: int | None) -> Step:
    from dasd_lite.stages.train import train

    run = RunFolder(recipe.out)
    folder = run.stage(phase.name, "train")

    def work(*, force: bool, used: Usage | None) -> Model:
        path = phase.evaluate.prompts if phase.train.monitor_questions else None
        return train(
            run.stage(phase.name, "pack"),
            before.start,
            phase.train,
            out=folder,
            seed=recipe.seed,
            adapter=before.adapter,
            prompts=None if path is None else questions.to_evaluate(phase.evaluate, recipe.prompts.system),
            grader=phase.evaluate.grader,
            max_tokens=phase.evaluate.max_tokens,
            max_steps=max_steps,
            trust_remote_code=recipe.student.trust_remote_code,
            force=force,
        )

    return Step(phase.name, "train", folder, phase.train, work)


def _evaluate(recipe: RecipeConfig, phase: Phase, name: str, model: Path, questions: Questions) -> Step:
    from dasd_lite.stages.evaluate import evaluate

    folder = RunFolder(recipe.out).stage(name, "evaluate")

    def work(*, force: bool, used: Usage | None) -> Evaluation:
        return evaluate(
            model,
            questions.to_evaluate(phase.evaluate, recipe.prompts.system),
            phase.evaluate,
            out=folder,
            student=recipe.student,
            seed=recipe.seed,
            force=force,
        )

    return Step(name, "evaluate", folder, phase.evaluate, work)


def _teacher(teacher: Teacher | None) -> Teacher:
    assert teacher is not None, "a recipe whose phases ask a teacher has one"
    return teacher


def _used_elsewhere(recipe: RecipeConfig, step: Step) -> Usage:
    """Return what the run's other stages have asked of the teacher: all of them share one budget."""
    run, usage = RunFolder(recipe.out), Usage()
    for phase in recipe.phase:
        asked = [r.stage(phase.name, phase.source) for r in (run, run.trial)]
        scored = [r.stage(phase.name, "score") / "teacher" for r in (run, run.trial)]
        for folder, of_trial in (asked, scored) if phase.source in ASKING else (scored,):
            if step.path not in (folder, folder.parent):
                counted = read_timing(folder) or read_counts(folder) or read_timing(of_trial)
                usage += Usage(int(counted.get("prompt_tokens", 0)), int(counted.get("completion_tokens", 0)))
    return usage


def _refuse_stale(before: Sequence[Step]) -> None:
    """Refuse to continue from folders that were made with other options than the recipe has now."""
    for step in before:
        if step.finished_at is None:
            continue
        manifest, wanted = read_manifest(step.path), result_options(step.config)
        written, used = manifest["resolved"], manifest["config"]
        changed = []
        for key in sorted(wanted.keys() & used.keys() & written.keys()):
            # A stage fills in None and clamps values above the maximum, so these spellings are equivalent.
            is_open = wanted[key] is None and (written[key] != used[key] or step.defaults.get(key) == used[key])
            if not is_open and wanted[key] not in (written[key], used[key]):
                changed.append(f"{key}: {written[key]} there, {wanted[key]} now")
        if changed:
            raise CheckpointError(
                f"{step.path}: made with another configuration ({'; '.join(changed)}); run {step.stage} and what"
                " follows it with --force, or use another out folder"
            )


def run_steps(
    recipe: RecipeConfig,
    *,
    only_stage: str | None = None,
    only_phase: str | None = None,
    force: bool = False,
    questions: Questions | None = None,
    max_steps: int | None = None,
    announce: Callable[[Step, dict[str, Any] | None], None] = lambda step, manifest: None,
) -> Outcome:
    """Run what is missing, in order.

    Args:
        recipe: The resolved recipe.
        only_stage: Run this stage alone.
        only_phase: Run this phase alone.
        force: Replace folders that were made with other options.
        questions: Prompt files that have been read already.
        max_steps: End every training run after this many optimizer steps.
        announce: Called with each step and None before it runs, and with its manifest afterwards.

    Returns:
        The steps that were asked for, and how many of them ran.

    Raises:
        ConfigError: The recipe has no such step.
        CheckpointError: A folder was made with other options.
    """
    every = plan(recipe, questions, max_steps)
    steps = [step for step in every if only_stage in (None, step.stage) and (only_phase in (None, step.phase))]
    if not steps:
        phases = ", ".join(phase.name for phase in recipe.phase)
        raise ConfigError(
            f"this recipe has no stage {only_stage or 'at all'} in phase {only_phase or 'any'}; its phases are {phases}"
        )
    first = is_first()
    if is_rank() and {step.stage for step in steps} != {"train"}:
        raise ConfigError(
            "torchrun can start only the stage train: torchrun … -m dasd_lite train run.toml --phase NAME"
        )
    ran = 0
    with disk_errors(recipe.out), run_lock(recipe.out) if first else contextlib.nullcontext():
        for step in steps if only_stage is not None else ():
            _refuse_stale([other for other in every[: every.index(step)] if other.phase == step.phase])
        for step in steps:
            before = step.finished_at
            if before is None and first:
                announce(step, None)
            handle = step.work(force=force, used=_used_elsewhere(recipe, step) if step.asks else None)
            if step.finished_at != before and first:
                if not ran:  # only now is it certain that the folder accepts this recipe
                    RunFolder(recipe.out).write_recipe(recipe)
                ran += 1
                announce(step, handle.manifest)
    return Outcome(tuple(steps), ran)
