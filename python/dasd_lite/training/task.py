"""What one training run is asked to do: a value that is the same in all of its processes.

Input: the arguments of the stage. Output: a `TrainTask`, or its JSON for processes that `launch` starts.
Invariant: `TrainTask.from_json(task.to_json()) == task`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from dasd_lite.config.train import TrainConfig
from dasd_lite.data.manifest import Identity
from dasd_lite.data.records import Prompt


@dataclass(frozen=True)
class TrainTask:
    """One training run.

    Attributes:
        rows: Finished folder of pack.
        model: Folder of the model to start from; its tokenizer goes into the trained model.
        config: The options of the stage.
        out: Folder to write.
        identity: What `out` will hold.
        seed: Seed of the order of rows, of a new adapter and of dropout.
        max_steps: Stop after this many optimizer steps; None: after `config.epochs`.
        force: Replace a folder that holds something else.
        trust_remote_code: Run code that comes with the model.
        context: Longest sequence that the model is served with, by which a longrope has its factors; None: the longest
            that it can read.
        adapter: Adapter of an earlier training run to continue; None: start a new one.
        questions: What the monitor asks the model during training.
        max_answer_tokens: Longest answer to one of them.
        grader: Name of the grader that decides which of these are right.
        import_folders: Folders that extensions are imported from.
    """

    rows: Path
    model: Path
    config: TrainConfig
    out: Path
    identity: Identity
    seed: int = 0
    max_steps: int | None = None
    force: bool = False
    trust_remote_code: bool = False
    context: int | None = None
    adapter: Path | None = None
    questions: tuple[Prompt, ...] = ()
    max_answer_tokens: int = 1024
    grader: str = "auto"
    import_folders: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Write the task for another process."""
        return TypeAdapter(TrainTask).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> TrainTask:
        """Read what `to_json` wrote."""
        return TypeAdapter(cls).validate_json(text)


def remove_checkpoints(out: Path) -> None:
    """Remove the checkpoints of a finished training."""
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
