"""The folder of a run: OUT/PHASE/STAGE, and what lies beside it. The only place that knows these names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasd_lite.config.engine import RECIPE_FILE
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.data.files import write_atomic
from dasd_lite.errors import DataError

TEACHER = "teacher"
"""Stands for a phase where the teacher is evaluated."""


def export_trial(out: Path) -> Path:
    """Return where training for the folder `out` saves the untouched model for a moment, before the first step."""
    return out.with_name(f".{out.name}.export")


@dataclass(frozen=True)
class StageFolder:
    """One stage of one phase, finished or not."""

    phase: str
    stage: str
    path: Path

    @property
    def name(self) -> str:
        """`PHASE/STAGE`, as people call it."""
        return f"{self.phase}/{self.stage}"

    @classmethod
    def at(cls, path: Path) -> StageFolder:
        """Return the stage whose folder is `path`."""
        path = path if path.name not in ("", "..") else path.resolve()
        return cls(path.parent.name, path.name, path)

    @property
    def finished_at(self) -> int | None:
        """When its manifest was written, in nanoseconds; None while it is not."""
        manifest = self.path / "manifest.json"
        return manifest.stat().st_mtime_ns if manifest.exists() else None

    @property
    def is_finished(self) -> bool:
        """Whether its manifest has been written."""
        return self.finished_at is not None

    @property
    def state(self) -> str:
        """Finished, unfinished, or not started."""
        if self.is_finished:
            return "finished"
        return "unfinished" if self.path.is_dir() and any(self.path.iterdir()) else "not started"

    @property
    def parts(self) -> tuple[Path, ...]:
        """Dataset folders of the stage: its own, and where two models work in turn, that of the first inside it."""
        first = {"mix": "student", "score": "teacher"}.get(self.stage)
        return (self.path,) if first is None else (self.path, self.path / first)

    def sibling(self, stage: str) -> StageFolder:
        """Return another stage of the same phase."""
        return StageFolder(self.phase, stage, self.path.parent / stage)


@dataclass(frozen=True)
class RunFolder:
    """The results of one recipe."""

    path: Path

    def __post_init__(self) -> None:
        """Take text as a path."""
        object.__setattr__(self, "path", Path(self.path))

    def __fspath__(self) -> str:
        """Let it stand for its path."""
        return str(self.path)

    @classmethod
    def containing(cls, path: Path) -> RunFolder | None:
        """Return the run folder that `path` lies in; None if no folder above it holds a recipe."""
        runs = (cls(parent) for parent in path.resolve().parents)
        return next((run for run in runs if run.recipe_file.exists()), None)

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    @property
    def trial(self) -> RunFolder:
        """A small run inside this one: the first prompts, sent through the whole chain before the rest is paid for."""
        return RunFolder(self.path / "trial")

    @property
    def probed(self) -> Path:
        """File that records which servers and needs were probed."""
        return self.path / "probed"

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe of the run."""
        return self.path / RECIPE_FILE

    def stages(self, stage: str) -> list[Path]:
        """Return the folders of a stage in all phases, those of the trial and those that were set aside included."""
        names = [f"{place}/{stage}{aside}" for place in ("*", "trial/*") for aside in ("", ".replaced-*")]
        return sorted(folder for name in names for folder in self.path.glob(name) if folder.is_dir())

    def stage(self, phase: str, stage: str) -> Path:
        """Return the folder of a stage of a phase; `base` stands for the student before training."""
        return self.path / phase / stage

    def model(self, phase: str) -> Path:
        """Return the folder of the model that a phase trained."""
        return self.stage(phase, "train") / "model"

    def adapter(self, phase: str) -> Path:
        """Return the folder of the adapter that a phase trained, if its method has one."""
        return self.stage(phase, "train") / "adapter"

    @property
    def export_trials(self) -> list[Path]:
        """What the trials of an export wrote and a kill left behind."""
        folders = (self.path.glob(f"{place}/{export_trial(Path('train')).name}") for place in ("*", "trial/*"))
        return sorted(folder for found in folders for folder in found if folder.is_dir())

    def write_recipe(self, recipe: RecipeConfig) -> None:
        """Keep the resolved recipe beside the results."""
        write_atomic(self.recipe_file, json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n")

    def recipe(self) -> dict[str, Any]:
        """Read the resolved recipe.

        Raises:
            DataError: The folder holds no run, or the file is damaged.
        """
        try:
            recipe = json.loads(self.recipe_file.read_text(encoding="utf-8"))
            phases = [phase["name"] for phase in recipe["phase"]]
        except FileNotFoundError:
            raise DataError(
                f"{self.path}: holds no run (no {RECIPE_FILE}); name the `out` folder of a recipe"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.recipe_file}: damaged ({type(error).__name__}: {error}); `dasd-lite run` writes it again"
            ) from None
        if not phases:
            raise DataError(f"{self.recipe_file}: names no phase; `dasd-lite run` writes it again")
        return dict(recipe)
