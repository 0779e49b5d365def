"""What comes before the first paid token: the probe of the teacher's servers, then 16 prompts through the whole chain.

Input: a recipe. Output: a table of what each server can do, and a trial whose answers the run takes
over, so that nothing is paid for twice. Invariant: a fatal finding, or a stage that fails on the
first prompts, ends the command before the rest is asked.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dasd_lite.config.models import EndpointModel
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.console import out
from dasd_lite.data.files import write_atomic
from dasd_lite.data.prompts import read_prompts
from dasd_lite.data.seeds import digest
from dasd_lite.errors import EndpointError
from dasd_lite.run import pipeline as recipes
from dasd_lite.run.endpoint_check import needs, probe_teacher, teacher_scores
from dasd_lite.run.pipeline import ASKING, TRIAL

if TYPE_CHECKING:
    pass

TRIAL_PROMPTS = 16
_ONE_STEP = {"epochs": 1e-9, "micro_batch_size": 1, "grad_accum_steps": 1, "monitor_questions": 1, "tracker": "none"}
PROBED = "probed"
"""File of a run that says of which servers and needs the probe has told: with others it is made again."""


def before_paying(recipe: RecipeConfig, *, only_stage: str | None = None, only_phase: str | None = None) -> None:
    """Probe the teacher, and send the first prompts through the chain, unless its answers are under way already.

    A single stage or phase gets the probe alone. Raises EndpointError for a fatal finding.
    """
    if recipe.teacher is None or recipe.teacher.kind != "endpoint":
        return
    stages: list[tuple[str, str]] = [(phase.name, phase.source) for phase in recipe.phase if phase.source in ASKING]
    stages += [(phase.name, "score") for phase in recipe.phase if teacher_scores(phase)]
    asking = [
        recipe.out / phase / stage
        for phase, stage in stages
        if only_phase in (None, phase) and only_stage in (None, stage)
    ]
    if all((folder / "manifest.json").exists() for folder in asking):
        return
    begun = any((folder / name).exists() for folder in asking for name in ("manifest.json", "journal.sqlite"))
    mark, wanted = recipe.out / PROBED, _probed(recipe, recipe.teacher)
    if begun and mark.exists() and mark.read_text(encoding="utf-8") == wanted:
        return
    recipes.plan(recipe)  # a student that is not there costs nothing
    faults = probe_teacher(recipe, recipe.teacher)
    if faults:
        raise EndpointError("\n".join(faults))
    recipe.out.mkdir(parents=True, exist_ok=True)
    write_atomic(mark, wanted)
    if begun:
        return
    if only_stage is None and only_phase is None and _num_prompts(recipe) > TRIAL_PROMPTS:
        trial(recipe)


def _probed(recipe: RecipeConfig, teacher: EndpointModel) -> str:
    return digest(repr(needs(recipe)), teacher.base_urls, teacher.model, teacher.tokenizer, teacher.logprobs)


# --- the probe --------------------------------------------------------------------------------------


def _num_prompts(recipe: RecipeConfig) -> int:
    return len(read_prompts(recipe.prompts.path, limit=recipe.prompts.limit)) if recipe.prompts.path else 0


# --- the trial --------------------------------------------------------------------------------------


def trial(recipe: RecipeConfig) -> None:
    """Send the first prompts through every stage.

    Answers of an endpoint are kept for the run in its folder `trial`; everything else goes to a folder that is thrown
    away.
    """
    if recipe.teacher is None or recipe.teacher.kind != "endpoint":
        with tempfile.TemporaryDirectory(prefix="dasd-trial-") as temporary:
            _run_small(recipe, Path(temporary))
        return
    folder = recipe.out / TRIAL
    mark, wanted = folder / "passed", digest(recipe.model_dump(mode="json"))
    if mark.exists() and mark.read_text(encoding="utf-8") == wanted:
        return
    _run_small(recipe, folder)
    for path in folder.glob("*/*"):
        if path.is_dir() and path.name != "sample":
            shutil.rmtree(path)
    write_atomic(mark, wanted)


def _run_small(recipe: RecipeConfig, folder: Path) -> None:
    phases = [_small(phase) for phase in recipe.phase if phase.source != "mix"]
    limit = min(recipe.prompts.limit or TRIAL_PROMPTS, TRIAL_PROMPTS)
    prompts = recipe.prompts.model_copy(update={"limit": limit})
    small = recipe.model_copy(update={"out": folder, "prompts": prompts, "phase": phases})
    recipes.run(small, force=True, announce=lambda step, done: out().print(f"trial: {step.name}") if done else None)


def _small(phase: Phase) -> Phase:
    return phase.model_copy(
        update={
            "ingest": phase.ingest.model_copy(update={"limit": TRIAL_PROMPTS}),
            "train": phase.train.model_copy(update=_ONE_STEP),
            "evaluate": phase.evaluate.model_copy(update={"limit": TRIAL_PROMPTS, "num_samples": 1}),
        }
    )
