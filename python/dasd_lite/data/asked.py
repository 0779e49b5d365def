"""What an evaluation asks: the user's own questions and the benchmarks, each with its limits.

Input: a recipe's table, and the questions of its file. Output: one `QuestionSet` for each. Invariant: what a model is
asked as its i-th answer to a question depends on the question, i and the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dasd_lite.config.evaluate import EvaluateConfig, TaskConfig
from dasd_lite.data.choices import shuffled, with_order
from dasd_lite.data.prompts import Prompts
from dasd_lite.data.records import OWN_TASK, Message, Prompt, times_before
from dasd_lite.data.references import Kind, Tests, kind_of, read_choices, read_tests
from dasd_lite.data.seeds import digest
from dasd_lite.data.tasks.load import Task, load_task
from dasd_lite.errors import DataError

_STATES_ROWS = " rows "


@dataclass(frozen=True)
class QuestionSet:
    """Questions whose accuracy is one figure.

    Attributes:
        name: OWN_TASK, or the name of the benchmark.
        questions: In order.
        num_samples: Answers to each.
        max_tokens: Longest answer.
        template: Text around each question, with {prompt}; None: it is asked as it is.
        source: Repository, revision and hash of the rows of a benchmark; empty for the user's own.
    """

    name: str
    questions: tuple[Prompt, ...]
    num_samples: int
    max_tokens: int
    template: str | None = None
    source: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides which answers are asked for."""
        questions = [(question.uid, question.columns()) for question in self.questions]
        return digest(self.name, questions, self.num_samples, self.max_tokens)

    @property
    def origin(self) -> str:
        """`REPO@REVISION rows HASH`; "" for the user's own."""
        if not self.source:
            return ""
        return f"{self.source['repo']}@{self.source['revision']}{_STATES_ROWS}{self.source['checksum']}"


@dataclass(frozen=True)
class Asked:
    """One answer that is asked for.

    Attributes:
        task: Name of the set.
        question: As it is asked this time: of a question with options, their order is drawn.
        key: Hash of the question as the file has it.
        before: How often the same question has occurred before it.
        index: Number of the answer.
        max_tokens: Its longest.
    """

    task: str
    question: Prompt
    key: str
    before: int
    index: int
    max_tokens: int
    template: str | None = None
    """Text around the question, which its key leaves out."""

    @property
    def identity(self) -> list[Any]:
        """What decides which question it is, for a uid: two sets may have the same one, with other limits."""
        return [self.task, self.key, self.before, *([self.template] if self.template is not None else [])]

    @property
    def reference(self) -> str:
        """Hash of the reference answer."""
        return _hashed(self.question.answer or "")

    @property
    def kind(self) -> Kind:
        """How the reference asks to be graded."""
        return kind_of(self.question.answer or "")

    def names(self) -> dict[str, Any]:
        """Return the columns on which the answer does not depend."""
        return {**self.question.names(), "answer": _short(self.question.answer), "task": self.task}

    def columns(self) -> dict[str, Any]:
        """Return the columns that its row has for the question."""
        return {"messages": list(self.question.messages), **self.names()}


def question_sets(config: EvaluateConfig, prompts: Prompts | None) -> list[QuestionSet]:
    """Return what is asked; loads the benchmarks.

    Args:
        config: The table of the recipe.
        prompts: The user's own questions; None: there are none.

    Raises:
        DataError: Benchmarks that cannot be loaded, a line for each.
    """
    sets = []
    if prompts is not None:
        own = tuple(prompts), config.num_samples, config.own_max_tokens, config.template
        sets.append(QuestionSet(OWN_TASK, *own))
    faults = []
    for wanted in config.task_configs:
        try:
            task = open_task(wanted, config.tasks_folder)
        except DataError as error:
            faults.append(str(error))
            continue
        sets.append(
            QuestionSet(
                wanted.name,
                task.questions,
                wanted.num_samples or config.num_samples,
                wanted.max_tokens or config.max_tokens or task.benchmark.max_tokens,
                source={"repo": task.benchmark.repo, "revision": task.revision, "checksum": task.checksum},
            )
        )
    if faults:
        raise DataError("\n".join(faults))
    return sets


def open_task(task: TaskConfig, folder: Path | None) -> Task:
    """Load a benchmark, once per process.

    Raises:
        DataError: It cannot be loaded.
    """
    return _load(task.name, folder, task.limit)


@lru_cache(maxsize=16)
def _load(name: str, folder: Path | None, limit: int | None) -> Task:
    return load_task(name, folder=folder, limit=limit)


def refuse_other_rows(sets: Sequence[QuestionSet], names: Mapping[str, str], where: Path) -> None:
    """Raise DataError if a benchmark had other rows at the same revision when `where` was written.

    `names` are those in its manifest.
    """
    for each in sets:
        before = names.get(each.name, each.origin)
        at, _, rows = each.origin.partition(_STATES_ROWS)
        has_commit = not at.endswith("@")  # a file in a folder of the user's may change
        if has_commit and before != each.origin and before.partition(_STATES_ROWS)[0] == at:
            raise DataError(
                f"evaluate.tasks: {each.name}: {at} has other rows now than when {where} was written (hash {rows[:12]}"
                f" now, {before.partition(_STATES_ROWS)[2][:12]} then); restore those rows, or use another out folder"
            )


def asked_for(sets: Sequence[QuestionSet], seed: int) -> Iterator[Asked]:
    """Yield every answer that is asked for: by set, by question, by number."""
    for each in sets:
        keys = [question.key for question in each.questions]
        for question, key, before in zip(each.questions, keys, times_before(keys), strict=True):
            for index in range(each.num_samples):
                shown = _in_template(_ordered(question, key, index, seed), each.template)
                yield Asked(each.name, shown, key, before, index, each.max_tokens, each.template)


def _ordered(question: Prompt, key: str, index: int, seed: int) -> Prompt:
    if question.answer is None or kind_of(question.answer) != "choice":
        return question
    return with_order(question, shuffled(read_choices(question.answer), key, index, seed))


def _in_template(question: Prompt, template: str | None) -> Prompt:
    """Put a question into a template; options and programs say by themselves how they are answered."""
    if template is None or (question.answer is not None and kind_of(question.answer) != "math"):
        return question
    *before, last = question.messages
    text: Message = {**last, "content": template.replace("{prompt}", last["content"])}
    return replace(question, messages=(*before, text))


def _short(answer: str | None) -> str | None:
    """Return a reference as rows keep it: of tests, which may be megabytes, their number and a hash."""
    return answer if answer is None or kind_of(answer) != "code" else _summary(answer)


@lru_cache(maxsize=4096)  # there are many answers to each question
def _summary(answer: str) -> str:
    tests = read_tests(answer)
    words = f"{len(tests.tests):,} tests{' and private ones' if tests.private else ''}, hash {_hashed(answer)[:12]}"
    return Tests((), tests.function, summary=words).encode()


@lru_cache(maxsize=4096)
def _hashed(answer: str) -> str:
    return digest(answer)
