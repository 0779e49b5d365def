"""Take existing answers as rollouts: your own files, or a published dataset.

Input: JSONL or Parquet rows with `input` and `output`, or with `messages` that end with the assistant. Output: the
same rollouts that sample writes, without log-probabilities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa

from dasd_lite.config.models import result_options
from dasd_lite.config.options import with_options
from dasd_lite.config.stages import IngestConfig
from dasd_lite.console import label, progress
from dasd_lite.data.handles import Rollouts
from dasd_lite.data.manifest import identify
from dasd_lite.data.prompts import read_rows, to_prompt
from dasd_lite.data.records import ROLLOUT
from dasd_lite.data.seeds import digest
from dasd_lite.data.writer import ShardWriter, is_finished
from dasd_lite.errors import DataError

VERSION = 1
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
        paths: Files of rows with prompt and answer; None: those of `config.paths`.
        config: Options of the stage.
        out: Folder to write.
        system: System message for prompts that have none.
        force: Replace a folder that was made with other options.
        **options: Fields of IngestConfig, in place of those of `config`.

    Returns:
        The rollouts, one for each row; without log-probabilities.

    Raises:
        ConfigError: A wrong option.
        DataError: A file that is missing, or a row without prompt or answer, or one that occurs twice.
        CheckpointError: `out` was made with other options.
    """
    if paths is not None:
        options["paths"] = [Path(p) for p in ([paths] if isinstance(paths, str | PathLike) else paths)]
    config, out = with_options(IngestConfig, config, options, "ingest"), Path(out)
    if not config.paths:
        raise DataError("ingest.paths is not set; name files of rows with prompt and answer")
    for path in config.paths:
        if not path.is_file():
            raise DataError(f"ingest.paths: {path}: no such file")
    asked = {key: value for key, value in result_options(config).items() if key != "paths"} | {"system": system}
    inputs = {f"paths.{i}": path for i, path in enumerate(config.paths)}
    identity = identify("ingest", VERSION, asked, inputs, grows=(f"inputs.{name}" for name in inputs))
    if is_finished(out, identity, force=force):
        return Rollouts(out)

    candidates: Counter[str] = Counter()
    seen: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    with (
        ShardWriter(out, identity, {"rollouts": ROLLOUT}, config) as writer,
        progress(label(out.parent.name, "ingest"), len(config.paths), "files") as bar,
    ):
        for path in config.paths:
            for where, row in islice(read_rows(path), None if config.limit is None else config.limit - len(seen)):
                rollout = _to_rollout(row, where, system, candidates)
                if rollout["uid"] in seen:
                    raise DataError(f"{where}: repeats the answer of {seen[rollout['uid']]} (uid {rollout['uid']!r})")
                seen[rollout["uid"]] = where
                rows.append(rollout)
                if len(rows) == _BATCH:
                    writer.write("rollouts", pa.RecordBatch.from_pylist(rows, schema=ROLLOUT))
                    rows.clear()
            bar.advance()
        writer.write("rollouts", pa.RecordBatch.from_pylist(rows, schema=ROLLOUT))
        if not seen:
            raise DataError(f"{', '.join(map(str, config.paths))}: no rows")
        writer.publish({"prompts": len(candidates), "rollouts": len(seen)})
    return Rollouts(out)


def _to_rollout(row: dict[str, Any], where: str, system: str | None, candidates: Counter[str]) -> dict[str, Any]:
    prompt = to_prompt({key: value for key, value in row.items() if key != "uid"}, where, system)
    completion = row.get("output")
    if completion is None and row.get("messages"):
        completion = row["messages"][-1].get("content") if row["messages"][-1].get("role") == "assistant" else None
    if not isinstance(completion, str) or not completion:
        raise DataError(f"{where}: has no answer; a row needs `output`, or `messages` that end with the assistant")
    index = candidates[prompt.uid]
    candidates[prompt.uid] += 1
    return {
        **prompt.columns(),
        "uid": str(row["uid"]) if row.get("uid") is not None else digest(prompt.uid, completion)[:16],
        "index": index,
        "completion": completion,
        "finish_reason": str(row.get("finish_reason") or "unknown"),
        "prefix_bytes": 0,
    }
