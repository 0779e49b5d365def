"""A benchmark by its name → its questions.

Input: a name of the table. Output: the questions as they are asked, with their references, and what identifies the
rows: commit and checksum. Invariants: the number of rows is that of the table, and the rows of one commit never change
without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from dasd_lite.data.choices import shuffled, with_order
from dasd_lite.data.formats.containers import KINDS, rows_of
from dasd_lite.data.formats.meaning import Meaning
from dasd_lite.data.formats.row import Fault
from dasd_lite.data.formats.sources import hub_problem, is_of_hub
from dasd_lite.data.records import Prompt
from dasd_lite.data.references import read_choices, read_tests
from dasd_lite.data.tasks.table import BENCHMARKS, Benchmark
from dasd_lite.data.tasks.templates import asked
from dasd_lite.errors import ConfigError, DataError

FOLDER_VARIABLE = "DASD_DATA"
"""Environment variable with a folder in which the files of benchmarks are looked for."""


@dataclass(frozen=True)
class Task:
    """The questions of a benchmark.

    Attributes:
        benchmark: Its row of the table.
        questions: Its questions, the first `limit` of them.
        revision: Commit of the data set; "" if the rows are from a folder.
        checksum: SHA-256 of all rows, of the columns that are read.
        place: The file that was read.
    """

    benchmark: Benchmark
    questions: tuple[Prompt, ...]
    revision: str
    checksum: str
    place: str

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        return self.benchmark.name

    @property
    def hidden(self) -> bool:
        """Whether its text must be shown nowhere."""
        return self.benchmark.hidden


def load_task(
    name: str,
    *,
    folder: str | PathLike[str] | None = None,
    revision: str | None = None,
    limit: int | None = None,
    known: Mapping[str, str] | None = None,
    table: Mapping[str, Benchmark] = BENCHMARKS,
) -> Task:
    """Load a benchmark, from a folder if it has its file, else from the hub or what was downloaded from there.

    Args:
        name: Name of the benchmark.
        folder: Where files are looked for first; None: the folder that `DASD_DATA` names, if it is set.
        revision: Commit, branch or tag of the data set, in place of the table's.
        limit: Only the first questions, up to this number. All rows are checked in any case.
        known: Commit → checksum of the rows that an earlier run has read.
        table: The benchmarks.

    Raises:
        ConfigError: There is no such benchmark.
        DataError: It cannot be had, or its rows are others than they must be.
    """
    if name not in table:
        raise ConfigError(f"task = {name!r}: should be one of {', '.join(table)}")
    benchmark = table[name]
    folder = folder if folder is not None else os.environ.get(FOLDER_VARIABLE) or None
    path = _in_folder(benchmark, Path(folder).expanduser()) if folder is not None else None
    commit, place = "", str(path)
    if path is None:
        path, commit = _from_hub(benchmark, revision or benchmark.revision or None)
        place = f"hf://datasets/{benchmark.repo}@{commit[:12]}/{benchmark.file}"
    rows = list(_rows(benchmark, path, place))
    if len(rows) != benchmark.rows:
        raise DataError(
            f"{name}: {place} has {len(rows):,} rows, but {benchmark.title} has {benchmark.rows:,}; use the file of"
            f" {benchmark.repo} at revision {benchmark.revision or 'main'}"
        )
    checksum = _checksum(benchmark, [row for _, row in rows])
    pinned = {benchmark.revision: benchmark.checksum} if benchmark.checksum else {}
    wanted = {**pinned, **(known or {})}.get(commit, checksum) if commit else checksum
    if checksum != wanted:
        raise DataError(
            f"{name}: {place} has other rows than this commit had before: their checksum is {checksum[:12]}…, not"
            f" {wanted[:12]}…; delete the file from the hub's cache and load it again"
        )
    questions = tuple(_questions(benchmark, rows))
    return Task(benchmark, questions if limit is None else questions[:limit], commit, checksum, place)


# --- files ------------------------------------------------------------------------------------------------


def _in_folder(benchmark: Benchmark, folder: Path) -> Path | None:
    """Return a benchmark's file in a folder of the user's, or None."""
    if not folder.is_dir():
        raise DataError(f"{benchmark.name}: {folder}: no such folder; it is where files of benchmarks are looked for")
    names = [f"{benchmark.name}/{benchmark.file}", f"{benchmark.name}/{Path(benchmark.file).name}"]
    names += [f"{benchmark.repo}/{benchmark.file}", *(f"{benchmark.name}{suffix}" for suffix in KINDS)]
    names += benchmark.files
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _from_hub(benchmark: Benchmark, revision: str | None) -> tuple[Path, str]:
    """Return a benchmark's file in the hub's cache, downloaded if it is not there, and its commit."""
    from huggingface_hub import hf_hub_download

    repo, file = benchmark.repo, benchmark.file
    try:
        path = Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))
    except Exception as error:
        if not is_of_hub(error):
            raise
        if any(each.__name__ == "GatedRepoError" for each in type(error).__mro__):
            raise DataError(
                f"{benchmark.name}: {repo} is gated; accept its terms on its page of the hub, then run `hf auth login`"
                " or set HF_TOKEN"
            ) from error
        at = f" --revision {revision}" if revision else ""
        gated = (
            " (gated: accept its terms on its page of the hub and run `hf auth login` first)" if benchmark.gated else ""
        )
        raise DataError(
            f"{benchmark.name}: {repo}/{file}: {hub_problem(error)}; where there is a network, run `hf download {repo}"
            f" {file} --repo-type dataset{at}`{gated}, or put the file into a folder, as"
            f" {benchmark.name}/{Path(file).name}, and name that: evaluate.tasks_folder, or {FOLDER_VARIABLE}"
        ) from error
    return path, path.parents[file.count("/")].name  # …/snapshots/COMMIT/FILE


def _rows(benchmark: Benchmark, path: Path, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a file, each with its place."""
    try:
        for where, row in rows_of(
            path, place, lambda names: [each for each in names if each in benchmark.read_columns]
        ):
            if isinstance(row, Fault):
                raise DataError(f"{where}: {row}")
            if missing := [column for column in benchmark.read_columns if column not in row]:
                has = ", ".join(benchmark.read_columns)
                raise DataError(f"{where}: has no {', '.join(missing)}; {benchmark.repo} has {has}")
            yield where, row
    except DataError as error:
        raise DataError(f"{benchmark.name}: {error}") from error


