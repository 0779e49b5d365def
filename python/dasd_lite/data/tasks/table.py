"""The table of benchmarks: `tasks.toml` as objects."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dasd_lite.config.reading import Columns, Reading, parse_path
from dasd_lite.data.formats.layout import paths_of
from dasd_lite.data.formats.presets import PRESETS
from dasd_lite.data.references import Kind

FILE = Path(__file__).with_name("tasks.toml")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark; `tasks.toml` explains the fields."""

    name: str
    title: str
    repo: str
    file: str
    revision: str
    checksum: str
    rows: int
    kind: Kind
    domain: str
    max_tokens: int
    num_samples: int
    license: str
    columns: Mapping[str, Any] | None = None
    format: str = "auto"
    options: tuple[str, ...] = ()
    gated: bool = False
    hidden: bool = False
    files: tuple[str, ...] = ()

    @cached_property
    def reading(self) -> Reading:
        """How its rows are read."""
        columns = Columns.model_validate(self.columns) if self.columns is not None else None
        return Reading(format=self.format, columns=columns)

    @cached_property
    def read_columns(self) -> list[str]:
        """The columns that are read, sorted."""
        mapped = self.reading.columns or PRESETS[self.format].columns
        return sorted({str(parse_path(path)[0]) for path in paths_of(mapped)} | set(self.options))


def read_table(text: str) -> dict[str, Benchmark]:
    """Return the benchmarks that a TOML text lists, by name."""
    return {
        name: Benchmark(
            name, **fields | {"options": tuple(fields.get("options", ())), "files": tuple(fields.get("files", ()))}
        )
        for name, fields in tomllib.loads(text).items()
    }


BENCHMARKS: Mapping[str, Benchmark] = read_table(FILE.read_text(encoding="utf-8"))
