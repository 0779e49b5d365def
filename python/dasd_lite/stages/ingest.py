"""Take answers that exist already as rollouts: one's own files or a published data set.

Reads JSONL or Parquet rows with `input` and `output`, or `messages` that end with the assistant;
writes the same rollouts as sample, without log-probabilities where the rows have none.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from dasd_lite.config.models import semantic
from dasd_lite.config.stages import IngestConfig
from dasd_lite.console import progress
from dasd_lite.data.manifest import identify, read_manifest
from dasd_lite.data.prompts import read_rows, to_prompt
from dasd_lite.data.records import ROLLOUT
from dasd_lite.data.seeds import digest
from dasd_lite.data.writer import ShardWriter, is_finished
from dasd_lite.errors import DataError

VERSION = 1
_BATCH = 256


def run(config: IngestConfig, out: Path, *, system: str | None = None, force: bool = False) -> dict[str, Any]:
    """Write the rows of `config.paths` as rollouts into `out`; returns its manifest."""
    for path in config.paths:
        if not path.is_file():
            raise DataError(f"ingest.paths: {path}: no such file")
    options = {key: value for key, value in semantic(config).items() if key != "paths"} | {"system": system}
    identity = identify("ingest", VERSION, options, {f"paths.{i}": path for i, path in enumerate(config.paths)})
    if is_finished(out, identity, force=force):
        return read_manifest(out)

    candidates: Counter[str] = Counter()
    seen: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    with (
        ShardWriter(out, identity, {"rollouts": ROLLOUT}, config) as writer,
        progress(f"{out.parent.name}: ingest", len(config.paths), "files") as bar,
    ):
        for path in config.paths:
            for where, row in islice(read_rows(path), None if config.limit is None else config.limit - len(seen)):
                rollout = _to_rollout(row, where, system, candidates)
                if rollout["uid"] in seen:
                    raise DataError(f"{where}: the answer of {seen[rollout['uid']]} again (uid {rollout['uid']!r})")
                seen[rollout["uid"]] = where
                rows.append(rollout)
                if len(rows) == _BATCH:
                    writer.write("rollouts", pa.RecordBatch.from_pylist(rows, schema=ROLLOUT))
                    rows.clear()
            bar.advance()
        writer.write("rollouts", pa.RecordBatch.from_pylist(rows, schema=ROLLOUT))
        if not seen:
            raise DataError(f"{', '.join(map(str, config.paths))}: no rows in it")
        return writer.publish({"prompts": len(candidates), "rollouts": len(seen)})


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
