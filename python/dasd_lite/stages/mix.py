"""Mixed-policy rollouts: the student starts an answer, the teacher finishes it (paper section 5).

Input: the rollouts that a phase before kept, the trained student, the teacher. The student answers each question, cut
off at `max_length_ratio` × the length of the teacher's answer. An answer that is cut off has drifted: it is dropped
from a random point of its second half on, and the teacher writes the rest. Finished answers that are wrong can be
rescued likewise, which is ours. Output: rollouts. Both halves are journals,
so the same call resumes after any stop.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.cutting import place_to_cut
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
from dasd_lite.grading import CheckedGrader, grade_all, open_grader
from dasd_lite.grading.grade import Grader
from dasd_lite.inference import Completion, Request, Sampler, SamplingParams
from dasd_lite.inference.backends import check_same_teacher, model_identity, model_name, open_sampler
from dasd_lite.inference.collect import collect, token_columns
from dasd_lite.inference.scorer import context_of

_WANTED = {
    "cut_off": "was cut off",
    "wrong": "was finished and wrong",
    "either": "was cut off, or finished and wrong",
}
VERSION = 3  # 2 cut at spaces and line breaks only, and had the phase's name in its seeds
GROWS = (
    *("config.num_prompts", "config.max_tokens", "config.rescue", "config.grader"),
    *("inputs.selected", "inputs.model", "inputs.grader"),
)
"""What may change while the folder keeps its answers: it decides which are asked for, not what they are."""
_QUESTION = ("prompt_uid", "domain", "answer", "index")  # columns that do not decide an answer


def mix(
    kept: Kept | str | PathLike[str],
    model: Model | str | PathLike[str],
    teacher: Teacher | Sampler,
    config: MixConfig | None = None,
    *,
    out: str | PathLike[str],
    student: Student | None = None,
    seed: int = 0,
    grader: str | Grader = "auto",
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
        grader: Finds wrong answers, if `config.rescue` asks for them: its name, or one of your own.
        sampled: The rollouts that `kept` was selected from: their teacher must be this one.
        reuse: Folders that `mix` wrote, finished or not; answers that they have are not asked for.
        used: What other stages have asked of the teacher; it counts against its budget.
        force: Replace a folder that was made with other options.
        **options: Fields of MixConfig, in place of those of `config`.

    Returns:
        The mixed rollouts: their first `prefix_bytes` bytes are the student's.

    Raises:
        ConfigError: A wrong option.
        DataError: No answer of the student is to be rescued, or the rollouts are another teacher's.
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
    grade = None if config.rescue == "cut_off" else open_grader(grader)
    if grade is not None:
        asked |= {"grader": grade.name}
        inputs |= {"grader": grade.code}
    names = {"teacher": model_name(teacher)}
    identity = identify("mix", VERSION, asked, inputs, names=names, brought=("teacher",), grows=GROWS)
    if is_finished(out, identity, force=force):
        return Rollouts(out)
    if sampled is not None:
        check_same_teacher(sampled, teacher, identity)
    if not (out / "manifest.json").exists():  # a finished folder stays so until its second half grows
        begin(out, identity, config)
    others = list(map(Path, reuse))
    questions = _questions(selected, config, seed)
    halves = [folder / "student" for folder in others]
    answered = _student_answers(questions, model, student, config, out, identity, seed, halves)
    started, kinds = to_rescue(answered, config.rescue, grade)
    reads = _teacher_chat(teacher)
    chats = [Chat(model), *([] if reads is None else [reads])]
    placed = [pair for row in started if (pair := _cut_off(row, chats, seed))]
    cut = _with_room(placed, teacher, reads, out)
    counts = {
        "prompts": len(questions),
        **kinds,
        "no_border": len(started) - len(placed),  # left out: nowhere to cut
        "over_context": len(placed) - len(cut),  # left out: no room for the teacher
        "rollouts": len(cut),
    }
    if not cut:
        raise DataError(
            f"{out}: none of {len(questions)} student answers {_WANTED[config.rescue]}, so there is nothing for the"
            f" teacher to finish ({', '.join(f'{name} {number}' for name, number in counts.items())}); lower"
            f" mix.max_length_ratio (now {config.max_length_ratio:g} × the teacher's length), or drop this phase"
        )
    if kinds.get("ungraded"):
        note(
            "mix.rescue: finished answers that cannot be graded, as their question has no `answer` or they cannot be"
            f" compared with it: {kinds['ungraded']:,}"
        )
    uids = [_uid(identity, "teacher", base["messages"], prefix, base["uid"]) for base, prefix in cut]

    def of_question(position: int) -> dict[str, Any]:
        return {name: cut[position][0][name] for name in _QUESTION}

    with Journal(
        out,
        identity,
        ROLLOUT,
        len(cut),
        keys=uids,
        limit=config.max_tokens,
        columns=of_question,
        config=config,
    ) as journal:
        name = label(out.parent.name, "teacher finishes")
        if taken := journal.take_over(others):
            note(f"{name}: {taken:,} answers are there already, in folders to reuse")
        timing = _teacher_ends(journal, cut, uids, teacher, config, seed, name, used)
        journal.publish(counts, **timing)
    return Rollouts(out)


def _uid(identity: Identity, half: str, messages: Any, *more: object) -> str:
    """Return a hash of all that decides an answer of one half, "student" or "teacher"."""
    other = "teacher" if half == "student" else "student"
    decides = {k: v for k, v in identity.config.items() if f"config.{k}" not in GROWS and k != other}
    model = identity.inputs["model" if half == "student" else "teacher"]
    return digest("mix", VERSION, half, messages, *more, model, decides)[:16]


def _teacher_ends(
    journal: Journal,
    cut: list[tuple[dict[str, Any], str]],
    uids: list[str],
    teacher: Teacher | Sampler,
    config: MixConfig,
    seed: int,
    name: str,
    used: Usage | None,
) -> dict[str, float]:
    """Let the teacher write the rest of each answer; return its timing."""

    def row(completion: Completion) -> dict[str, Any]:
        base, prefix = cut[completion.position]
        return {
            **base,
            "uid": uids[completion.position],
            "completion": prefix + completion.text,
            "finish_reason": completion.finish_reason,
            "prefix_bytes": len(prefix.encode()),
            "max_tokens": config.max_tokens,
            **token_columns(completion),
        }

    def request(position: int) -> Request:
        base, prefix = cut[position]
        new_seed = derive_seed(seed, "mix", "teacher", base["messages"], prefix)
        return Request(position, tuple(base["messages"]), config.max_tokens, new_seed, prefix)

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
    """Let the student answer each question up to its limit; return the answers without token columns."""
    folder = out / "student"
    identity = replace(parent, stage="mix.student", folders={})
    columns = [name for name in ROLLOUT.names if name not in ("token_ids", "logprobs", "token_bytes")]
    limits = [math.ceil(config.max_length_ratio * question["length"]) for question in questions]
    times = times_before(digest(question["messages"]) for question in questions)
    uids = [
        _uid(identity, "student", question["messages"], before, limit)
        for question, before, limit in zip(questions, times, limits, strict=True)
    ]
    if not is_finished(folder, identity):
        with Journal(
            folder,
            identity,
            ROLLOUT,
            len(questions),
            keys=uids,
            columns=lambda position: {name: questions[position][name] for name in _QUESTION},
            config=config,
        ) as journal:

            def request(position: int) -> Request:
                messages = questions[position]["messages"]
                new_seed = derive_seed(seed, "mix", "student", messages, times[position])
                return Request(position, tuple(messages), limits[position], new_seed)

            def row(completion: Completion) -> dict[str, Any]:
                question = {key: value for key, value in questions[completion.position].items() if key != "length"}
                return {
                    **question,
                    "uid": uids[completion.position],
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
    return [row for batch in batches(folder, "rollouts", columns) for row in batch.to_pylist()]


def to_rescue(
    answers: list[dict[str, Any]], rescue: str, grade: CheckedGrader | None
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return the student's answers that the teacher is to finish, and how many there are of each kind.

    Of a wrong answer only the thinking is left: whatever follows a finished thought, the teacher cannot think again.
    """
    cut_off = [row for row in answers if row["finish_reason"] == "length"]
    if grade is None:
        return cut_off, {"cut_off": len(cut_off)}
    finished = [row for row in answers if row["finish_reason"] == "stop"]
    known = [row for row in finished if row["answer"] is not None]
    verdicts = Counter[str]()
    wrong = []
    for row, verdict in zip(known, grade_all(grade, ((r["completion"], r["answer"]) for r in known)), strict=True):
        verdicts[verdict.verdict] += 1
        if verdict.verdict in ("wrong", "no_answer"):
            wrong.append(row | {"completion": row["completion"].partition("</think>")[0]})
    ungraded = len(finished) - len(known) + verdicts["unparseable"] + verdicts["unknown"]
    counts = {"cut_off": len(cut_off), "wrong": len(wrong), "ungraded": ungraded}
    return wrong if rescue == "wrong" else [*cut_off, *wrong], counts


