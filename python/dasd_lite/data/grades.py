"""Grades that are known already, so that a kill does not cost those that took hours, nor a folder that has grown.

Input: the folder of an evaluation. Output: the columns of an answer's grade, by a key that says all that decided it.
Invariant: a line that a kill cut off is as if it had not been written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from dasd_lite.data.files import disk_errors, write_atomic

_FILE = "grades.jsonl"


class GradeLog:
    """A file with one grade a line."""

    def __init__(self, folder: Path) -> None:
        """Read the grades in `folder`; those that are unknown may be known on a machine that is less busy."""
        self._folder, self._path = folder, folder / _FILE
        self._file: TextIO | None = None
        self.known: dict[str, dict[str, Any]] = {}
        # Not `splitlines`: an answer may have a line separator of its own.
        for line in self._path.read_text(encoding="utf-8").split("\n") if self._path.exists() else ():
            try:
                entry = json.loads(line)
                if entry["grade"] != "unknown":
                    self.known[entry.pop("key")] = entry
            except (ValueError, KeyError, TypeError):
                continue

    def __enter__(self) -> Self:
        """Open the file behind the grades that are known."""
        with disk_errors(self._folder):
            lines = (json.dumps({"key": key, **grade}, ensure_ascii=False) for key, grade in self.known.items())
            write_atomic(self._path, "".join(f"{line}\n" for line in lines))
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        assert self._file is not None
        self._file.close()

    def add(self, key: str, grade: Mapping[str, Any]) -> None:
        """Write a grade."""
        assert self._file is not None, "used in a with statement"
        self.known[key] = dict(grade)
        with disk_errors(self._folder):
            self._file.write(json.dumps({"key": key, **grade}, ensure_ascii=False) + "\n")
            self._file.flush()
