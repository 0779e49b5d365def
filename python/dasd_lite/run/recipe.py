"""A whole recipe: what comes before the first paid token, then every step that is missing."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

from dasd_lite.config.load import load_recipe
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.data.run_folder import RunFolder
from dasd_lite.errors import ConfigError
from dasd_lite.run.check import extension_faults
from dasd_lite.run.pipeline import Outcome, Step, run_steps
from dasd_lite.run.questions import Questions
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
    announce: Announce = lambda step, manifest: None,
) -> Outcome:
    """Run what is missing of a resolved recipe, or of one stage or phase."""
    questions = Questions()
    if only_stage is None and (faults := list(extension_faults(recipe))):
        raise ConfigError("\n".join(faults))
    before_paying(recipe, questions, only_stage=only_stage, only_phase=only_phase)
    return run_steps(
        recipe, only_stage=only_stage, only_phase=only_phase, force=force, questions=questions, announce=announce
    )
