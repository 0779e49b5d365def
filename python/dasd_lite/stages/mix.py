"""Mixed-policy rollouts: the student begins, the teacher ends (paper section 5).

Reads the rollouts that a phase before kept, the trained student and the teacher. The student answers
each question, capped at `max_length_ratio` × the length of the teacher's answer. An answer that the cap cuts off
has drifted: it is dropped from a random point of its second half on, and the teacher writes the
rest. Both parts are journals, so the same call goes on after any stop.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from dasd_lite.chat.chat import Chat
from dasd_lite.config.models import Student, Teacher, engine, semantic
from dasd_lite.config.stages import MixConfig
from dasd_lite.data.dataset import batches
from dasd_lite.data.files import write_atomic
from dasd_lite.data.hub import model_folder
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import Identity, identify, read_manifest
from dasd_lite.data.records import ROLLOUT
from dasd_lite.data.seeds import derive_seed, digest
from dasd_lite.data.usage import Usage
from dasd_lite.data.writer import begin, is_finished
from dasd_lite.errors import DataError
from dasd_lite.inference import Completion, Request, SamplingParams, open_sampler, source
from dasd_lite.inference.collect import collect, token_columns
from dasd_lite.inference.scorer import context_of

VERSION = 2
# A token border that every tokenizer keeps: before a space or behind a whole run of line breaks. Elsewhere the
# teacher would read a student's prefix in other tokens than it would have written.
_CUT = re.compile(r"(?=(?<!\s) )|(?<=\n)(?!\s*\n)")


def run(
    selected: Path,
    model: Path,
    student: Student,
    teacher: Teacher,
    config: MixConfig,
    out: Path,
    *,
    phase: str,
    seed: int,
    sampled: Path | None = None,
    spent: Usage | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write mixed-policy rollouts into `out`; returns its manifest.

    `selected` holds the teacher's kept answers, `model` the trained student's weights. `sampled`, where
    those answers come from, is held against the teacher: it must be the same. `spent` is what other
    stages have asked of the teacher, and counts against its budget. Raises DataError when no answer of
    the student is cut off.
    """
    inputs = {"selected": selected, "model": model, "teacher": source(teacher)}
    options = {**semantic(config), "phase": phase, "seed": seed, "student": engine(student), "teacher": engine(teacher)}
    identity = identify("mix", VERSION, options, inputs)
    if is_finished(out, identity, force=force):
        return read_manifest(out)
    if sampled is not None and read_manifest(sampled)["inputs"].get("teacher", "") not in (
        "",
        identity.inputs["teacher"],
    ):
        raise DataError(f"{sampled}: sampled from another teacher than {teacher.model}; mix must use the same one")
    begin(out, identity, config)
    questions = _questions(selected, config, phase, seed)
    started = _student_answers(questions, model, student, config, out / "student", identity, seed, phase)
    placed = [pair for row in started if (pair := _cut_off(row, phase, seed))]
    tokenizer = teacher.tokenizer if teacher.kind == "endpoint" else teacher.model
    cut = _with_room(placed, teacher, Chat(model_folder(tokenizer)), out) if tokenizer else placed
    counts = {
        "prompts": len(questions),
        "cut_off": len(started),
        "no_border": len(started) - len(placed),  # left out: nowhere to cut
        "over_context": len(placed) - len(cut),  # left out: no room for the teacher
        "rollouts": len(cut),
    }
    if not cut:
        raise DataError(
            f"{out}: none of {len(questions)} student answers was cut off at {config.max_length_ratio} ×"
            " the teacher's length,"
            " so there is nothing to mend; lower mix.max_length_ratio or leave this phase out"
        )
    with Journal(out, identity, ROLLOUT, len(cut), config=config) as journal:
        timing = _teacher_ends(journal, cut, teacher, config, phase, seed, spent)
        return journal.publish(counts, **timing)


def _teacher_ends(
    journal: Journal,
    cut: list[tuple[dict[str, Any], str]],
    teacher: Teacher,
    config: MixConfig,
    phase: str,
    seed: int,
    spent: Usage | None,
) -> dict[str, float]:
    """Let the teacher write the rest behind each prefix; return what it took."""

    def row(completion: Completion) -> dict[str, Any]:
        base, prefix = cut[completion.position]
        return {
            **base,
            "uid": digest(journal.identity.fingerprint, base["prompt_uid"])[:16],
            "completion": prefix + completion.text,
            "finish_reason": completion.finish_reason,
            "prefix_bytes": len(prefix.encode()),
            **token_columns(completion),
        }

    def request(position: int) -> Request:
        base, prefix = cut[position]
        new_seed = derive_seed(seed, phase, "teacher", base["prompt_uid"])
        return Request(position, tuple(base["messages"]), config.max_tokens, new_seed, prefix)

    return collect(
        journal,
        request,
        row,
        lambda tally: open_sampler(teacher, spent=tally),
        SamplingParams(config.temperature, config.top_p),
        f"{phase}: teacher ends",
        prices=teacher.prices if teacher.kind == "endpoint" else None,
        spent=spent,
    )


