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
from dasd_lite.data.records import GRADED, Prompt
from dasd_lite.data.seeds import check_seed, derive_seed, digest
from dasd_lite.data.writer import is_finished
from dasd_lite.errors import DataError
from dasd_lite.grading import open_grader
from dasd_lite.grading.grade import Grade, Grader
from dasd_lite.inference import Completion, Request, SamplingParams
from dasd_lite.inference.backends import open_sampler
from dasd_lite.inference.collect import collect
from dasd_lite.method.accuracy import standard_error

VERSION = 1


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
    force: bool = False,
    **options: Any,
) -> Evaluation:
    """Let a model answer questions, and grade its answers.

    Args:
        model: What train returned, a model table, a folder of weights, or a name on the hub.
        prompts: Questions with answers, or their file; None: the file `config.prompts`.
        config: Options of the stage.
        out: Folder to write.
        student: How the model is run (transformers or vLLM, its number format); None: by transformers.
        grader: A grader by its name, or one of your own; None: the one that `config.grader` names.
        seed: Seed of every draw, with the question's uid and the number of the answer: models are compared on the
            same draws.
        system: System message for questions of a file that have none.
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
    asked |= {"seed": seed, "system": questions.system, "limit": questions.limit}
    asked |= {"student": engine_options(student), "grader": grade.name}
    inputs: dict[str, Path | str] = {"prompts": questions.fingerprint, "model": weights}
    inputs |= {"grader": grade.code} if grade.code is not None else {}
    identity = identify("evaluate", VERSION, asked, inputs)
    if is_finished(out, identity, force=force):
        return Evaluation(out)

    for question in questions:
        if question.answer is None:
            where = questions.path or "prompts"
            raise DataError(f"{where}: question {question.name} has no answer to grade by; give it `answer`")
    plan = [(question, index) for question in questions for index in range(config.num_samples)]
    with Journal(out, identity, GRADED, len(plan), table="graded", config=config) as journal:

        def request(position: int) -> Request:
            question, index = plan[position]
            # Without the model, so that two models are compared on the same draws.
            new_seed = derive_seed(seed, "evaluate", question.uid, index)
            return Request(position, question.messages, config.max_tokens, new_seed)

        def row(completion: Completion) -> dict[str, Any]:
            question, index = plan[completion.position]
            return _graded(completion, question, index, identity.fingerprint, grade)

        params = SamplingParams(config.temperature, config.top_p)
        timing = collect(
            journal, request, row, lambda _: open_sampler(student, weights), params, label(out.parent.name, "evaluate")
        )
        journal.publish(_accuracy(journal, len(questions), config.num_samples) | questions.counts, **timing)
    return Evaluation(out)


def _graded(completion: Completion, question: Prompt, index: int, fingerprint: str, grade: Grader) -> dict[str, Any]:
    cut_off = completion.finish_reason == "length"  # its last number may be half of one
    verdict = Grade("unparseable", None) if cut_off else grade(completion.text, question.answer or "")
    return {
        **question.columns(),
        "uid": digest(fingerprint, question.uid, index)[:16],
        "index": index,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "prefix_bytes": 0,
        "grade": verdict.verdict,
        "extracted": verdict.extracted,
        "num_tokens": len(completion.token_ids),
    }


def _accuracy(journal: Journal, questions: int, num_samples: int) -> dict[str, Any]:
    """Count the grades."""
    grades: Counter[str] = Counter()
    right: list[bool] = []
    truncated = tokens = 0
    for batch in journal.batches(("grade", "finish_reason", "num_tokens")):
        verdicts = batch["grade"].to_pylist()
        grades.update(verdicts)
        right += [verdict == "right" for verdict in verdicts]
        truncated += batch["finish_reason"].to_pylist().count("length")
        tokens += sum(batch["num_tokens"].to_pylist())
    means = np.array(right, dtype=np.float64).reshape(questions, num_samples).mean(axis=1)
    return {
        "questions": questions,
        "samples": len(right),
        **{name: grades[name] for name in ("right", "wrong", "unparseable")},
        "truncated": truncated,
        "accuracy": float(means.mean()),
        "standard_error": standard_error(means),
        "mean_tokens": tokens / len(right),
    }
