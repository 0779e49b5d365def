"""Sample the teacher: k answers per prompt at one temperature (paper section 3).

Reads a file of prompts; writes rollouts with the teacher's log-probability of every sampled token.
Every finished answer is committed at once, so the same call goes on after any stop. An answer's seed
is a function of its prompt, phase and number alone: other prompts beside it change nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dasd_lite.config.models import Teacher, engine, semantic
from dasd_lite.config.stages import PromptsConfig, SampleConfig
from dasd_lite.data.dataset import batches
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import Identity, identify, read_manifest, read_timing
from dasd_lite.data.prompts import read_prompts
from dasd_lite.data.records import ROLLOUT, Prompt
from dasd_lite.data.seeds import derive_seed, digest
from dasd_lite.data.usage import Usage
from dasd_lite.data.writer import is_finished
from dasd_lite.errors import DataError
from dasd_lite.inference import Completion, Request, SamplingParams, open_sampler, source
from dasd_lite.inference.collect import collect, token_columns

VERSION = 2


def run(
    prompts: PromptsConfig,
    teacher: Teacher,
    config: SampleConfig,
    out: Path,
    *,
    phase: str,
    seed: int,
    trial: Path | None = None,
    spent: Usage | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Sample `config.num_samples` answers to each prompt into `out`; returns its manifest.

    `trial` may hold answers to the first prompts that were paid for already: they are taken over. `spent` is what
    other stages have asked of the teacher, and counts against its budget.
    """
    if prompts.path is None:
        raise DataError("prompts.path is not set; name a file of questions")
    questions = read_prompts(prompts.path, limit=prompts.limit, system=prompts.system)
    options = {**semantic(config), "phase": phase, "seed": seed, "limit": prompts.limit, "system": prompts.system}
    options["teacher"] = engine(teacher)
    identity = identify("sample", VERSION, options, {"prompts": prompts.path, "teacher": source(teacher)})
    if is_finished(out, identity, force=force):
        return read_manifest(out)

    plan = [(prompt, index) for prompt in questions for index in range(config.num_samples)]
    with Journal(out, identity, ROLLOUT, len(plan), config=config) as journal:
        if trial is not None and teacher.kind == "endpoint":
            _take_over(journal, trial, identity, plan)

        def request(position: int) -> Request:
            prompt, index = plan[position]
            new_seed = derive_seed(seed, phase, prompt.uid, index)
            return Request(position, prompt.messages, config.max_tokens, new_seed)

        def row(completion: Completion) -> dict[str, Any]:
            prompt, index = plan[completion.position]
            return {
                **prompt.columns(),
                "uid": digest(identity.fingerprint, prompt.uid, index)[:16],
                "index": index,
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "prefix_bytes": 0,
                **token_columns(completion),
            }

        timing = collect(
            journal,
            request,
            row,
            lambda tally: open_sampler(teacher, spent=tally),
            SamplingParams(config.temperature, config.top_p, config.top_k, config.min_p),
            f"{phase}: sample",
            prices=teacher.prices if teacher.kind == "endpoint" else None,
            spent=spent,
        )
        return journal.publish({"prompts": len(questions), "rollouts": len(plan)}, **timing)


def _take_over(journal: Journal, trial: Path, identity: Identity, plan: list[tuple[Prompt, int]]) -> None:
    """Commit the answers of a finished trial of the same configuration, all at once, before any other."""
    if journal.done() or not (trial / "manifest.json").exists():
        return
    manifest = read_manifest(trial)
    same = {**manifest["config"], "limit": None} == {**identity.config, "limit": None}
    if not same or manifest["inputs"] != identity.inputs or manifest["version"] != VERSION:
        return
    place = {(prompt.uid, index): position for position, (prompt, index) in enumerate(plan)}
    rows: dict[int, dict[str, Any]] = {}
    for batch in batches(trial, "rollouts"):
        for row in batch.to_pylist():
            position = place.get((row["prompt_uid"], row["index"]))
            if position is not None:
                new_uid = digest(identity.fingerprint, row["prompt_uid"], row["index"])[:16]
                rows[position] = {**row, "uid": new_uid}
    took = read_timing(trial)
    journal.commit(rows, {name: int(took.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")})
