"""What lies in the run folder already, held against the recipe: what is kept, what is in the way, what nobody reads.

Input: the steps of a recipe. Output: lines for people. Nothing is changed and no model is opened.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dasd_lite.config.chain import ASKING, BASE, REUSED, STAGES, TEACHER
from dasd_lite.config.models import CustomTeacher, Endpoint, Prices, result_options
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.costs.estimate import format_bytes
from dasd_lite.data.files import run_lock
from dasd_lite.data.journal import read_counts, stored_keys
from dasd_lite.data.manifest import read_manifest, read_state, read_timing, state_file
from dasd_lite.data.records import GRADED, ROLLOUT, TEACHER_TOKENS
from dasd_lite.data.run_folder import RunFolder, StageFolder
from dasd_lite.data.usage import Usage
from dasd_lite.data.writer import check_place, refuse_foreign
from dasd_lite.errors import CheckpointError
from dasd_lite.inference.backends import model_name
from dasd_lite.run.questions import Questions
from dasd_lite.run.step import Step
from dasd_lite.stages import evaluate, mix, sample

_GROWS = {"sample": sample.GROWS, "mix": mix.GROWS, "evaluate": evaluate.GROWS, "ingest": ("config.paths",)}
"""What may change in each stage without --force."""


def changed_options(step: Step, recipe: RecipeConfig) -> list[str]:
    """List what the folder of a step was made with and that the recipe has otherwise now.

    It compares options, the seed and the name of the teacher, but no weights, which may take minutes to read.
    """
    file = state_file(step.path)
    if file is None:
        return []
    state, wanted = read_state(file), result_options(step.config)
    written, used = state.get("resolved", {}), state["config"]
    grows = {key.removeprefix("config.") for key in _GROWS.get(step.stage, ())}
    changed = []
    for key in sorted((wanted.keys() & used.keys() & written.keys()) - grows):
        # A stage fills in None and clamps values above the maximum, so these spellings are equivalent.
        is_open = wanted[key] is None and (written[key] != used[key] or step.defaults.get(key) == used[key])
        if not is_open and wanted[key] not in (written[key], used[key]):
            changed.append(f"{key}: {written[key]} there, {wanted[key]} now")
    seed = used.get("seed", recipe.seed)
    changed += [f"seed: {seed} there, {recipe.seed} now"] if seed != recipe.seed else []
    if step.asks and recipe.teacher is not None:
        before, now = state.get("names", {}).get("teacher"), model_name(recipe.teacher)
        changed += [f"teacher: {before} there, {now} now"] if before not in (None, now) else []
    return changed


def refuse_stale(before: Sequence[Step], recipe: RecipeConfig) -> None:
    """Refuse to continue from folders that were made with other options than the recipe has now.

    Raises:
        CheckpointError: Names the folder and what differs.
    """
    for step in before:
        if step.is_finished and (changed := changed_options(step, recipe)):
            raise CheckpointError(
                f"{step.path}: made with another configuration ({'; '.join(changed)}); run {step.stage} and what"
                " follows it with --force, or use another out folder"
            )


def in_the_way(steps: Sequence[Step], recipe: RecipeConfig) -> Iterator[str]:
    """Name the first folder of each phase that `run` would refuse."""
    phases = set()
    check_place(recipe.out)
    for step in steps:
        if (
            state_file(step.path) is None
            and step.path.is_dir()
            and any(p.suffix != ".tmp" for p in step.path.iterdir())
        ):
            yield f"{step.path}: has files that dasd-lite did not write; remove them or choose another out folder"
        if step.phase not in phases and (changed := changed_options(step, recipe)):
            phases.add(step.phase)
            yield (
                f"{step.path}: made with another configuration ({'; '.join(changed)}); use another out folder or"
                " --force, which sets it aside"
            )


def answers_there(recipe: RecipeConfig, steps: Sequence[Step], questions: Questions) -> Iterator[str]:
    """Say of each folder of answers how many of those that are asked for are there."""
    for step in steps:
        if step.stage == "sample" and recipe.teacher is not None:
            phase = next(phase for phase in recipe.phase if phase.name == step.phase)
            runs = (recipe.out, *recipe.reuse)
            if not (folders := [folder for run in runs for folder in RunFolder(run).stages("sample")]):
                continue
            prompts = questions.to_sample(recipe)
            identity = sample.sample_identity(prompts, recipe.teacher, phase.sample, recipe.seed)
            there = {
                key for folder in folders for key in stored_keys(folder, "rollouts", ROLLOUT, phase.sample.max_tokens)
            }
            total = len(prompts) * phase.sample.num_samples
            missing = sample.missing_answers(prompts, identity, phase.sample.num_samples, there)
            asked = f"{missing:,} will be asked for"
            if not there and step.state == "not started":
                continue
            if step.is_finished and read_manifest(step.path).get("closed_from") == identity.fingerprint:
                asked = f"{missing:,} stay missing until `dasd-lite sample` asks for them"
            yield f"{step.path}: {total - missing:,} of {total:,} answers are there, {asked}"


def is_answered(recipe: RecipeConfig, stage: StageFolder, questions: Questions) -> bool:
    """Return whether a folder that asks the teacher is finished, and holds all that the recipe asks for now."""
    if not stage.is_finished or stage.stage != "sample" or recipe.teacher is None:
        return stage.is_finished
    phase = next(phase for phase in recipe.phase if phase.name == stage.phase)
    identity = sample.sample_identity(questions.to_sample(recipe), recipe.teacher, phase.sample, recipe.seed)
    manifest = read_state(stage.path / "manifest.json")
    return identity.fingerprint in (manifest["fingerprint"], manifest.get("closed_from"))


def unknown_runs(recipe: RecipeConfig) -> Iterator[str]:
    """Name folders to reuse that hold nothing to reuse."""
    for run in recipe.reuse:
        if not any(RunFolder(run).stages(stage) for stage in REUSED):
            yield f"reuse = {run}: holds no answers or scores of a run; name the `out` folder of one"


def orphans(recipe: RecipeConfig) -> list[str]:
    """Name the folders of phases that the recipe no longer has."""
    known = {phase.name for phase in recipe.phase} | {BASE, TEACHER, "trial", "report"}
    folders = (path for path in recipe.out.iterdir() if path.is_dir()) if recipe.out.is_dir() else ()
    return sorted(
        str(folder)
        for folder in folders
        if folder.name not in known and any(state_file(folder / stage) is not None for stage in STAGES)
    )


def paid_answers_replaced(recipe: RecipeConfig, steps: Sequence[Step], questions: Questions) -> Iterator[str]:
    """Name folders of answers that cost money and that --force would set aside, with what they cost."""
    if not isinstance(recipe.teacher, Endpoint | CustomTeacher):
        return
    prices = recipe.teacher.prices if isinstance(recipe.teacher, Endpoint) else None
    for step in steps:
        if step.asks and is_replaced(recipe, step, questions):
            yield f"{step.path} ({answers_and_cost(step.path, prices)})"


def is_replaced(recipe: RecipeConfig, step: Step, questions: Questions) -> bool:
    """Return whether a folder of answers would be set aside, and not only grow."""
    file = state_file(step.path)
    if step.stage != "sample" or recipe.teacher is None or file is None:
        return bool(changed_options(step, recipe))
    phase = next(phase for phase in recipe.phase if phase.name == step.phase)
    identity = sample.sample_identity(questions.to_sample(recipe), recipe.teacher, phase.sample, recipe.seed)
    return not identity.changed(read_state(file)) <= identity.grows


def answers_and_cost(folder: Path, prices: Prices | None = None) -> str:
    """Return how many answers a folder holds, and what they cost if that is known."""
    part, table, schema = (folder, "rollouts", ROLLOUT)
    if folder.name.partition(".")[0] == "evaluate":
        table, schema = "graded", GRADED
    if folder.name.partition(".")[0] == "score":
        part, table, schema = folder / "teacher", "readings", TEACHER_TOKENS
    number = len(stored_keys(part, table, schema, None))
    counted = read_counts(part) or read_timing(part)
    used = Usage(int(counted.get("prompt_tokens", 0)), int(counted.get("completion_tokens", 0)))
    cost = used.cost(prices) if prices is not None else counted.get("cost")
    return f"{number:,} answers, {f'{cost:,.2f} paid' if cost is not None else f'{used.tokens:,} tokens'}"


def _is_paid(folder: Path) -> bool:
    """Return whether the teacher's answers are in a folder."""
    stage = folder.name.partition(".")[0]
    return stage in ASKING or (stage == "evaluate" and folder.parent.name == TEACHER)


def replaced_folders(run: Path) -> dict[Path, str]:
    """Return the folders of a run that were set aside, or that a killed trial left, each with a line about it.

    Raises:
        DataError: `run` holds no run.
    """
    RunFolder(run).recipe()
    names = (f"{place}/{stage}.replaced-*" for place in ("*", "trial/*") for stage in STAGES)
    found = sorted(path for name in names for path in run.glob(name) if state_file(path) is not None)
    return {
        folder: f"{folder}: {format_bytes(folder_bytes(folder))}"
        + (f", {answers_and_cost(folder)}" if _is_paid(folder) else "")
        for folder in (*found, *RunFolder(run).export_trials)
    }


def folder_bytes(folder: Path) -> int:
    """Return the size of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove_replaced(run: Path, folders: Iterable[Path]) -> None:
    """Remove folders that were set aside or left behind.

    Raises:
        DataError: Another process is at work in the run, or a folder holds a file that no stage wrote.
    """
    with run_lock(run):
        for folder in folders:
            refuse_foreign(folder)
            shutil.rmtree(folder)
