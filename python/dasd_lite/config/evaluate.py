"""What is evaluated, and how it is graded: the table `evaluate`."""

from __future__ import annotations

import difflib
from collections import Counter
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, PositiveInt, Tag, model_validator

from dasd_lite.config.models import EXECUTION, BuiltIn, FilePath, Probability, Table, Temperature
from dasd_lite.config.reading import DataPath, Reading
from dasd_lite.config.tasks import TASKS

GRADERS = ("auto", "math", "choice", "code")
"""The built-in graders."""

OWN_MAX_TOKENS = 32768
"""Longest answer to a question of the user's own, unless evaluate.max_tokens says otherwise."""


def _task_name(name: str) -> str:
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.4)
        raise ValueError(f"did you mean {near[0]!r}?" if near else f"should be {', '.join(map(repr, TASKS))}")
    return name


def _once_each(tasks: list[Any]) -> list[Any]:
    names = Counter(task if isinstance(task, str) else task.name for task in tasks)
    for name, count in names.items():
        if count > 1:
            raise ValueError(f"{name!r} is there {count} times; each benchmark can be there once")
    return tasks


def _has_prompt(template: str | None) -> str | None:
    if template is not None and template.count("{prompt}") != 1:
        raise ValueError("should contain {prompt} once, which stands for the question")
    return template


TaskName = Annotated[str, AfterValidator(_task_name)]


class TaskConfig(Table):
    """A benchmark, with limits of its own."""

    name: TaskName
    """Name of the benchmark; docs/benchmarks.md lists them."""
    limit: PositiveInt | None = None
    """Ask only the first questions, up to this number."""
    num_samples: PositiveInt | None = None
    """Answers per question. Default: evaluate.num_samples."""
    max_tokens: PositiveInt | None = None
    """Maximum tokens of an answer. Default: evaluate.max_tokens, or the paper's for this benchmark."""


Task = Annotated[
    Annotated[TaskName, Tag("name")] | Annotated[TaskConfig, Tag("table")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "table"),
]


class EvaluateConfig(Reading):
    """Accuracy on questions with known answers (paper section 7)."""

    prompts: DataPath | None = None
    """File of questions with their `answer`, as prompts.path. Without it and without tasks, nothing is evaluated."""
    limit: PositiveInt | None = None
    """Use only the first of these questions, up to this number."""
    tasks: Annotated[list[Task], AfterValidator(_once_each)] = Field(default=[])
    """Benchmarks by name, e.g. ["aime25", { name = "gpqa-diamond", num_samples = 8 }]; docs/benchmarks.md lists
    them."""
    tasks_folder: Annotated[FilePath | None, EXECUTION] = None
    """Folder with the files of the benchmarks, for machines without a network. Default: the hub's cache, then the
    hub."""
    template: Annotated[str | None, AfterValidator(_has_prompt)] = None
    """Text around the questions of `prompts`, such as "{prompt} Answer in \\boxed{}."; {prompt} stands for
    the question. Questions with options or tests stay as they are, and benchmarks have templates of their own."""
    num_samples: PositiveInt = 4
    """Answers per question (the paper: 64)."""
    temperature: Temperature = 1.0
    """Sampling temperature."""
    top_p: Probability = 1.0
    """Nucleus."""
    max_tokens: PositiveInt | None = None
    """Maximum tokens of an answer, in the student's tokens. Answers that reach it count as truncated. Default: 32,768
    for `prompts`, and the paper's limit for each of the benchmarks."""
    grader: Annotated[str, AfterValidator(BuiltIn(GRADERS))] = "auto"
    """auto: by the reference answer: its options, its tests, or else as mathematics. math, choice, code: always this
    one. package.module:attribute: a grader of your own."""
    teacher: bool = False
    """Evaluate the teacher too, as a ceiling for the student; an endpoint is paid for it."""
    four_bit: bool = False
    """Load the student's weights in 4 bits (NF4) to evaluate it on a small card; transformers only."""

    @model_validator(mode="after")
    def _limit_has_prompts(self) -> EvaluateConfig:
        if self.limit is not None and self.prompts is None and self.tasks:
            raise ValueError(
                f"limit = {self.limit} is for prompts, which are not set; a task has a limit of its own: tasks ="
                f' [{{ name = "{self.task_configs[0].name}", limit = {self.limit} }}]'
            )
        return self

    @model_validator(mode="after")
    def _teacher_has_questions(self) -> EvaluateConfig:
        if self.teacher and not self.has_questions:
            raise ValueError("teacher = true needs questions; set prompts or tasks")
        return self

    @property
    def has_questions(self) -> bool:
        """Whether anything is evaluated."""
        return self.prompts is not None or bool(self.tasks)

    @property
    def own_max_tokens(self) -> int:
        """Longest answer to a question of `prompts`."""
        return self.max_tokens or OWN_MAX_TOKENS

    @property
    def task_configs(self) -> tuple[TaskConfig, ...]:
        """The benchmarks, each as a table."""
        return tuple(task if isinstance(task, TaskConfig) else TaskConfig(name=task) for task in self.tasks)
