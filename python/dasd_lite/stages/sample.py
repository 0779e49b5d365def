"""Sample the teacher: k answers per prompt at one temperature (paper section 3).

Reads a file of prompts; writes rollouts with the teacher's log-probability of every sampled token.
Every finished answer is committed at once, so the same call goes on after any stop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dasd_lite.chat import model_folder
from dasd_lite.config import PromptsConfig, SampleConfig, Teacher, engine, semantic
from dasd_lite.dataset import identify, is_finished, read_manifest
from dasd_lite.errors import DataError
from dasd_lite.journal import Journal
from dasd_lite.prompts import read_prompts
from dasd_lite.records import ROLLOUT, derive_seed, digest
from dasd_lite.sampler import Completion, Request, SamplingParams, open_sampler
from dasd_lite.sampler.collect import collect, token_columns

VERSION = 1


def run(
    prompts: PromptsConfig, teacher: Teacher, config: SampleConfig, out: Path, *, seed: int, force: bool = False
) -> dict[str, Any]:
    """Sample `config.num_samples` answers to each prompt into `out`; returns its manifest."""
    if prompts.path is None:
        raise DataError("prompts.path is not set; name a file of questions")
    questions = read_prompts(prompts.path, limit=prompts.limit, system=prompts.system)
    source = semantic(teacher) if teacher.kind == "endpoint" else model_folder(teacher.model, weights=True)
    options = {**semantic(config), "seed": seed, "limit": prompts.limit, "system": prompts.system}
    options["teacher"] = engine(teacher)
    inputs = {"prompts": prompts.path, "teacher": source if isinstance(source, Path) else digest(source)}
    identity = identify("sample", VERSION, options, inputs)
    if is_finished(out, identity, force=force):
        return read_manifest(out)

    plan = [(prompt, index) for prompt in questions for index in range(config.num_samples)]
    with Journal(out, identity, ROLLOUT, len(plan), config=config) as journal:

        def request(position: int) -> Request:
            prompt, index = plan[position]
            new_seed = derive_seed(seed, identity.fingerprint, prompt.uid, index)
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

        params = SamplingParams(config.temperature, config.top_p, config.top_k)
        label = f"{out.parent.name}: sample"
        timing = collect(journal, request, row, lambda: open_sampler(teacher), params, label)
        return journal.publish({"prompts": len(questions), "rollouts": len(plan)}, **timing)
