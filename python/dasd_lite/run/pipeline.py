"""Phases and stages as an ordered list of steps, and running them.

Input: a resolved recipe. Output: the stage folders of its run. A phase is one pass down the chain; the next
phase starts from its model. A step whose folder is finished is skipped, so the same call resumes after anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasd_lite.config.chain import ASKING, BASE, SOURCES, TEACHER
from dasd_lite.config.models import CustomTeacher, Endpoint, Teacher
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.config.train import Lora
from dasd_lite.console import is_first, is_rank
from dasd_lite.data.files import disk_errors, run_lock
from dasd_lite.data.handles import Evaluation, Kept, Model, Rollouts, Rows, Scores
from dasd_lite.data.hub import model_folder
from dasd_lite.data.journal import read_counts
from dasd_lite.data.manifest import read_timing
from dasd_lite.data.run_folder import RunFolder, StageFolder
from dasd_lite.data.usage import Usage
from dasd_lite.errors import ConfigError
from dasd_lite.run.existing import is_replaced, refuse_stale
from dasd_lite.run.questions import Questions
from dasd_lite.run.step import Step


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


def plan(
    recipe: RecipeConfig,
    questions: Questions | None = None,
    max_steps: int | None = None,
    *,
    finish: bool = False,
    reopen: bool = False,
) -> list[Step]:
    """Return the steps of a recipe in the order in which they run; downloads the student if it is not here.

    `max_steps` ends every training run early, for a trial. `finish` and `reopen` are those of the stage sample.
    """
    questions = questions or Questions()
    base, out = model_folder(recipe.student.model, weights=True), RunFolder(recipe.out)
    steps: list[Step] = []
    first = recipe.phase[0]
    if (ceiling := next((phase for phase in recipe.phase if phase.evaluate.teacher), None)) is not None:
        steps.append(_evaluate(recipe, ceiling, TEACHER, _teacher(recipe.teacher), questions))
    if first.evaluate.has_questions:
        steps.append(_evaluate(recipe, first, BASE, base, questions))
    before = _Before(base, base)
    for phase in recipe.phase:
        method = phase.train.method
        if not (before.adapter and isinstance(method, Lora) and method.keeps_adapter):
            before = _Before(before.model, before.model, None, before.kept, before.sampled)
        steps += _phase_steps(recipe, phase, before, questions, max_steps, finish=finish, reopen=reopen)
        kept, sampled = before.kept, before.sampled
        if phase.source not in ("mix", "replay"):
            kept, sampled = out.stage(phase.name, "select"), out.stage(phase.name, phase.source)
        adapter = out.adapter(phase.name) if isinstance(method, Lora) else None
        before = _Before(out.model(phase.name), before.start, adapter, kept, sampled)
    return steps


def _phase_steps(
    recipe: RecipeConfig,
    phase: Phase,
    before: _Before,
    questions: Questions,
    max_steps: int | None,
    *,
    finish: bool,
    reopen: bool,
) -> Iterator[Step]:
    """Yield one step for each stage of a phase, in the order of the chain."""
    for stage in phase.stages:
        match stage:
            case "sample":
                yield _sample(recipe, phase, questions, finish=finish, reopen=reopen)
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


def _sample(recipe: RecipeConfig, phase: Phase, questions: Questions, *, finish: bool, reopen: bool) -> Step:
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
            reuse=_reuse(recipe, "sample"),
            trial=run.trial.stage(phase.name, "sample"),
            used=used,
            finish=finish,
            reopen=reopen,
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
            grader=phase.evaluate.grader,
            sampled=before.sampled,
            reuse=_reuse(recipe, "mix"),
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
        return score(
            rollouts,
            recipe.student,
            phase.score,
            out=folder,
            teacher=teacher,
            student_alone=phase.is_scored_by_student_alone,
            used=used,
            reuse=_reuse(recipe, "score"),
            force=force,
        )

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
            phase=phase.name,
            grader=phase.evaluate.grader,
            force=force,
        )

    return Step(phase.name, "select", folder, phase.select, work, defaults={"max_tokens": phase.pack.seq_len})


def _pack(recipe: RecipeConfig, phase: Phase, before: _Before) -> Step:
    from dasd_lite.stages.pack import pack

    run = RunFolder(recipe.out)
    folder = run.stage(phase.name, "pack")

    def work(*, force: bool, used: Usage | None) -> Rows:
        replays_only = phase.source == "replay"
        earlier, earlier_rollouts = _replayed(recipe, phase, before) if phase.replays else (None, None)
        return pack(
            None if replays_only else run.stage(phase.name, "select"),
            phase.pack,
            out=folder,
            seed=recipe.seed,
            earlier=earlier,
            rollouts=None if replays_only else run.stage(phase.name, phase.source),
            earlier_rollouts=earlier_rollouts,
            objective=phase.train.objective,
            force=force,
        )

    return Step(phase.name, "pack", folder, phase.pack, work)


def _replayed(recipe: RecipeConfig, phase: Phase, before: _Before) -> tuple[Path | None, Path | None]:
    """Return the folder of select whose answers a phase trains on again, and the rollouts that it selected from."""
    run, wanted = RunFolder(recipe.out), phase.pack.replay_from
    if wanted is None:
        return before.kept, before.sampled
    if (earlier := recipe.replayed_phase(phase)) is not None:
        return run.stage(earlier.name, "select"), run.stage(earlier.name, earlier.source)
    beside = (StageFolder.at(wanted).sibling(source) for source in SOURCES)
    return wanted, next((rollouts.path for rollouts in beside if rollouts.is_finished), None)


def _train(recipe: RecipeConfig, phase: Phase, before: _Before, questions: Questions, max_steps: int | None) -> Step:
    from dasd_lite.stages.train import train

    run = RunFolder(recipe.out)
    folder, system = run.stage(phase.name, "train"), recipe.prompts.system

    def work(*, force: bool, used: Usage | None) -> Model:
        return train(
            run.stage(phase.name, "pack"),
            before.start,
            phase.train,
            out=folder,
            seed=recipe.seed,
            adapter=before.adapter,
            prompts=questions.to_evaluate(phase.evaluate, system) if phase.train.monitor_questions else None,
            grader=phase.evaluate.grader,
            max_tokens=phase.evaluate.own_max_tokens,
            max_steps=max_steps,
            context=recipe.student.max_model_len,
            trust_remote_code=recipe.student.trust_remote_code,
            force=force,
        )

    return Step(phase.name, "train", folder, phase.train, work)


def _evaluate(recipe: RecipeConfig, phase: Phase, name: str, model: Path | Teacher, questions: Questions) -> Step:
    from dasd_lite.stages.evaluate import evaluate

    folder, config = RunFolder(recipe.out).stage(name, "evaluate"), phase.evaluate
    if config.four_bit and not isinstance(model, Path):
        config = config.model_copy(update={"four_bit": False})  # of the student

    def work(*, force: bool, used: Usage | None) -> Evaluation:
        return evaluate(
            model,
            questions.to_evaluate(phase.evaluate, recipe.prompts.system),
            config,
            out=folder,
            student=recipe.student if isinstance(model, Path) else None,
            seed=recipe.seed,
            reuse=_reuse(recipe, "evaluate"),
            used=used,
            force=force,
        )

    return Step(name, "evaluate", folder, config, work, asks=isinstance(model, Endpoint | CustomTeacher))


def _teacher(teacher: Teacher | None) -> Teacher:
    assert teacher is not None, "a recipe whose phases ask a teacher has one"
    return teacher


def _reuse(recipe: RecipeConfig, stage: str) -> list[Path]:
    """Return where a stage may find rows that it need not make: in other phases, and in the runs to reuse."""
    return [folder for run in (recipe.out, *recipe.reuse) for folder in RunFolder(run).stages(stage)]


def _used_elsewhere(recipe: RecipeConfig, step: Step, *, replaced: bool) -> Usage:
    """Return what the run's other folders have asked of the teacher, those that were set aside included: one budget.

    With `replaced`, the folder of the step itself is about to be set aside.
    """
    run, usage = RunFolder(recipe.out), Usage()
    asked = {stage: run.stages(stage) for stage in (*ASKING, "score")}
    asked["evaluate"] = [folder for folder in run.stages("evaluate") if folder.parent.name == TEACHER]
    for stage, folders in asked.items():
        for folder in folders:
            taken_over = run.stage(folder.parent.name, stage) if run.trial.path in folder.parents else None
            if (folder == step.path and not replaced) or (
                taken_over is not None and (taken_over == step.path or taken_over.exists())
            ):
                continue
            part = folder / "teacher" if stage == "score" else folder
            counted = read_counts(part) or read_timing(part)
            usage += Usage(int(counted.get("prompt_tokens", 0)), int(counted.get("completion_tokens", 0)))
    return usage


def run_steps(
    recipe: RecipeConfig,
    *,
    only_stage: str | None = None,
    only_phase: str | None = None,
    force: bool = False,
    questions: Questions | None = None,
    max_steps: int | None = None,
    finish: bool = False,
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
        finish: Finish the stage sample with the answers that it has.
        announce: Called with each step and None before it runs, and with its manifest afterwards.

    Returns:
        The steps that were asked for, and how many of them ran.

    Raises:
        ConfigError: The recipe has no such step.
        CheckpointError: A folder was made with other options.
    """
    reopen = only_stage == "sample" and not finish
    every = plan(recipe, questions, max_steps, finish=finish, reopen=reopen)
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
            refuse_stale([other for other in every[: every.index(step)] if other.phase == step.phase], recipe)
        for step in steps:
            before = step.finished_at
            if before is None and first:
                announce(step, None)
            used = None
            if step.asks:
                replaced = force and is_replaced(recipe, step, questions or Questions())
                used = _used_elsewhere(recipe, step, replaced=replaced)
            handle = step.work(force=force, used=used)
            if step.finished_at != before and first:
                if not ran:  # only now is it certain that the folder accepts this recipe
                    RunFolder(recipe.out).write_recipe(recipe)
                ran += 1
                announce(step, handle.manifest)
    return Outcome(tuple(steps), ran)
