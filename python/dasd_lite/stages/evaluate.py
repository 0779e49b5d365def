"""Evaluate a model: k answers to each question, accuracy with its standard error (paper section 7).

Input: questions with answers, benchmarks by name, and a model. Output: every graded answer. Invariant: an answer that
was cut off, or in which no final answer can be found, is counted as such and never as right.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dasd_lite.config.evaluate import EvaluateConfig
from dasd_lite.config.models import (
    Endpoint,
    Student,
    Teacher,
    Transformers,
    Vllm,
    engine_options,
    result_options,
)
from dasd_lite.config.options import with_options
from dasd_lite.config.reading import Reading
from dasd_lite.console import label, progress
from dasd_lite.data.asked import Asked, QuestionSet, asked_for, question_sets, refuse_other_rows
from dasd_lite.data.grades import GradeLog
from dasd_lite.data.handles import Evaluation, Model, model_path
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import Identity, identify, read_state, state_file
from dasd_lite.data.prompts import Prompts
from dasd_lite.data.records import GRADED, HIDDEN_TASKS, HIDDEN_TEXT, OWN_TASK, RIGHT, Prompt
from dasd_lite.data.references import Kind, kind_of
from dasd_lite.data.seeds import check_seed, derive_seed, digest
from dasd_lite.data.usage import Usage
from dasd_lite.data.writer import is_finished
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.grading import CheckedGrader, grade_all, grader_kind, open_grader
from dasd_lite.grading.choice import vote
from dasd_lite.grading.code import sandbox_name
from dasd_lite.grading.early_look import EarlyLook
from dasd_lite.grading.grade import UNDECIDED, VERDICTS, Grade, Grader
from dasd_lite.grading.math.normal import canonical
from dasd_lite.grading.statistics import Accuracy
from dasd_lite.inference import Completion, Request, Sampler, SamplingParams
from dasd_lite.inference.backends import model_identity, model_name, open_sampler
from dasd_lite.inference.collect import collect

VERSION = 3  # 1 had the question's uid in its seeds, 2 fewer columns and verdicts
GROWS = (
    *("config.num_samples", "config.max_tokens", "config.grader", "config.template"),
    *("inputs.prompts", "inputs.grader"),
)
"""What may change while the folder keeps its answers: it decides which are asked for, not what they are."""
_ASKED_FOR = {"prompts", "limit", "tasks", "teacher", "grader", *Reading.model_fields}
"""Options that decide which answers are asked for; the hash of the questions has them all."""


def evaluate(
    model: Model | Teacher | Sampler | str | PathLike[str],
    prompts: Prompts | Iterable[Prompt] | str | PathLike[str] | None = None,
    config: EvaluateConfig | None = None,
    *,
    out: str | PathLike[str],
    student: Student | None = None,
    grader: str | Grader | None = None,
    seed: int = 0,
    system: str | None = None,
    reuse: Iterable[str | PathLike[str]] = (),
    used: Usage | None = None,
    force: bool = False,
    **options: Any,
) -> Evaluation:
    """Let a model answer questions, and grade its answers.

    Args:
        model: What train returned, a model table, a folder of weights, or a name on the hub. A teacher, by its
            table or as a sampler, is evaluated as it is.
        prompts: Questions with answers, or their file; None: the file `config.prompts`, and `config.tasks`.
        config: Options of the stage.
        out: Folder to write. One that `evaluate` wrote before keeps its answers and gets those that are missing; with
            another grader they are graded again.
        student: How the model is run (transformers or vLLM, its number format); None: by transformers.
        grader: A grader by its name, or one of your own; None: the one that `config.grader` names.
        seed: Seed of every draw, with the question and the number of the answer: models are compared on the same draws.
        system: System message for questions of a file that have none.
        reuse: Folders that `evaluate` wrote, finished or not; answers that they have are only graded.
        used: Tokens of an endpoint that other stages have used, for its budget.
        force: Replace a folder that was made with other options.
        **options: Fields of EvaluateConfig, in place of those of `config`.

    Returns:
        The graded answers, with `.accuracy` and `.standard_error`.

    Raises:
        ConfigError: A wrong option or grader.
        DataError: A question without an answer to grade by, a benchmark that cannot be loaded, or a grader that does
            not return a Grade.
        CheckpointError: `out` was made with other options.

    Source: arXiv 2601.09088, section 7.
    """
    check_seed(seed)
    config, out = with_options(EvaluateConfig, config, options, "evaluate"), Path(out)
    prompts = config.prompts if prompts is None else prompts
    if prompts is None and not config.tasks:
        raise DataError("evaluate.prompts is not set; name a file of questions with answers, or benchmarks in tasks")
    own = None if prompts is None else Prompts.of(prompts, limit=config.limit, system=system, reading=config)
    sets = question_sets(config, own)
    grade = open_grader(grader or config.grader)
    weights, runs = _opened(model, student)
    if config.four_bit and not isinstance(runs, Transformers):
        raise ConfigError(f"evaluate.four_bit = true needs kind = 'transformers', not {getattr(runs, 'kind', runs)!r}")
    identity = _identity(config, seed, sets, weights, runs, grade)
    for folder in (out, *map(Path, reuse)):
        if (file := state_file(folder)) is not None:
            refuse_other_rows(sets, read_state(file).get("names", {}), folder)
    if is_finished(out, identity, force=force):
        return Evaluation(out)

    if needs_sandbox(sets, grade):
        sandbox_name()  # raises where there is none, before any answer is asked for
    for fault in reference_faults(sets, grade, "prompts" if own is None else own.path or "prompts"):
        raise DataError(fault)
    plan = list(asked_for(sets, seed))
    decides = {name: value for name, value in identity.config.items() if f"config.{name}" not in GROWS}
    uids = [
        digest("evaluate", VERSION, each.identity, each.index, identity.inputs["model"], decides)[:16] for each in plan
    ]
    with Journal(
        out,
        identity,
        GRADED,
        len(plan),
        keys=uids,
        limit={each.name: each.max_tokens for each in sets},
        columns=lambda position: plan[position].names(),
        table="graded",
        config=config,
        late=True,
    ) as journal:

        def request(position: int) -> Request:
            one = plan[position]
            # Without the model, so that two models are compared on the same draws.
            new_seed = derive_seed(seed, "evaluate", one.key, one.before, one.index)
            return Request(position, one.question.messages, one.max_tokens, new_seed)

        def row(completion: Completion) -> dict[str, Any]:
            one = plan[completion.position]
            num_tokens = completion.completion_tokens or len(completion.token_ids)
            early.look(completion.position, completion.text, completion.finish_reason, num_tokens)
            return {
                **one.columns(),
                "uid": uids[completion.position],
                "index": one.index,
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "prefix_bytes": 0,
                "num_tokens": num_tokens,
                "max_tokens": one.max_tokens,
            }

        name = label(out.parent.name, "evaluate")
        journal.take_over(map(Path, reuse))
        early = EarlyLook(name, plan, grade, num_done=len(journal.done()))
        timing = collect(
            journal,
            request,
            row,
            lambda before: open_sampler(runs, weights, before, four_bit=config.four_bit),
            SamplingParams(config.temperature, config.top_p),
            name,
            prices=runs.prices if isinstance(runs, Endpoint) else None,
            used=used,
        )
        grades = _grades(journal, plan, uids, grade, name)
        journal.columns = lambda position: plan[position].names() | grades[position]
        counts = _accuracy(sets, journal, plan, grades)
        if needs_sandbox(sets, grade):
            counts["sandbox"] = sandbox_name()
        journal.publish(counts | (own.counts if own is not None else {}), **timing)
    return Evaluation(out)


def _opened(
    model: Model | Teacher | Sampler | str | PathLike[str], student: Student | None
) -> tuple[Path | None, Teacher | Sampler]:
    """Return the weights of a model and the table that says how it is run; a teacher behind an endpoint has none."""
    if not isinstance(model, Model | Transformers | Vllm | str | PathLike):
        return None, model
    weights = model_path(model)
    if student is None:
        student = model if isinstance(model, Transformers | Vllm) else Transformers(model=str(weights))
    return weights, student


def _identity(
    config: EvaluateConfig,
    seed: int,
    sets: Sequence[QuestionSet],
    weights: Path | None,
    runs: Teacher | Sampler,
    grade: CheckedGrader,
) -> Identity:
    """Return what decides the content of the folder."""
    asked = {name: value for name, value in result_options(config).items() if name not in _ASKED_FOR}
    asked |= {"seed": seed, "student": _engine(runs), "grader": grade.name}
    model = weights if weights is not None else model_identity(runs)
    inputs = {"prompts": digest([each.fingerprint for each in sets]), "model": model, "grader": grade.code}
    names = {"grader": grade.name} | {each.name: each.origin for each in sets if each.origin}
    names |= {"teacher": model_name(runs)} if weights is None else {}
    return identify("evaluate", VERSION, asked, inputs, names=names, grows=GROWS)


def _engine(runs: Teacher | Sampler) -> dict[str, Any]:
    """Return the options of a model's table that can change its answers; of a server or a sampler, none."""
    return engine_options(runs) if isinstance(runs, Transformers | Vllm) else {}