def _checksum(benchmark: Benchmark, rows: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of rows: of each the columns that are read, as one line of JSON."""
    checksum = hashlib.sha256()
    for row in rows:
        read = {column: row[column] for column in benchmark.read_columns}
        line = json.dumps(read, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)
        checksum.update(line.encode() + b"\n")
    return checksum.hexdigest()


# --- questions --------------------------------------------------------------------------------------------


def _questions(benchmark: Benchmark, rows: list[tuple[str, dict[str, Any]]]) -> Iterator[Prompt]:
    """Yield the questions as they are asked."""
    reading = benchmark.reading
    if benchmark.options and reading.columns is not None:
        mapped = reading.columns.model_copy(update={"choices": "options", "answer": "right"})
        reading = reading.model_copy(update={"columns": mapped})
    meaning = Meaning(reading, answers=False)
    uids: set[str] = set()
    for number, (where, row) in enumerate(rows):
        read = {column: row[column] for column in benchmark.read_columns}
        if benchmark.options:
            read |= {"options": [row[column] for column in benchmark.options], "right": 0}
        try:
            found = meaning.read(where, read)
        except Fault as fault:
            raise DataError(f"{benchmark.name}: {where}: {fault}") from None
        uid = f"{benchmark.name}/{number if found.uid is None else found.uid}"
        if found.answer is None or uid in uids:
            what = "has no answer" if found.answer is None else f"has the uid of an earlier row, {found.uid}"
            raise DataError(f"{benchmark.name}: {where}: {what}; the file is not that of {benchmark.repo}")
        uids.add(uid)
        prompt = Prompt(uid, tuple(found.messages), benchmark.domain, found.answer, where)
        if benchmark.kind == "choice":  # the right one is not the first; the same order for everybody
            prompt = with_order(prompt, shuffled(read_choices(found.answer), uid, 0, 0))
        function = read_tests(found.answer).function if benchmark.kind == "code" else None
        content = asked(prompt.messages[-1]["content"], benchmark.kind, function)
        yield replace(prompt, messages=({"role": "user", "content": content},))
