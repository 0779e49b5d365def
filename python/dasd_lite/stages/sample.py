"""Sample the teacher: k answers per prompt at one temperature (paper section 3).

Input: prompts and a teacher. Output: rollouts with the teacher's log-probability of every sampled token. Invariants:
every finished answer is committed at once, so the same call resumes after any stop; the seed of an answer depends only
on its phase, prompt and number, never on the other prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from dasd_lite.config.models import Endpoint, Table, Teacher, engine_options, result_options
from dasd_lite.config.options import with_options
from dasd_lite.config.stages import SampleConfig
from dasd_lite.console import label
from dasd_lite.data.dataset import batches
from dasd_lite.data.handles import Rollouts
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import Identity, identify, read_manifest, read_timing
from dasd_lite.data.prompts import Prompts
from dasd_lite.data.records import ROLLOUT, Prompt
from dasd_lite.data.run_folder import StageFolder
from dasd_lite.data.seeds import check_seed, derive_seed, digest
from dasd_lite.data.usage import Usage
from dasd_lite.data.writer import is_finished
from dasd_lite.inference import Completion, Request, Sampler, SamplingParams
from dasd_lite.inference.backends import model_identity, open_sampler
from dasd_lite.inference.collect import collect, token_columns

VERSION = 2


def sample(
    prompts: Prompts | Iterable[Prompt] | str | PathLike[str],
    teacher: Teacher | Sampler,
    config: SampleConfig | None = None,
    *,
    out: str | PathLike[str],
    seed: int = 0,
    phase: str = "",
    trial: Path | None = None,
    used: Usage | None = None,
    force: bool = False,
    **options: Any,
) -> Rollouts:
    """Sample answers from the teacher.

    Args:
        prompts: From `read_prompts`, a list of prompts, or a file.
        teacher: A model table (`Endpoint`, `Vllm`, `Transformers`), or a sampler of your own.
        config: Options of the stage.
        out: Folder to write.
        seed: Seed of every draw, with the phase, the prompt's uid and the number of the answer.
        phase: Name of the phase: two phases draw different answers with the same seed.
        trial: Folder with answers to the first prompts that were paid for before; they are taken over.
        used: What other stages have asked of the teacher; it counts against its budget.
        force: Replace a folder that was made with other options.
        **options: Fields of SampleConfig, in place of those of `config`.

    Returns:
        The rollouts: `num_samples` for each prompt, with the raw log-probability of every token.

    Raises:
        ConfigError: A wrong option.
        DataError: A prompt that cannot be asked.
        CheckpointError: `out` was made with other options.
        EndpointError: The teacher cannot be reached, or its budget is used up.

    Source: arXiv 2601.09088, section 3.
    """
    check_seed(seed)
    config = with_options(SampleConfig, config, options, "sample")
    prompts, out = Prompts.of(prompts), Path(out)
    asked = {**result_options(config), "phase": phase, "seed": seed, "limit": prompts.limit, "system": prompts.system}
    asked["teacher"] = engine_options(teacher) if isinstance(teacher, Table) else {}
    identity = identify("sample", VERSION, asked, {"prompts": prompts.fingerprint, "teacher": model_identity(teacher)})
    if is_finished(out, identity, force=force):
        return Rollouts(out)

    plan = [(prompt, index) for prompt in prompts for index in range(config.num_samples)]
    with Journal(out, identity, ROLLOUT, len(plan), config=config) as journal:
        if trial is not None:
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
            lambda usage: open_sampler(teacher, used=usage),
            SamplingParams(config.temperature, config.top_p, config.top_k, config.min_p),
            label(phase, "sample"),
            prices=teacher.prices if isinstance(teacher, Endpoint) else None,
            used=used,
        )
        journal.publish({"prompts": len(prompts), "rollouts": len(plan), **prompts.counts}, **timing)
    return Rollouts(out)


def _take_over(journal: Journal, trial: Path, identity: Identity, plan: list[tuple[Prompt, int]]) -> None:
    """Commit the answers of a finished trial with the same options, all at once and before any other."""
    if journal.done() or not StageFolder.at(trial).is_finished:
        return
    manifest = read_manifest(trial)
    is_same = {**manifest["config"], "limit": None} == {**identity.config, "limit": None}
    is_same = is_same and {**manifest["inputs"], "prompts": ""} == {**identity.inputs, "prompts": ""}
    if not is_same or manifest["version"] != VERSION:
        return
    positions = {(prompt.uid, index): position for position, (prompt, index) in enumerate(plan)}
    rows: dict[int, dict[str, Any]] = {}
    for batch in batches(trial, "rollouts"):
        for row in batch.to_pylist():
            position = positions.get((row["prompt_uid"], row["index"]))
            if position is not None and row["messages"] == list(plan[position][0].messages):
                new_uid = digest(identity.fingerprint, row["prompt_uid"], row["index"])[:16]
                rows[position] = {**row, "uid": new_uid}
    timing = read_timing(trial)
    journal.commit(rows, {name: int(timing.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")})
