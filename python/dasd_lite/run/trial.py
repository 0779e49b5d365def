"""What comes before the first paid token: a probe of the teacher's servers, then a few prompts through the whole chain.

Input: a recipe. Output: a table of what each server can do, and a trial whose answers the run takes over, so that
nothing is paid for twice. Invariant: a fatal finding, or a stage that fails on the first prompts, ends the command
before the other prompts are sent.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from dasd_lite.config.chain import ASKING, TEACHER
from dasd_lite.config.models import Endpoint
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.console import say
from dasd_lite.data.files import make_folder, write_atomic
from dasd_lite.data.run_folder import RunFolder, StageFolder
from dasd_lite.data.seeds import digest
from dasd_lite.data.writer import JOURNAL_FILE
from dasd_lite.errors import EndpointError
from dasd_lite.grading.temperatures import by_temperature, teacher_lines
from dasd_lite.run.endpoint_check import probe_teacher, requirements_of
from dasd_lite.run.existing import is_answered
from dasd_lite.run.pipeline import plan, run_steps
from dasd_lite.run.questions import Questions
from dasd_lite.run.step import Step

_TASK_QUESTIONS = 2  # of each benchmark, whose answers are long
_ONE_ROW = {"micro_batch_size": 1, "grad_accum_steps": 1, "monitor_questions": 1, "tracker": "none"}


def before_paying(
    recipe: RecipeConfig,
    questions: Questions,
    *,
    only_stage: str | None = None,
    only_phase: str | None = None,
) -> None:
    """Probe the teacher's servers, then run the trial, unless sampling has begun already.

    A single stage or phase gets only the probe.

    Raises:
        EndpointError: The probe has fatal findings.
    """
    teacher = recipe.teacher
    if not isinstance(teacher, Endpoint):
        return
    run = RunFolder(recipe.out)
    stages: list[tuple[str, str]] = [(phase.name, phase.source) for phase in recipe.phase if phase.source in ASKING]
    stages += [(phase.name, "score") for phase in recipe.phase if phase.is_scored_by_teacher]
    stages += [(TEACHER, "evaluate")] if any(phase.evaluate.teacher for phase in recipe.phase) else []
    asking = [
        StageFolder(phase, stage, run.stage(phase, stage))
        for phase, stage in stages
        if only_phase in (None, phase) and only_stage in (None, stage)
    ]
    if all(is_answered(recipe, stage, questions) for stage in asking):
        return
    has_begun = any(stage.is_finished or (stage.path / JOURNAL_FILE).exists() for stage in asking)
    probed = _probed(recipe.phase, teacher)
    if has_begun and run.probed.exists() and run.probed.read_text(encoding="utf-8") == probed:
        return
    plan(recipe)  # raises for a missing student, before anything is paid
    prompts = questions.to_sample(recipe) if recipe.prompts.path is not None else None
    faults = probe_teacher(teacher, recipe.phase, prompts)
    if faults:
        raise EndpointError("\n".join(faults))
    make_folder(recipe.out)
    write_atomic(run.probed, probed)
    if has_begun or only_stage is not None or only_phase is not None:
        return
    if prompts is not None and len(prompts) > recipe.prompts.trial:
        run_trial(recipe, questions)


def _probed(phases: list[Phase], teacher: Endpoint) -> str:
    """Return a hash of what a probe depends on; if it changes, the probe is repeated."""
    requirements = repr(requirements_of(phases))
    return digest(requirements, teacher.base_urls, teacher.model, teacher.tokenizer, teacher.logprobs)


def run_trial(recipe: RecipeConfig, questions: Questions) -> None:
    """Send the first prompts through every stage.

    Answers of an endpoint are kept for the run, in its folder `trial`; everything else is deleted.
    """
    if not isinstance(recipe.teacher, Endpoint):
        with tempfile.TemporaryDirectory(prefix="dasd-trial-") as temporary:
            _run_small(recipe, questions, Path(temporary))
        return
    folder = RunFolder(recipe.out).trial.path
    passed, fingerprint = folder / "passed", digest(recipe.model_dump(mode="json"))
    if passed.exists() and passed.read_text(encoding="utf-8") == fingerprint:
        return
    _run_small(recipe, questions, folder)
    for path in folder.glob("*/*"):
        if path.is_dir() and not path.name.startswith("sample"):
            shutil.rmtree(path)
    write_atomic(passed, fingerprint)


def _run_small(recipe: RecipeConfig, questions: Questions, folder: Path) -> None:
    number = recipe.prompts.trial
    phases = [_small(phase, number) for phase in recipe.phase if phase.source not in ("mix", "replay")]
    if not phases:
        return
    limit = min(recipe.prompts.limit or number, number)
    prompts = recipe.prompts.model_copy(update={"limit": limit})
    small = recipe.model_copy(update={"out": folder, "prompts": prompts, "phase": phases})

    def announce(step: Step, manifest: object) -> None:
        if manifest is not None:
            say(f"trial: {step.name}")

    run_steps(small, force=True, questions=questions, max_steps=1, announce=announce)
    run = RunFolder(folder)
    sampled = [(p.sample.temperature, run.stage(p.name, "select")) for p in phases if p.source == "sample"]
    for line in teacher_lines(by_temperature(sampled)):
        say(line)


def _small(phase: Phase, number: int) -> Phase:
    few = {"limit": _TASK_QUESTIONS, "num_samples": 1}
    tasks = [task.model_copy(update=few) for task in phase.evaluate.task_configs]
    evaluate = {"limit": number, "num_samples": 1, "tasks": tasks, "teacher": False}
    return phase.model_copy(
        update={
            "ingest": phase.ingest.model_copy(update={"limit": number}),
            "pack": phase.pack.model_copy(update={"replay": 0.0, "replay_answers": None}),
            "train": phase.train.model_copy(update=_ONE_ROW),
            "evaluate": phase.evaluate.model_copy(update=evaluate),
        }
    )