def _teacher_chat(teacher: Teacher | Sampler) -> Chat | None:
    """Return the teacher's tokenizer, if it is known."""
    if isinstance(teacher, Endpoint):
        return None if teacher.tokenizer is None else Chat(model_folder(teacher.tokenizer))
    return Chat(model_folder(teacher.model)) if isinstance(teacher, Transformers | Vllm) else None


def _with_room(
    cut: list[tuple[dict[str, Any], str]], teacher: Teacher | Sampler, chat: Chat | None, out: Path
) -> list[tuple[dict[str, Any], str]]:
    """Leave out those whose prompt and prefix fill the teacher's context, where its tokenizer `chat` is known.

    The context is kept in `out`: a server may report another one, or none, when the call resumes, and positions in
    the journal must mean the same rollouts then.
    """
    if chat is None:
        return cut
    kept = out / "context.json"
    if not kept.exists():
        write_atomic(kept, json.dumps(context_of(teacher, chat)))
    context = json.loads(kept.read_text(encoding="utf-8"))
    return [pair for pair in cut if len(chat.prompt_ids(pair[0]["messages"], pair[1])) < context]


def _cut_off(row: dict[str, Any], chats: Sequence[Chat], seed: int) -> tuple[dict[str, Any], str] | None:
    """Return the row's prompt columns, and its text up to a random token boundary in its second half, if it has one."""
    text: str = row.pop("completion")
    rng = np.random.Generator(np.random.Philox(derive_seed(seed, "cut", row["uid"])))
    at = int(rng.integers(len(text) // 2, len(text))) if text else 0
    place = place_to_cut(text, at, chats)
    return None if place is None else (row, text[:place])