def needs_sandbox(sets: Sequence[QuestionSet], grade: CheckedGrader) -> bool:
    """Return whether programs will be run."""
    if grade.is_own or grade.name not in ("auto", "code"):
        return False
    return any(kind_of(question.answer or "") == "code" for each in sets for question in each.questions)


def reference_faults(sets: Sequence[QuestionSet], grade: CheckedGrader, where: str) -> Iterator[str]:
    """Yield what makes questions impossible to grade, a line for each set and kind of fault.

    Args:
        sets: The questions.
        grade: Their grader.
        where: The file of the user's own.
    """
    for each in sets:
        place = where if each.name == OWN_TASK else f"evaluate.tasks: {each.name}"
        without = [question for question in each.questions if question.answer is None]
        if without:
            yield (
                f"{place}: {len(without):,} of {len(each.questions):,} questions have no answer to grade by, the first"
                f" is {without[0].name}; give each an `answer`, or leave it out"
            )
        faulty = [
            (question, fault)
            for question in each.questions
            if question.answer is not None and (fault := grade.fault(question.answer)) is not None
        ]
        if faulty:
            first, fault = faulty[0]
            shown = " ".join((first.answer or "").split()) if each.name not in HIDDEN_TASKS else HIDDEN_TEXT
            shown = shown if len(shown) <= 60 else f"{shown[:60]} …"
            more = f" ({len(faulty) - 1:,} more are like it)" if len(faulty) > 1 else ""
            name = first.name if first.where and first.where in first.name else f"{place}: question {first.name}"
            yield f"{name}: answer = {shown!r}: {fault}{more}"


