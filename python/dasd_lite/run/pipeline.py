"""Phases × stages → an ordered list of steps, and running them.

Input: a resolved recipe. Output: folders, `OUT/PHASE/STAGE`, each closed by its manifest. A phase is
one pass down the chain; its model is what the next phase starts from. A step whose folder is
finished is skipped, so the same call goes on after anything.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasd_lite.config.models import semantic
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.config.train import Lora
from dasd_lite.console import is_first
from dasd_lite.data.files import disk_errors, run_lock, write_atomic
from dasd_lite.data.journal import read_tally
from dasd_lite.data.manifest import read_manifest, read_timing
from dasd_lite.data.usage import Usage
from dasd_lite.errors import CheckpointError, ConfigError

TRIAL = "trial"
"""Folder of a run in which the first prompts go through the whole chain before the rest is paid for."""
ASKING = ("sample", "mix")
"""Stages that ask the teacher."""


@dataclass(frozen=True)
class Step:
    """One stage of one phase: what it reads, what it is told, where it writes."""

    phase: str
    stage: str
    folder: Path
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Phase and stage, as a person names it."""
        return f"{self.phase}/{self.stage}"

    @property
    def finished_at(self) -> int | None:
        """When its folder was closed, in nanoseconds; None while it is not."""
        path = self.folder / "manifest.json"
        return path.stat().st_mtime_ns if path.exists() else None

    def run(self, *, force: bool = False, **more: Any) -> dict[str, Any]:
        """Run the stage, or skip it when its folder holds the same already."""
        stage: Callable[..., dict[str, Any]] = importlib.import_module(f"dasd_lite.stages.{self.stage}").run
        return stage(out=self.folder, force=force, **self.arguments, **more)


def plan(recipe: RecipeConfig) -> list[Step]:
    """Return the steps of a recipe in the order in which they run; reads only where the base model lies."""
    from dasd_lite.data.hub import model_folder

    base = model_folder(recipe.student.model, weights=True)
    steps: list[Step] = []
    if recipe.phase[0].evaluate.prompts is not None:
        steps.append(_evaluate(recipe, recipe.phase[0], "base", base))
    model = base
    kept: Path | None = None  # the answers of the teacher that the phase before trained on
    sampled: Path | None = None  # and where they come from
    start, adapter = base, None  # what the phase before began with, and what it made of it
    for phase in recipe.phase:
        folder = recipe.out / phase.name
        if not (adapter and isinstance(phase.train.method, Lora) and phase.train.method.keeps_adapter):
            start, adapter = model, None
        steps += _phase_steps(recipe, phase, model, kept, sampled, (start, adapter))
        model = folder / "train" / "model"
        adapter = folder / "train" / "adapter" if isinstance(phase.train.method, Lora) else None
        if phase.source != "mix":
            kept, sampled = folder / "select", folder / phase.source
    return steps


def _phase_steps(
    recipe: RecipeConfig,
    phase: Phase,
    model: Path,
    kept: Path | None,
    sampled: Path | None,
    trained_from: tuple[Path, Path | None],
) -> Iterator[Step]:
    folder, seed = recipe.out / phase.name, recipe.seed
    rollouts = folder / phase.source

    def step(stage: str, **arguments: Any) -> Step:
        return Step(phase.name, stage, folder / stage, arguments)

    if phase.source == "sample":
        yield step(
            "sample",
            prompts=recipe.prompts,
            teacher=recipe.teacher,
            config=phase.sample,
            phase=phase.name,
            seed=seed,
            trial=recipe.out / TRIAL / phase.name / "sample",
        )
    elif phase.source == "ingest":
        yield step("ingest", config=phase.ingest, system=recipe.prompts.system)
    else:
        yield step(
            "mix",
            selected=kept,
            model=model,
            student=recipe.student,
            teacher=recipe.teacher,
            config=phase.mix,
            phase=phase.name,
            seed=seed,
            sampled=sampled,
        )
    scores = None
    if phase.is_scored:
        scores = folder / "score"
        reader = recipe.teacher if phase.score.by == "teacher" else None
        yield step("score", rollouts=rollouts, student=recipe.student, config=phase.score, teacher=reader)
    yield step(
        "select",
        rollouts=rollouts,
        scores=scores,
        student=recipe.student.model,
        config=phase.select,
        max_tokens=phase.pack.seq_len,
        mask_prefix=phase.source == "mix" and phase.mix.mask_prefix,
        seed=seed,
    )
    yield step("pack", selected=folder / "select", replay=kept, config=phase.pack, seed=seed)
    yield _train(recipe, phase, *trained_from)
    if phase.evaluate.prompts is not None:
        yield _evaluate(recipe, phase, phase.name, folder / "train" / "model")


