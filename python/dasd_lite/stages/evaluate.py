"""Evaluate a model: k samples a question, accuracy with its standard error (paper section 7).

Reads questions with answers and a model; writes every graded answer. An answer that was cut off or in
which no answer is found is counted by name, and never as right.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dasd_lite.config.models import Student, engine, semantic
from dasd_lite.config.stages import EvaluateConfig
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import identify, read_manifest
from dasd_lite.data.prompts import read_prompts
from dasd_lite.data.records import GRADED, Prompt
from dasd_lite.data.seeds import derive_seed, digest
from dasd_lite.data.writer import is_finished
from dasd_lite.errors import DataError
from dasd_lite.grading.math import Grade, grade
from dasd_lite.inference import Completion, Request, SamplingParams, open_sampler
from dasd_lite.inference.collect import collect

VERSION = 1


def run(
    model: Path,
    student: Student,
    config: EvaluateConfig,
    out: Path,
    *,
    seed: int,
    system: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Evaluate the weights in `model`, run as `student` says, into `out`; returns its manifest."""
    if config.prompts is None:
        raise DataError("evaluate.prompts is not set; name a file of questions with answers")
    options = {k: v for k, v in semantic(config).items() if k != "prompts"}
    options |= {"seed": seed, "system": system, "student": engine(student)}
    identity = identify("evaluate", VERSION, options, {"prompts": config.prompts, "model": model})
    if is_finished(out, identity, force=force):
        return read_manifest(out)

    questions = read_prompts(config.prompts, limit=config.limit, system=system)
    for question in questions:
        if question.answer is None:
            raise DataError(f"{config.prompts}: question {question.uid} has no answer to grade by; give it `answer`")
    plan = [(question, index) for question in questions for index in range(config.num_samples)]
    with Journal(out, identity, GRADED, len(plan), table="graded", config=config) as journal:

        def request(position: int) -> Request:
            question, index = plan[position]
            # Seeds do not depend on the model: two models are compared on the same draws.
            new_seed = derive_seed(seed, "evaluate", question.uid, index)
            return Request(position, question.messages, config.max_tokens, new_seed)

        def row(completion: Completion) -> dict[str, Any]:
            question, index = plan[completion.position]
            return _graded(completion, question, index, identity.fingerprint)

        params = SamplingParams(config.temperature, config.top_p)
        label = f"{out.parent.name}: evaluate"
        timing = collect(journal, request, row, lambda _: open_sampler(student, model), params, label)
        return journal.publish(_accuracy(journal, len(questions), config.num_samples), **timing)


def _graded(completion: Completion, question: Prompt, index: int, fingerprint: str) -> dict[str, Any]:
    cut_off = completion.finish_reason == "length"  # what it says last may be half a number
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
    """Count the grades; the standard error is over questions, whose samples are not independent."""
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
    error = float(means.std(ddof=1) / np.sqrt(questions)) if questions > 1 else float("nan")
    return {
        "questions": questions,
        "samples": len(right),
        **{name: grades[name] for name in ("right", "wrong", "unparseable")},
        "truncated": truncated,
        "accuracy": float(means.mean()),
        "standard_error": error,
        "mean_tokens": tokens / len(right),
    }
