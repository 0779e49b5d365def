"""Mixed-policy rollouts: the student starts an answer, the teacher finishes it (paper section 5).

Input: the rollouts that a phase before kept, the trained student, the teacher. The student answers each question, cut
off at `max_length_ratio` × the length of the teacher's answer. An answer that is cut off has drifted: it is dropped
from a random point of its second half on, and the teacher writes the rest. Output: rollouts. Both halves are journals,
so the same call resumes after any stop.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from dasd_lite.chat.chat import Chat
from dasd_lite.config.models import (
    Endpoint,
    Student,
    Table,
    Teacher,
    Transformers,
    Vllm,
    engine_options,
    result_options,
)
from dasd_lite.config.options import with_options
from dasd_lite.config.stages import MixConfig
from dasd_lite.console import label, note
from dasd_lite.data.dataset import batches
from dasd_lite.data.files import write_atomic
from dasd_lite.data.handles import Kept, Model, Rollouts, model_path
from dasd_lite.data.hub import model_folder
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import Identity, identify
from dasd_lite.data.records import ROLLOUT, times_before
from dasd_lite.data.seeds import check_seed, derive_seed, digest
from dasd_lite.data.usage import Usage
from dasd_lite.data.writer import begin, is_finished
from dasd_lite.errors import DataError
from dasd_lite.inference import Completion, Request, Sampler, SamplingParams
from dasd_lite.inference.backends import check_same_teacher, model_identity, model_name, open_sampler
from dasd_lite.inference.collect import collect, token_columns
from dasd_lite.inference.scorer import context_of

VERSION = 3  # 2 had the phase's name in its seeds
_GROWS = ("config.num_prompts", "config.max_tokens", "inputs.selected", "inputs.model")
# A token boundary in every tokenizer: before a space, or after a whole run of line breaks. Anywhere else the teacher
# would read the student's prefix in other tokens than it would have written.
_QUESTION = ("prompt_uid", "domain", "answer", "index")  # columns that do not decide an answer
_CUT = re.compile(r"(?=(?<!\s) )|(?<=\n)(?!\s*\n)")


def mix(
    kept: Kept | str | PathLike[str],
    model: Model | str | PathLike[str],
    teacher: Teacher | Sampler,
    config: MixConfig | None = None,
    *,
    out: str | PathLike[str],
    student: Student | None = None,
    seed: int = 0,
    sampled: Path | None = None,
    reuse: Iterable[str | PathLike[str]] = (),
    used: Usage | None = None,
    force: bool = False,
    **options: Any,
) -> Rollouts:
    """Let the trained student start answers, and the teacher finish those on which it drifts.

    Args:
        kept: The teacher's answers that the student was trained on.
        model: The trained student: what train returned, or a folder of weights.
        teacher: The teacher that the kept answers came from.
        config: Options of the stage.
        out: Folder to write. One that `mix` wrote before keeps its answers and gets those that are missing.
        student: How the student is run; None: by transformers.
        seed: Seed of every draw, with all else that decides an answer.
        sampled: The rollouts that `kept` was selected from: their teacher must be this one.
        reuse: Folders that `mix` wrote, finished or not; answers that they have are not asked for.
        used: What other stages have asked of the teacher; it counts against its budget.
        force: Replace a folder that was made with other options.
        **options: Fields of MixConfig, in place of those of `config`.

    Returns:
        The mixed rollouts: their first `prefix_bytes` bytes are the student's.

    Raises:
        ConfigError: A wrong option.
        DataError: No answer of the student is cut off, or the rollouts are another teacher's.
        CheckpointError: `out` was made with other options.

    Source: arXiv 2601.09088, section 5.
    """
    check_seed(seed)
    config = with_options(MixConfig, config, options, "mix")
    selected, out, model = Kept.of(kept).folder, Path(out), model_path(model)
    student = student or Transformers(model=str(model))
    inputs = {"selected": selected, "model": model, "teacher": model_identity(teacher)}
    asked = {**result_options(config), "seed": seed, "student": engine_options(student)}
    asked["teacher"] = engine_options(teacher) if isinstance(teacher, Table) else {}
    identity = identify("mix", VERSION, asked, inputs, names={"teacher": model_name(teacher)}, grows=_GROWS)
    if is_finished(out, identity, force=force):
        return Rollouts(out)
    if sampled is not None:
        check_same_teacher(sampled, teacher, identity)
    if not (out / "manifest.json").exists():  # a finished folder stays so until its second half grows
        begin(out, identity, config)
    others = list(map(Path, reuse))
    questions = _questions(selected, config, seed)
    halves = [folder / "student" for folder in others]
    started = _student_answers(questions, model, student, config, out, identity, seed, halves)
    placed = [pair for row in started if (pair := _cut_off(row, seed))]
    cut = _with_room(placed, teacher, out)
    counts = {
        "prompts": len(questions),
        "cut_off": len(started),
        "no_border": len(started) - len(placed),  # left out: nowhere to cut
        "over_context": len(placed) - len(cut),  # left out: no room for the teacher
        "rollouts": len(cut),
    }
    if not cut:
        raise DataError(
            f"{out}: none of {len(questions)} student answers was cut off at {config.max_length_ratio} × the teacher's"
            " length, so there is nothing for the teacher to finish; lower mix.max_length_ratio, or drop this phase"
        )
    keys = [_key(identity, "teacher", base["messages"], prefix, base["uid"]) for base, prefix in cut]

    def of_question(position: int) -> dict[str, Any]:
        return {name: cut[position][0][name] for name in _QUESTION}

    with Journal(
        out,
        identity,
        ROLLOUT,
        len(cut),
        keys=[key[:16] for key in keys],
        limit=config.max_tokens,
        columns=of_question,
        config=config,
    ) as journal:
        name = label(out.parent.name, "teacher finishes")
        if taken := journal.take_over(others):
            note(f"{name}: {taken:,} answers are there already, in folders to reuse")
        timing = _teacher_ends(journal, cut, keys, teacher, config, name, used)
        journal.publish(counts, **timing)
    return Rollouts(out)


def _key(identity: Identity, half: str, messages: Any, *more: object) -> str:
    """Return a hash of all that decides an answer of one half; its first 16 digits name the rollout."""
    decides = {name: value for name, value in identity.config.items() if f"config.{name}" not in _GROWS}
    model = identity.inputs["model" if half == "student" else "teacher"]
    return digest("mix", half, messages, *more, model, decides)


def _seed(key: str) -> int:
    return int(key[16:], 16) >> 1


def _teacher_ends(
    journal: Journal,
    cut: list[tuple[dict[str, Any], str]],
    keys: list[str],
    teacher: Teacher | Sampler,
    config: MixConfig,
    name: str,
    used: Usage | None,
) -> dict[str, float]:
    """Let the teacher write the rest of each answer; return its timing."""

    def row(completion: Completion) -> dict[str, Any]:
        base, prefix = cut[completion.position]
        return {
            **base,
            "uid": keys[completion.position][:16],
            "completion": prefix + completion.text,
            "finish_reason": completion.finish_reason,
            "prefix_bytes": len(prefix.encode()),
            "max_tokens": config.max_tokens,
            **token_columns(completion),
        }

    def request(position: int) -> Request:
        base, prefix = cut[position]
        return Request(position, tuple(base["messages"]), config.max_tokens, _seed(keys[position]), prefix)

    return collect(
        journal,
        request,
        row,
        lambda usage: open_sampler(teacher, used=usage),
        SamplingParams(config.temperature, config.top_p),
        name,
        prices=teacher.prices if isinstance(teacher, Endpoint) else None,
        used=used,
    )


def _questions(selected: Path, config: MixConfig, seed: int) -> list[dict[str, Any]]:
    """Return one row for each question, with the length of the teacher's answer in the student's tokens."""
    by_prompt: dict[str, dict[str, Any]] = {}
    columns = ("prompt_uid", "messages", "domain", "answer", "index", "ids", "num_context_tokens")
    for batch in batches(selected, "kept", columns):
        lengths = batch["ids"].value_lengths().to_numpy() - batch["num_context_tokens"].to_numpy()
        for row, length in zip(batch.drop_columns(["ids", "num_context_tokens"]).to_pylist(), lengths, strict=True):
            by_prompt.setdefault(row["prompt_uid"], {**row, "length": int(length)})
    questions = list(by_prompt.values())
    if config.num_prompts is not None and config.num_prompts < len(questions):
        rng = np.random.Generator(np.random.Philox(derive_seed(seed, "mix prompts")))
        chosen = np.sort(rng.permutation(len(questions))[: config.num_prompts])
        questions = [questions[i] for i in chosen]
    return questions


def _student_answers(
    questions: list[dict[str, Any]],
    model: Path,
    student: Student,
    config: MixConfig,
    out: Path,
    parent: Identity,
    seed: int,
    reuse: list[Path],
) -> list[dict[str, Any]]:
    """Let the student answer each question up to its limit; return the answers cut off, without token columns."""
    folder = out / "student"
    identity = replace(parent, stage="mix.student", folders={})
    columns = [name for name in ROLLOUT.names if name not in ("token_ids", "logprobs", "token_bytes")]
    limits = [math.ceil(config.max_length_ratio * question["length"]) for question in questions]
    times = times_before(digest(question["messages"]) for question in questions)
    keys = [
        _key(identity, "student", question["messages"], before, limit)
        for question, before, limit in zip(questions, times, limits, strict=True)
    ]
    if not is_finished(folder, identity):
        with Journal(
            folder,
            identity,
            ROLLOUT,
            len(questions),
            keys=[key[:16] for key in keys],
            columns=lambda position: {name: questions[position][name] for name in _QUESTION},
            config=config,
        ) as journal:

            def request(position: int) -> Request:
                messages = tuple(questions[position]["messages"])
                return Request(position, messages, limits[position], _seed(keys[position]))

            def row(completion: Completion) -> dict[str, Any]:
                question = {key: value for key, value in questions[completion.position].items() if key != "length"}
                return {
                    **question,
                    "uid": keys[completion.position][:16],
                    "completion": completion.text,
                    "finish_reason": completion.finish_reason,
                    "prefix_bytes": 0,
                    "max_tokens": limits[completion.position],
                    **token_columns(completion),
                }

            journal.take_over(reuse)
            params = SamplingParams(config.temperature, config.top_p)
            name = label(out.parent.name, "student starts")
            timing = collect(journal, request, row, lambda _: open_sampler(student, model), params, name)
            journal.publish({"prompts": len(questions)}, **timing)
    cut = (batch.filter(pc.field("finish_reason") == "length") for batch in batches(folder, "rollouts", columns))
    return [row for batch in cut for row in batch.to_pylist()]


def _with_room(
    cut: list[tuple[dict[str, Any], str]], teacher: Teacher | Sampler, out: Path
) -> list[tuple[dict[str, Any], str]]:
    """Leave out those whose prompt and prefix fill the teacher's context, where its tokenizer is known.

    The context is kept in `out`: a server may report another one, or none, when the call resumes, and positions in
    the journal must mean the same rollouts then.
    """
    if isinstance(teacher, Endpoint):
        tokenizer = teacher.tokenizer
    else:
        tokenizer = teacher.model if isinstance(teacher, Transformers | Vllm) else None
    if tokenizer is None or not isinstance(teacher, Table):
        return cut
    chat = Chat(model_folder(tokenizer))
    kept = out / "context.json"
    if not kept.exists():
        write_atomic(kept, json.dumps(context_of(teacher, chat)))
    context = json.loads(kept.read_text(encoding="utf-8"))
    return [pair for pair in cut if len(chat.prompt_ids(pair[0]["messages"], pair[1])) < context]


def _cut_off(row: dict[str, Any], seed: int) -> tuple[dict[str, Any], str] | None:
    """Return the row's prompt columns, and its text up to a random token boundary in its second half, if it has one."""
    text: str = row.pop("completion")
    places = [m.start() for m in _CUT.finditer(text, pos=len(text) // 2) if 0 < m.start() < len(text)]
    rng = np.random.Generator(np.random.Philox(derive_seed(seed, "cut", row["uid"])))
    return (row, text[: places[int(rng.integers(len(places)))]]) if places else None
