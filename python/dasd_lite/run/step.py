"""One stage of one phase, and how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dasd_lite.config.models import Table
from dasd_lite.data.handles import Evaluation, Kept, Model, Rollouts, Rows, Scores
from dasd_lite.data.run_folder import StageFolder
from dasd_lite.data.usage import Usage

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
