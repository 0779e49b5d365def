"""Sample the teacher: k answers per prompt at one temperature (paper section 3).

Input: prompts and a teacher. Output: rollouts with the teacher's log-probability of every sampled token. Invariants:
every finished answer is committed at once, so the same call resumes after any stop; an answer and its seed depend on
the messages, the teacher, the sampling parameters, the seed and the number of the answer, and on nothing else. So the
folder grows: with more prompts, more answers for each, or a higher limit, only what is missing is asked for.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from dasd_lite.config.models import Endpoint, Table, Teacher, engine_options, result_options
from dasd_lite.config.options import with_options
from dasd_lite.config.stages import SampleConfig
from dasd_lite.console import label, note
from dasd_lite.data.handles import Rollouts
from dasd_lite.data.journal import Journal, read_counts
from dasd_lite.data.manifest import Identity, identify, read_manifest, read_timing
from dasd_lite.data.prompts import Prompts
from dasd_lite.data.records import ROLLOUT, Prompt, times_before
from dasd_lite.data.seeds import check_seed, derive_seed, digest
from dasd_lite.data.usage import Usage
from dasd_lite.data.writer import is_finished
from dasd_lite.inference import Completion, Request, Sampler, SamplingParams
from dasd_lite.inference.backends import model_identity, model_name, open_sampler
from dasd_lite.inference.collect import collect, token_columns, totals

VERSION = 3  # 2 had the phase's name and the prompt's uid in its seeds
GROWS = ("config.num_samples", "config.max_tokens", "inputs.prompts")
"""What may change while the folder keeps its answers: it decides which are asked for, not what they are."""


@dataclass(frozen=True)
class _Asked:
    """One position of the plan."""

    prompt: Prompt
    index: int
    uid: str
    draw: tuple[int, str, int, int]

    @property
    def seed(self) -> int:
        """Seed of its draw."""
        return derive_seed(*self.draw)


def sample(
    prompts: Prompts | Iterable[Prompt] | str | PathLike[str],
    teacher: Teacher | Sampler,
    config: SampleConfig | None = None,
    *,
    out: str | PathLike[str],
    seed: int = 0,
    reuse: Iterable[str | PathLike[str]] = (),
    trial: Path | None = None,
    used: Usage | None = None,
    finish: bool = False,
    reopen: bool = False,
    force: bool = False,
    **options: Any,
) -> Rollouts:
    """Sample answers from the teacher.

    Args:
        prompts: From `read_prompts`, a list of prompts, or a file.
        teacher: A model table (`Endpoint`, `Vllm`, `Transformers`), or a sampler of your own.
        config: Options of the stage.
        out: Folder to write. One that `sample` wrote before keeps its answers and gets those that are missing.
        seed: Seed of every draw, with all else that decides an answer.
        reuse: Folders that `sample` wrote, finished or not; answers that they have are not asked for.
        trial: Another such folder, whose tokens count as this one's.
        used: What other stages have asked of the teacher; it counts against its budget.
        finish: Ask for nothing more: the folder is finished with the answers that it has.
        reopen: Ask for what is missing in a folder that was finished with answers missing.
        force: Set a folder aside that was made with other options.
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
    identity = sample_identity(prompts, teacher, config, seed)
    if is_finished(out, identity, force=force, reopen=reopen):
        return _noted(Rollouts(out))

    plan = _plan(prompts, identity, config.num_samples)
    prompts_before = read_manifest(out)["counts"].get("prompts", 0) if (out / "manifest.json").exists() else None
    with Journal(
        out,
        identity,
        ROLLOUT,
        len(plan),
        keys=[asked.uid for asked in plan],
        limit=config.max_tokens,
        columns=lambda position: plan[position].prompt.names(),
        config=config,
    ) as journal:

        def request(position: int) -> Request:
            asked = plan[position]
            return Request(position, asked.prompt.messages, config.max_tokens, asked.seed)

        def row(completion: Completion) -> dict[str, Any]:
            asked = plan[completion.position]
            return {
                **asked.prompt.columns(),
                "uid": asked.uid,
                "index": asked.index,
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "prefix_bytes": 0,
                "max_tokens": config.max_tokens,
                **token_columns(completion),
            }

        name = label(out.parent.name, "sample")
        prices = teacher.prices if isinstance(teacher, Endpoint) else None
        if trial is not None and trial.is_dir():
            spent = {} if journal.counts() else read_counts(trial) or read_timing(trial)
            journal.take_over([trial], counts=spent)
        if taken := journal.take_over(map(Path, reuse)):
            note(f"{name}: {taken:,} answers are there already, in folders to reuse")
        if journal.has_grown and not finish:
            there = journal.done()
            changes = f"{len(there):,} answers are there, {len(plan) - len(there):,} are asked for"
            if prompts_before is not None:
                known = len({plan[position].prompt.uid for position in there})
                changes = _changes(prompts, len(prompts) - known, prompts_before - known) + changes
            note(f"{name}: {changes}")
        num_prompts = len(prompts)
        if finish:
            num_answers, timing = journal.close_as_it_is(), totals(journal, prices)
            num_prompts = len({plan[position].prompt.uid for position in journal.done()})
        else:
            params = SamplingParams(config.temperature, config.top_p, config.top_k, config.min_p)
            timing = collect(
                journal,
                request,
                row,
                lambda usage: open_sampler(teacher, used=usage),
                params,
                name,
                prices=prices,
                used=used,
            )
            num_answers = len(plan)
        journal.publish({"prompts": num_prompts, "rollouts": num_answers, **prompts.counts}, **timing)
    return _noted(Rollouts(out))


