"""Take existing answers as rollouts: your own files, or a published data set.

Input: files of many formats (docs/data.md) with questions and answers. Output: the same rollouts that sample writes,
without log-probabilities.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import pyarrow as pa

from dasd_lite.config.models import result_options
from dasd_lite.config.options import with_options
from dasd_lite.config.stages import IngestConfig
from dasd_lite.console import Progress, label, note, progress
from dasd_lite.data.formats.read import RowFiles
from dasd_lite.data.formats.row import Answer, Fault
from dasd_lite.data.handles import Rollouts
from dasd_lite.data.manifest import identify
from dasd_lite.data.prompts import to_prompt
from dasd_lite.data.records import ROLLOUT, Prompt
from dasd_lite.data.writer import ShardWriter, is_finished
from dasd_lite.errors import DataError

VERSION = 2
_BATCH = 256


def ingest(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    config: IngestConfig | None = None,
    *,
    out: str | PathLike[str],
    system: str | None = None,
    force: bool = False,
    **options: Any,
) -> Rollouts:
    """Take existing answers as rollouts.

    Args:
        paths: Files of rows with prompt and answer, folders, patterns, or places on the hub; None: `config.paths`.
        config: Options of the stage.
        out: Folder to write.
        system: System message for prompts that have none.
        force: Replace a folder that was made with other options.
        **options: Fields of IngestConfig, in place of those of `config`.

    Returns:
        The rollouts, one for each answer, without log-probabilities. An answer that occurs twice counts once.

    Raises:
        ConfigError: A wrong option.
        DataError: A file that is missing, or rows that cannot be read, each with file and line.
        CheckpointError: `out` was made with other options.
    """
    if paths is not None:
        options["paths"] = [fspath(p) for p in ([paths] if isinstance(paths, str | PathLike) else paths)]
    config, out = with_options(IngestConfig, config, options, "ingest"), Path(out)
    if not config.paths:
        raise DataError("ingest.paths is not set; name files of rows with prompt and answer")
    try:
        files = RowFiles(config.paths, config, answers=True, system=system)
    except DataError as error:
        raise DataError("\n".join(f"ingest.paths: {line}" for line in str(error).splitlines())) from error
    asked = {key: value for key, value in result_options(config).items() if key != "paths"} | {"system": system}
    inputs = {f"paths.{i}": source.fingerprint for i, source in enumerate(files.sources)}
    identity = identify("ingest", VERSION, asked, inputs)
    if is_finished(out, identity, force=force):
        return Rollouts(out)

    seen = _Seen()
    rows: list[dict[str, Any]] = []
    with (
        ShardWriter(out, identity, {"rollouts": ROLLOUT}, config) as writer,
        progress(
            label(out.parent.name, "ingest"), len(files.files), "files", status=lambda: f"{files.num_rows:,} rows"
        ) as bar,
    ):
        for prompt, answer, uid in _answers(files, bar):
            try:
                rollout = seen.add(prompt, answer, uid)
            except Fault as fault:
                files.fault(prompt.where, str(fault))
                continue
            if rollout is not None:
                rows.append(rollout)
            if len(rows) == _BATCH:
                writer.write("rollouts", pa.RecordBatch.from_pylist(rows, schema=ROLLOUT))
                rows.clear()
            if len(seen) == config.limit:
                break
        for line in files.finish():
            note(line)
        if not seen:
            raise DataError(f"{', '.join(config.paths)}: no rows")
        if seen.num_duplicates:
            note(f"{seen.num_duplicates:,} left out: the same answer to the same question again")
        writer.write("rollouts", pa.RecordBatch.from_pylist(rows, schema=ROLLOUT))
        writer.publish(seen.counts | {f"left out: {why}": number for why, number in files.left_out.items()})
    return Rollouts(out)


def _answers(files: RowFiles, bar: Progress) -> Iterator[tuple[Prompt, Answer, str | None]]:
    """Yield each answer with its question and the name that the file gives it."""
    for file in files.files:
        for row in files.rows(file):
            prompt = to_prompt(row, row.prompt_uid)
            several = len(row.answers) > 1
            for number, answer in enumerate(row.answers):
                yield prompt, answer, f"{row.uid}-{number}" if several and row.uid is not None else row.uid
        bar.advance()


class _Seen:
    """The answers so far: their names, and which of them occur again."""

    def __init__(self) -> None:
        """Start without any."""
        self.num_duplicates = 0
        self._places: dict[str, str] = {}  # uid → where
        self._answers: set[str] = set()
        self._candidates: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return the number of answers."""
        return len(self._places)

    @property
    def counts(self) -> dict[str, int]:
        """What the manifest counts."""
        duplicates = {"duplicates": self.num_duplicates} if self.num_duplicates else {}
        return {"prompts": len(self._candidates), "rollouts": len(self), **duplicates}

    def add(self, prompt: Prompt, answer: Answer, uid: str | None) -> dict[str, Any] | None:
        """Return the rollout of an answer, or None if the same answer to the same question was there before.

        Raises:
            Fault: Its uid, or that of its question, is that of another.
        """
        text = f"{prompt.uid}\0{answer.completion}"
        key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        if key in self._answers:
            self.num_duplicates += 1
            return None
        uid = key if uid is None else uid
        if uid in self._places:
            raise Fault(f"same uid {uid!r} as {self._places[uid]}, but another answer; uids must be unique")
        self._answers.add(key)
        self._places[uid] = prompt.where
        index = self._candidates[prompt.uid]
        self._candidates[prompt.uid] += 1
        return {
            **prompt.columns(),
            "uid": uid,
            "index": index,
            "completion": answer.completion,
            "finish_reason": answer.finish_reason,
            "prefix_bytes": 0,
        }
