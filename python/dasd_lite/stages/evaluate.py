"""Evaluate a model: k answers to each question, accuracy with its standard error (paper section 7).

Input: questions with answers, and a model. Output: every graded answer. Invariant: an answer that was cut off, or in
which no final answer can be found, is counted as such and never as right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dasd_lite.config.models import Student, Table, Transformers, engine_options, result_options
from dasd_lite.config.options import with_options
from dasd_lite.config.reading import Reading
from dasd_lite.config.stages import EvaluateConfig
from dasd_lite.console import label
from dasd_lite.data.handles import Evaluation, Model, model_path
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import identify
from dasd_lite.data.prompts import Prompts
from dasd_lite.data.records import GRADED, OWN_TASK, RIGHT, Prompt, times_before
from dasd_lite.data.seeds import check_seed, derive_seed, digest
from dasd_lite.data.writer import is_finished
from dasd_lite.errors import DataError
from dasd_lite.grading import open_grader
from dasd_lite.grading.grade import VERDICTS, Grade, Grader
from dasd_lite.grading.statistics import standard_error
from dasd_lite.inference import Completion, Request, SamplingParams
from dasd_lite.inference.backends import open_sampler
from dasd_lite.inference.collect import collect

VERSION = 3  # 1 had the question's uid in its seeds, 2 fewer columns and verdicts
GROWS = ("config.num_samples", "config.max_tokens", "config.grader", "inputs.prompts", "inputs.grader")
"""What may change while the folder keeps its answers: it decides which are asked for, not what they are."""


def evaluate(
    model: Model | Student | str | PathLike[str],
    prompts: Prompts | Iterable[Prompt] | str | PathLike[str] | None = None,
    config: EvaluateConfig | None = None,
    *,
    out: str | PathLike[str],
    student: Student | None = None,
    grader: str | Grader | None = None,
    seed: int = 0,
    system: str | None = None,
    reuse: Iterable[str | PathLike[str]] = (),
    force: bool = False,
    **options: Any,
) -> Evaluation:
    """Let a model answer questions, and grade its answers.

    Args:
        model: What train returned, a model table, a folder of weights, or a name on the hub.
        prompts: Questions with answers, or their file; None: the file `config.prompts`.
        config: Options of the stage.
        out: Folder to write. One that `evaluate` wrote before keeps its answers and gets those that are missing; with
            another grader they are graded again.
        student: How the model is run (transformers or vLLM, its number format); None: by transformers.
        grader: A grader by its name, or one of your own; None: the one that `config.grader` names.
        seed: Seed of every draw, with the question and the number of the answer: models are compared on the same draws.
        system: System message for questions of a file that have none.
        reuse: Folders that `evaluate` wrote, finished or not; answers that they have are only graded.
        force: Replace a folder that was made with other options.
        **options: Fields of EvaluateConfig, in place of those of `config`.

    Returns:
        The graded answers, with `.accuracy` and `.standard_error`.

    Raises:
        ConfigError: A wrong option or grader.
        DataError: A question without an answer to grade by, or a grader that does not return a Grade.
        CheckpointError: `out` was made with other options.

    Source: arXiv 2601.09088, section 7.
    """
    check_seed(seed)
    config, out = with_options(EvaluateConfig, config, options, "evaluate"), Path(out)
    prompts = config.prompts if prompts is None else prompts
    if prompts is None:
        raise DataError("evaluate.prompts is not set; name a file of questions with answers")
    questions = Prompts.of(prompts, limit=config.limit, system=system, reading=config)
    weights = model_path(model)
    if student is None:
        student = model if isinstance(model, Table) else Transformers(model=str(weights))
    grade = open_grader(grader or config.grader)
    asked = {k: v for k, v in result_options(config).items() if k not in ("prompts", "grader", *Reading.model_fields)}
    del asked["limit"]  # in the fingerprint of the questions
    asked |= {"seed": seed, "student": engine_options(student), "grader": grade.name}
    inputs: dict[str, Path | str] = {"prompts": questions.fingerprint, "model": weights}
    inputs |= {"grader": grade.code} if grade.code is not None else {}
    identity = identify("evaluate", VERSION, asked, inputs, names={"grader": grade.name}, grows=GROWS)
    if is_finished(out, identity, force=force):
        return Evaluation(out)

    for question in questions:
        if question.answer is None:
            where = questions.path or "prompts"
            raise DataError(f"{where}: question {question.name} has no answer to grade by; give it `answer`")
    times = times_before(question.key for question in questions)
    plan = [
        (question, before, index)
        for question, before in zip(questions, times, strict=True)
        for index in range(config.num_samples)
    ]
    decides = {name: value for name, value in identity.config.items() if f"config.{name}" not in GROWS}
    uids = [
        digest("evaluate", VERSION, q.key, before, index, identity.inputs["model"], decides)[:16]
        for q, before, index in plan
    ]
    with Journal(
        out,
        identity,
        GRADED,
        len(plan),
        keys=uids,
        limit=config.max_tokens,
        columns=lambda position: plan[position][0].names(),
        table="graded",
        config=config,
    ) as journal:

        def request(position: int) -> Request:
            question, before, index = plan[position]
            # Without the model, so that two models are compared on the same draws.
            new_seed = derive_seed(seed, "evaluate", question.key, before, index)
            return Request(position, question.messages, config.max_tokens, new_seed)

        def row(completion: Completion) -> dict[str, Any]:
            question, _, index = plan[completion.position]
            return {
                **question.columns(),
                "uid": uids[completion.position],
                "index": index,
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "prefix_bytes": 0,
                "num_tokens": len(completion.token_ids),
                "task": OWN_TASK,
                "max_tokens": config.max_tokens,
                **_graded(completion.text, completion.finish_reason, question, grade),
            }

        name = label(out.parent.name, "evaluate")
        journal.take_over(
            map(Path, reuse),
            renewed=lambda at, row: _graded(row["completion"], row["finish_reason"], plan[at][0], grade),
        )
        params = SamplingParams(config.temperature, config.top_p)
        timing = collect(journal, request, row, lambda _: open_sampler(student, weights), params, name)
        grades = _grades(journal, [question for question, _, _ in plan], grade)
        journal.columns = lambda position: plan[position][0].names() | grades[position]
        journal.publish(_accuracy(journal, grades, len(questions)) | questions.counts, **timing)
    return Evaluation(out)


def _graded(text: str, finish_reason: str, question: Prompt, grade: Grader) -> dict[str, Any]:
    cut_off = finish_reason == "length"  # its last number may be half of one
    verdict = Grade("no_answer", None) if cut_off else grade(text, question.answer or "")
    vote = RIGHT if verdict.verdict == "right" else verdict.extracted
    return {"grade": verdict.verdict, "extracted": verdict.extracted, "reason": verdict.reason, "vote": vote}


def _grades(journal: Journal, questions: list[Prompt], grade: Grader) -> list[dict[str, Any]]:
    """Return the grade of each answer; answers of an earlier call are graded again if anything may have changed."""
    if not journal.has_grown:
        rows = (batch.to_pylist() for batch in journal.batches(("grade", "extracted", "reason", "vote")))
        return [row for batch in rows for row in batch]
    grades: list[dict[str, Any]] = []
    for batch in journal.batches(("completion", "finish_reason")):
        for row in batch.to_pylist():
            grades.append(_graded(row["completion"], row["finish_reason"], questions[len(grades)], grade))
    return grades


def _accuracy(journal: Journal, grades: list[dict[str, Any]], questions: int) -> dict[str, Any]:
    """Count the grades: each answer has one of the five verdicts, and those that were cut off have no answer."""
    verdicts = Counter(grade["grade"] for grade in grades)
    tokens = truncated = 0
    for batch in journal.batches(("finish_reason", "num_tokens")):
        truncated += batch["finish_reason"].to_pylist().count("length")
        tokens += sum(batch["num_tokens"].to_pylist())
    right = np.array([grade["grade"] == "right" for grade in grades], dtype=np.float64)
    means = right.reshape(questions, -1).mean(axis=1)
    return {
        "questions": questions,
        "samples": len(grades),
        **{name: verdicts[name] for name in VERDICTS},
        "truncated": truncated,
        "accuracy": float(means.mean()),
        "standard_error": standard_error(means),
        "mean_tokens": tokens / len(grades),
    }
