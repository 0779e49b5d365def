"""A whole recipe: what comes before the first paid token, then every step that is missing."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

from dasd_lite.config.load import load_recipe
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.console import note
from dasd_lite.data.run_folder import RunFolder
from dasd_lite.data.writer import check_place
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.run.check import extension_faults
from dasd_lite.run.existing import orphans, paid_answers_replaced, unknown_runs
from dasd_lite.run.model_check import architecture_faults
from dasd_lite.run.pipeline import Outcome, plan, run_steps
from dasd_lite.run.questions import Questions
from dasd_lite.run.step import Step
from dasd_lite.run.trial import before_paying

Announce = Callable[[Step, dict[str, Any] | None], None]


def run_recipe(path: str | PathLike[str], *overrides: str, force: bool = False) -> RunFolder:
    """Run what is missing of a recipe file. `write_report` reports the results.

    Args:
        path: TOML file of the recipe.
        *overrides: `table.key=value`, as on the command line.
        force: Replace folders that were made with other options.

    Returns:
        The run folder.

    Raises:
        ConfigError: The recipe cannot be run as written; a line for each mistake.
    """
    recipe = load_recipe(path, overrides)
    run_resolved(recipe, force=force)
    return RunFolder(recipe.out)


def run_resolved(
    recipe: RecipeConfig,
    *,
    only_stage: str | None = None,
    only_phase: str | None = None,
    force: bool = False,
    finish: bool = False,
    allow: Callable[[str], bool] | None = None,
    announce: Announce = lambda step, manifest: None,
) -> Outcome:
    """Run what is missing of a resolved recipe, or of one stage or phase.

    Args:
        recipe: The recipe.
        only_stage: Run this stage alone.
        only_phase: Run this phase alone.
        force: Set folders aside that were made with other options.
        finish: The stage sample asks for nothing more and is finished with the answers that it has.
        allow: Called before anything is done if `force` sets answers aside that were paid for, with a line about them;
            returns whether to go on. None: go on.
        announce: As in `run_steps`.

    Raises:
        ConfigError: Code of the user's own that the recipe names cannot be used, or `allow` said no.
    """
    questions = Questions()
    if only_stage is None and (faults := list(extension_faults(recipe))):
        raise ConfigError("\n".join(faults))
    if force and allow is not None:
        steps = [s for s in plan(recipe) if only_stage in (None, s.stage) and only_phase in (None, s.phase)]
        replaced = "; ".join(paid_answers_replaced(recipe, steps, questions))
        if replaced and not allow(f"--force sets aside {replaced}"):
            raise ConfigError(f"nothing was changed; --force would set aside {replaced}; add --yes to agree")
        if replaced:
            note(f"--force sets aside {replaced}")
    if recipe.engine_line:
        note(recipe.engine_line)
    check_place(recipe.out)
    if only_stage is None and _learns(recipe, only_phase) and (faults := list(architecture_faults(recipe))):
        raise ConfigError("\n".join(faults))
    if faults := list(unknown_runs(recipe)):
        raise DataError("\n".join(faults))
    for folder in orphans(recipe) if only_stage is None and only_phase is None else ():
        note(f"{folder}: no phase of this recipe; nothing reads it")
    if not finish:
        before_paying(recipe, questions, only_stage=only_stage, only_phase=only_phase)
    return run_steps(
        recipe,
        only_stage=only_stage,
        only_phase=only_phase,
        force=force,
        questions=questions,
        finish=finish,
        announce=announce,
    )


def _learns(recipe: RecipeConfig, only_phase: str | None) -> bool:
    """Return whether a student is still to be scored or trained."""
    steps = (step for step in plan(recipe) if step.stage in ("score", "train") and only_phase in (None, step.phase))
    return any(not step.is_finished for step in steps)