def sample_identity(prompts: Prompts, teacher: Teacher | Sampler, config: SampleConfig, seed: int) -> Identity:
    """Return what the folder of these answers will be known by."""
    asked = {**result_options(config), "seed": seed}
    asked["teacher"] = engine_options(teacher) if isinstance(teacher, Table) else {}
    return identify(
        "sample",
        VERSION,
        asked,
        {"prompts": prompts.fingerprint, "teacher": model_identity(teacher)},
        names={"prompts": str(prompts.path or "the prompts"), "teacher": model_name(teacher)},
        brought=("teacher",),
        grows=GROWS,
    )


def missing_answers(prompts: Prompts, identity: Identity, num_samples: int, there: Container[str]) -> int:
    """Return how many answers are still to be asked for when those of some uids are there."""
    return sum(asked.uid not in there for asked in _plan(prompts, identity, num_samples))


def _plan(prompts: Prompts, identity: Identity, num_samples: int) -> list[_Asked]:
    """Return what is asked, in order. A question that is there twice gets other answers the second time.

    The seed of a draw does not depend on the teacher, so one model gives the same answers here and behind a server.
    """
    decides = {name: value for name, value in identity.config.items() if f"config.{name}" not in GROWS}
    draws = {name: value for name, value in decides.items() if name not in ("seed", "teacher")}
    answer = digest("sample", VERSION, identity.inputs["teacher"], decides)
    seed = derive_seed(decides["seed"], "sample", draws)
    questions = [prompt.key for prompt in prompts]
    return [
        _Asked(prompt, index, digest(answer, question, times, index)[:16], (seed, question, times, index))
        for prompt, question, times in zip(prompts, questions, times_before(questions), strict=True)
        for index in range(num_samples)
    ]


def _changes(prompts: Prompts, added: int, removed: int) -> str:
    """Say how many questions are new and how many are no longer asked."""
    parts = [f"{number:,} {what}" for number, what in ((added, "added"), (removed, "removed")) if number > 0]
    return f"{prompts.path or 'prompts'}: {', '.join(parts)}; " if parts else ""


def _noted(rollouts: Rollouts) -> Rollouts:
    if missing := rollouts.counts.get("missing"):
        note(f"{rollouts.folder}: finished with {missing:,} answers missing; `dasd-lite sample` asks for them")
    return rollouts