def _questions(selected: Path, config: MixConfig, phase: str, seed: int) -> list[dict[str, Any]]:
    """Return one row a question, with the length of the teacher's answer in the student's tokens."""
    found: dict[str, dict[str, Any]] = {}
    columns = ("prompt_uid", "messages", "domain", "answer", "index", "ids", "num_context_tokens")
    for batch in batches(selected, "kept", columns):
        lengths = batch["ids"].value_lengths().to_numpy() - batch["num_context_tokens"].to_numpy()
        for row, length in zip(batch.drop_columns(["ids", "num_context_tokens"]).to_pylist(), lengths, strict=True):
            found.setdefault(row["prompt_uid"], {**row, "length": int(length)})
    questions = list(found.values())
    if config.num_prompts is not None and config.num_prompts < len(questions):
        rng = np.random.Generator(np.random.Philox(derive_seed(seed, phase, "mix prompts")))
        chosen = np.sort(rng.permutation(len(questions))[: config.num_prompts])
        questions = [questions[i] for i in chosen]
    return questions


def _student_answers(
    questions: list[dict[str, Any]],
    model: Path,
    student: Student,
    config: MixConfig,
    folder: Path,
    parent: Identity,
    seed: int,
    phase: str,
) -> list[dict[str, Any]]:
    """Let the student answer each question up to its cap; return those cut off, without their token columns."""
    identity = identify("mix.student", VERSION, parent.config, parent.inputs)
    columns = [name for name in ROLLOUT.names if name not in ("token_ids", "logprobs", "token_bytes")]
    if not is_finished(folder, identity):
        with Journal(folder, identity, ROLLOUT, len(questions), config=config) as journal:

            def request(position: int) -> Request:
                question = questions[position]
                cap = math.ceil(config.max_length_ratio * question["length"])
                new_seed = derive_seed(seed, phase, "student", question["prompt_uid"])
                return Request(position, tuple(question["messages"]), cap, new_seed)

            def row(completion: Completion) -> dict[str, Any]:
                question = {key: value for key, value in questions[completion.position].items() if key != "length"}
                return {
                    **question,
                    "uid": digest(identity.fingerprint, question["prompt_uid"])[:16],
                    "completion": completion.text,
                    "finish_reason": completion.finish_reason,
                    "prefix_bytes": 0,
                    **token_columns(completion),
                }

            params = SamplingParams(config.temperature, config.top_p)
            label = f"{phase}: student begins"
            timing = collect(journal, request, row, lambda _: open_sampler(student, model), params, label)
            journal.publish({"prompts": len(questions)}, **timing)
    cut = (batch.filter(pc.field("finish_reason") == "length") for batch in batches(folder, "rollouts", columns))
    return [row for batch in cut for row in batch.to_pylist()]


def _with_room(
    cut: list[tuple[dict[str, Any], str]], teacher: Teacher, chat: Chat, out: Path
) -> list[tuple[dict[str, Any], str]]:
    """Leave out those whose question and prefix fill the teacher's context.

    The context is kept in `out`: a server may say another one, or nothing, when the same call goes on, and the
    journal's positions must mean the same rollouts then.
    """
    kept = out / "context.json"
    if not kept.exists():
        write_atomic(kept, json.dumps(context_of(teacher, chat)))
    context = json.loads(kept.read_text(encoding="utf-8"))
    return [pair for pair in cut if len(chat.prompt_ids(pair[0]["messages"], pair[1])) < context]


def _cut_off(row: dict[str, Any], phase: str, seed: int) -> tuple[dict[str, Any], str] | None:
    """Return the row's question columns, and its text up to a random border of its second half; None without one."""
    text: str = row.pop("completion")
    places = [m.start() for m in _CUT.finditer(text, pos=len(text) // 2) if 0 < m.start() < len(text)]
    rng = np.random.Generator(np.random.Philox(derive_seed(seed, phase, "cut", row["prompt_uid"])))
    return (row, text[: places[int(rng.integers(len(places)))]]) if places else None
