"""How the rows of users' files are read: the name of a format, or a map that says where each part of a row is.

A path leads from a row to a value: `a.b[0].c`, or `messages[user]` for the message of a role.
"""

from __future__ import annotations

import difflib
import re
from os import PathLike, fspath
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, NonNegativeInt, Tag

from dasd_lite.config.models import EXECUTION, Table

FORMATS = (
    "messages",
    "sharegpt",
    "alpaca",
    "trl",
    "prompt-response",
    "input-output",
    "rollouts",
    "dasd",
    "openthoughts",
    "openr1-math",
    "am-deepseek-r1",
    "nemotron-post-training",
    "nemotron-math",
    "openmathreasoning",
    "acereason",
    "opencodereasoning",
    "deepmath",
    "numinamath",
    "s1k",
    "s1k-1.1",
    "limo",
    "dolci-think",
    "gsm8k",
    "livecodebench",
    "verl",
)
"""The names of formats; `data/formats/presets.py` has what each reads."""

_STEP = re.compile(r"\.?([^.\[\]]+)|\[(-?\d+)\]|\[([A-Za-z_]+)\]")


class Role(str):
    """A step of a path: the message of this role in a list of messages."""


def parse_path(path: str) -> tuple[str | int | Role, ...]:
    """Split a path into its steps: keys, positions and roles.

    Raises:
        ValueError: It is no path.
    """
    steps: list[str | int | Role] = []
    end = 0
    while end < len(path):
        match = _STEP.match(path, end)
        if match is None or (path[end] in ".[") == (end == 0):
            break
        key, position, role = match.groups()
        steps.append(key if key is not None else int(position) if position is not None else Role(role))
        end = match.end()
    if end < len(path) or not steps or not isinstance(steps[0], str) or isinstance(steps[0], Role):
        raise ValueError("should be a path like 'problem', 'a.b[0].c', or 'messages[user]'")
    return tuple(steps)


def _path(path: str) -> str:
    parse_path(path)
    return path


def _format(name: str) -> str:
    if name != "auto" and name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"should be 'auto', {', '.join(map(repr, FORMATS))}"
        raise ValueError(hint)
    return name


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    for path, value in values.items():
        parse_path(path)
        if not isinstance(value, str | bool | int | float):
            raise ValueError(f"{path} = {value!r}: should be text, a number, true or false")
    return values


def _place(path: Any) -> str:
    if not isinstance(path, str | PathLike):
        raise ValueError("should be a path in quotes")
    return fspath(path)


def _is_list(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


RowPath = Annotated[str, AfterValidator(_path)]
RowPaths = Annotated[
    Annotated[RowPath, Tag("one")] | Annotated[list[RowPath], Field(min_length=1), Tag("several")],
    Discriminator(_is_list),
]
FormatName = Annotated[str, AfterValidator(_format)]
DataPath = Annotated[str, BeforeValidator(_place)]
"""A file, a folder, a pattern such as `data/*.jsonl.zst`, or `hf://datasets/ORG/NAME@REVISION/path`."""


class Columns(Table):
    """Where a row has what is read. Paths: `problem`, `a.b[0].c`, `messages[user]` (the message of a role)."""

    prompt: RowPaths | None = None
    """The question: text, or a list of messages. Of several paths, the texts are joined by a blank line."""
    system: RowPath | None = None
    """The system message."""
    completion: RowPaths | None = None
    """The answer: text, or messages. Several paths, or a list of texts, are several answers. Default: the last message,
    if it is the assistant's."""
    thinking: RowPaths | None = None
    """The thinking before the answer, where it has a column of its own; as many paths or texts as `completion`."""
    answer: RowPath | None = None
    """The reference answer; with `choices` the letter, the index from 0, or the text of the right one."""
    choices: RowPath | None = None
    """The options of a multiple-choice question: a list, or letter → text. They are written at the end of the
    question."""
    tests: RowPaths | None = None
    """The tests of a programming task, which take the place of the reference answer: [{ input, output }], or { inputs,
    outputs, fn_name }. Of several paths, all tests."""
    function: RowPath | None = None
    """Name of the function that the tests call. Without it, they run a program."""
    starter_code: RowPath | None = None
    """Code to begin with, which is written at the end of the question."""
    uid: RowPath | None = None
    """A name for the row that no other row has."""
    prompt_uid: RowPath | None = None
    """A name for the question, in files of answers."""
    domain: RowPath | None = None
    """The domain, for select.budget and the report."""
    finish_reason: RowPath | None = None
    """Why the answer ended: text, or a list with one for each answer."""
    keep: RowPath | None = None
    """true or false, or a list with one for each answer; answers with false are left out and counted."""
    only: Annotated[dict[str, Any], AfterValidator(_scalars)] = Field(default={})
    """{ tool_usage = "without Python TIR" }: rows with other values are left out and counted; "" stands for no
    value."""
    no_answer: list[str] = Field(default=[])
    """Values of `answer` that mean that there is none, such as "proof"."""
    ignore: list[str] = Field(default=[])
    """Columns that change the meaning of a row (`tools`, `history`, …) but may be passed over."""


class Reading(Table):
    """How files of prompts or answers are read."""

    format: FormatName = "auto"
    """Format of the files; docs/data.md lists them. auto: found from the columns of each row."""
    columns: Columns | None = None
    """{ prompt = "problem", completion = "attempt" }: where a row has what is read, for any other format, or to change
    a part of a named one."""
    max_faulty: Annotated[NonNegativeInt, EXECUTION] = 0
    """Rows that cannot be read and may be left out, up to this number; each is counted. One more is an error."""