def _train(recipe: RecipeConfig, phase: Phase, model: Path, adapter: Path | None) -> Step:
    folder = recipe.out / phase.name
    arguments = {
        "rows": folder / "pack",
        "model": model,
        "adapter": adapter,
        "config": phase.train,
        "seed": recipe.seed,
        "trust_remote_code": recipe.student.trust_remote_code,
        "questions": phase.evaluate.prompts,
        "system": recipe.prompts.system,
        "max_tokens": phase.evaluate.max_tokens,
    }
    return Step(phase.name, "train", folder / "train", arguments)


def _evaluate(recipe: RecipeConfig, phase: Phase, name: str, model: Path) -> Step:
    arguments = {"model": model, "student": recipe.student, "config": phase.evaluate, "seed": recipe.seed}
    return Step(name, "evaluate", recipe.out / name / "evaluate", arguments | {"system": recipe.prompts.system})


def _spent(recipe: RecipeConfig, step: Step) -> Usage:
    """Return what the run's other stages have asked of the teacher: a budget is one for all of them."""
    tally = Usage()
    for phase in recipe.phase:
        folder = recipe.out / phase.name
        asked = [] if phase.source not in ASKING else [folder / phase.source]
        for place in (*asked, folder / "score" / "teacher"):
            if step.folder not in (place, place.parent):
                took = read_timing(place) or read_tally(place)
                took = took or read_timing(recipe.out / TRIAL / place.relative_to(recipe.out))
                tally += Usage(int(took.get("prompt_tokens", 0)), int(took.get("completion_tokens", 0)))
    return tally


def _refuse_stale(before: Sequence[Step]) -> None:
    """Refuse to go on from folders that hold the results of other options than the recipe has now."""
    for step in before:
        if step.finished_at is None:
            continue
        manifest, wanted = read_manifest(step.folder), semantic(step.arguments["config"])
        written, used = manifest["resolved"], manifest["config"]
        changed = []
        for key in sorted(wanted.keys() & used.keys() & written.keys()):
            # What is left open or more than can be, a stage replaces: all ways of writing it are the same.
            is_open = wanted[key] is None and (written[key] != used[key] or step.arguments.get(key) == used[key])
            if not is_open and wanted[key] not in (written[key], used[key]):
                changed.append(f"{key}: {written[key]} there, {wanted[key]} now")
        if changed:
            raise CheckpointError(
                f"{step.folder}: made with another configuration ({'; '.join(changed)}); run {step.stage} and what"
                " follows it with --force, or use another out folder"
            )


def run(
    recipe: RecipeConfig,
    *,
    only_stage: str | None = None,
    only_phase: str | None = None,
    force: bool = False,
    announce: Callable[[Step, dict[str, Any] | None], None] = lambda step, manifest: None,
) -> int:
    """Run what is missing, in order, and return how many steps ran.

    `announce` is told of each step before it runs (with None) and after (with its manifest). With
    `only_stage` or `only_phase` the others are left as they are.
    """
    whole = plan(recipe)
    steps = [step for step in whole if only_stage in (None, step.stage) and (only_phase in (None, step.phase))]
    if not steps:
        phases = ", ".join(phase.name for phase in recipe.phase)
        raise ConfigError(
            f"nothing in this recipe is stage {only_stage or 'any'} of phase {only_phase or 'any'} ({phases})"
        )
    first = is_first()
    if (
        "RANK" in os.environ
        and int(os.environ.get("WORLD_SIZE", "1")) > 1
        and {step.stage for step in steps} != {"train"}
    ):
        raise ConfigError("torchrun starts the stage train alone: torchrun … -m dasd_lite train run.toml --phase NAME")
    ran = 0
    with disk_errors(recipe.out), run_lock(recipe.out) if first else contextlib.nullcontext():
        for step in steps if only_stage is not None else ():
            _refuse_stale([other for other in whole[: whole.index(step)] if other.phase == step.phase])
        for step in steps:
            before = step.finished_at
            if before is None and first:
                announce(step, None)
            asks = step.arguments.get("teacher") is not None
            more = {"spent": _spent(recipe, step)} if asks else {}
            manifest = step.run(force=force, **more)
            if step.finished_at != before and first:
                if not ran:  # only now is it sure that the folder takes this recipe
                    written = json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n"
                    write_atomic(recipe.out / "recipe.json", written)
                ran += 1
                announce(step, manifest)
    return ran