def _grades(
    journal: Journal, plan: Sequence[Asked], uids: Sequence[str], grade: CheckedGrader, name: str
) -> list[dict[str, Any]]:
    """Return the columns of each answer's grade; what was graded before is read, unless something has changed."""
    codes = {kind: grade.code_of(kind) for kind in get_args(Kind)}
    keys: list[str] = []
    with GradeLog(journal.folder) as log, progress(f"{name}: grading", len(plan), "answers") as bar:
        open_rows: deque[int] = deque()

        def ungraded() -> Iterator[tuple[str, str]]:
            for batch in journal.batches(("completion", "finish_reason")):
                for text, reason in zip(*(batch[column].to_pylist() for column in batch.schema.names), strict=True):
                    one = plan[len(keys)]
                    # All that the grade depends on: an answer that was asked for again may have the uid of the old one.
                    keys.append(digest(uids[len(keys)], text, reason, codes[one.kind], one.reference)[:16])
                    if keys[-1] in log.known:
                        bar.advance()
                    elif reason == "length":  # its last number may be half of one
                        log.add(keys[-1], graded(Grade("no_answer", None), one.question))
                        bar.advance()
                    else:
                        open_rows.append(len(keys) - 1)
                        yield text, one.question.answer or ""

        for verdict in grade_all(grade, ungraded()):
            position = open_rows.popleft()
            log.add(keys[position], graded(verdict, plan[position].question))
            bar.advance()
        return [log.known[key] for key in keys]


def graded(verdict: Grade, question: Prompt) -> dict[str, Any]:
    """Return the columns that a grade has in a row."""
    own = RIGHT if verdict.verdict == "right" else _vote(verdict, question.answer or "")
    return {"grade": verdict.verdict, "extracted": verdict.extracted, "reason": verdict.reason, "vote": own}


def _vote(verdict: Grade, answer: str) -> str | None:
    """Return the same text for answers that mean the same; None where there is none to vote for."""
    kind = grader_kind(answer)
    if verdict.extracted is None or verdict.verdict == "no_answer" or kind == "code":
        return None  # programs that differ may do the same
    if kind == "choice":
        return vote(verdict.extracted, answer)
    return canonical(verdict.extracted)


def _accuracy(
    sets: Sequence[QuestionSet], journal: Journal, plan: Sequence[Asked], grades: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Count the grades of all sets, and of each: every answer has one of the five verdicts."""
    lengths: list[int] = []
    truncated: list[bool] = []
    for batch in journal.batches(("finish_reason", "num_tokens")):
        truncated += [reason == "length" for reason in batch["finish_reason"].to_pylist()]
        lengths += batch["num_tokens"].to_pylist()
    by_set: dict[str, list[int]] = {each.name: [] for each in sets}
    for position, each in enumerate(plan):
        by_set[each.task].append(position)

    def count(positions: Sequence[int]) -> dict[str, Any]:
        by_question: dict[tuple[str, str, int], list[str]] = {}
        for at in positions:
            one = plan[at]
            by_question.setdefault((one.task, one.key, one.before), []).append(grades[at]["grade"])
        verdicts = Counter(grades[at]["grade"] for at in positions)
        accuracy = Accuracy(
            questions=[(task, key, str(before)) for task, key, before in by_question],
            samples=np.array([len(own) for own in by_question.values()]),
            right=np.array([own.count("right") for own in by_question.values()]),
            undecided=np.array([sum(own.count(name) for name in UNDECIDED) for own in by_question.values()]),
        )
        return {
            "questions": accuracy.num_questions,
            "samples": len(positions),
            **{name: verdicts[name] for name in VERDICTS},
            "truncated": sum(truncated[at] for at in positions),
            "accuracy": accuracy.mean,
            "standard_error": accuracy.standard_error,
            "mean_tokens": sum(lengths[at] for at in positions) / len(positions),
        }

    tasks = {each.name: count(by_set[each.name]) | dict(each.source) for each in sets}
    return count(range(len(plan))) | {"tasks": tasks}
