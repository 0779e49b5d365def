"""What stage functions return: a finished folder under the name of what it holds.

    rollouts = dl.sample(prompts, teacher, out="runs/low/sample")
    rollouts.counts["rollouts"]
    for batch in rollouts.batches(["completion"]): ...

A handle is only its folder, so `Rollouts("runs/low/sample")` opens it again. Opening a folder that is unfinished, or
that another stage wrote, raises DataError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dasd_lite.config.models import Student, Transformers, Vllm
from dasd_lite.data.dataset import batches, read_table
from dasd_lite.data.hub import model_folder
from dasd_lite.data.manifest import read_manifest, read_timing
from dasd_lite.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

PathName = str | PathLike[str]


@dataclass(frozen=True)
class _Handle:
    """A finished dataset folder; see the subclasses."""

    folder: Path

    stages: ClassVar[tuple[str, ...]]
    """Stages that write such a folder."""
    table: ClassVar[str | None]
    """Its main table."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        stage = self.manifest["stage"]
        if stage not in self.stages:
            raise DataError(
                f"{self.folder}: written by {stage}, but {type(self).__name__} needs a folder of"
                f" {' or '.join(self.stages)}"
            )

    @classmethod
    def of(cls, source: Self | PathName) -> Self:
        """Return a handle as it is, and open a path."""
        if isinstance(source, cls):
            return source
        if not isinstance(source, _Handle | str | PathLike):
            raise DataError(f"{cls.__name__} or a folder is needed here, not a {type(source).__name__}")
        return cls(Path(_path_of(source)))

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Schema, configuration, fingerprints of the inputs, counts, shards."""
        return read_manifest(self.folder)

    @property
    def counts(self) -> dict[str, Any]:
        """What the stage counted."""
        return dict(self.manifest["counts"])

    @property
    def timing(self) -> dict[str, float]:
        """Seconds, tokens and costs of the call that finished the folder."""
        return read_timing(self.folder)

    def batches(self, columns: Sequence[str] | None = None, batch_size: int = 128) -> Iterator[pa.RecordBatch]:
        """Stream the table in record batches of `batch_size` rows; memory stays flat."""
        return batches(self.folder, self._table(), columns, batch_size)

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the table into memory."""
        return read_table(self.folder, self._table(), columns)

    def _table(self) -> str:
        if self.table is None:
            raise DataError(f"{self.folder}: a {type(self).__name__} has no table")
        return self.table


def _path_of(source: Any) -> Any:
    """Return the folder of a handle of another kind, so that the error names its stage."""
    return source.folder if isinstance(source, _Handle) else source


@dataclass(frozen=True)
class Rollouts(_Handle):
    """Answers to prompts, with the teacher's log-probabilities where they are known (columns: records.ROLLOUT)."""

    stages = ("sample", "ingest", "mix")
    table = "rollouts"


@dataclass(frozen=True)
class Scores(_Handle):
    """The probabilities of sentences under teacher and student, one row per rollout (columns: records.SCORE)."""

    stages = ("score",)
    table = "scores"


@dataclass(frozen=True)
class Rejected(_Handle):
    """The rollouts that select rejected, with reason and value (columns: records.REJECTED)."""

    stages = ("select",)
    table = "rejected"


@dataclass(frozen=True)
class Kept(_Handle):
    """The rollouts that select kept, as token ids of the student (columns: records.KEPT)."""

    stages = ("select",)
    table = "kept"

    @property
    def rejected(self) -> Rejected:
        """The others, each with the reason and the value behind it."""
        return Rejected(self.folder)


@dataclass(frozen=True)
class Rows(_Handle):
    """Packed training rows (columns: records.ROW)."""

    stages = ("pack",)
    table = "rows"


@dataclass(frozen=True)
class Model(_Handle):
    """A trained student; `path` is the folder that transformers and vLLM load."""

    stages = ("train",)
    table = None

    @property
    def path(self) -> Path:
        """Folder of the merged weights."""
        return self.folder / "model"

    @property
    def adapter(self) -> Path | None:
        """Folder of the LoRA adapter; None after full training."""
        path = self.folder / "adapter"
        return path if path.is_dir() else None


def model_path(model: Model | Student | str | PathLike[str]) -> Path:
    """Return the folder of weights: of a trained model, a table, a folder, or the name of a model on the hub."""
    if isinstance(model, Model):
        return model.path
    if not isinstance(model, Transformers | Vllm | str | PathLike):
        raise ConfigError(
            f"model is a {type(model).__name__}; it must be a Model, a Transformers or Vllm table, a folder, or the"
            " name of a model on the hub"
        )
    return model_folder(model.model if isinstance(model, Transformers | Vllm) else str(model), weights=True)


@dataclass(frozen=True)
class Evaluation(_Handle):
    """Graded answers (columns: records.GRADED)."""

    stages = ("evaluate",)
    table = "graded"

    @property
    def accuracy(self) -> float:
        """Share of answers that are right, 0 to 1."""
        return float(self.counts["accuracy"])

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy, over questions."""
        return float(self.counts["standard_error"])
