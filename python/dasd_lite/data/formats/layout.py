"""Where the rows of one shape have what is read: by a named format, by the user's map, or by the names of columns.

Input: the columns that a row has, and those of them that hold something. Output: a `Layout`. Invariant: a column that
changes what a row means is read, passed over because the user says so, or a fault; two columns for the same thing are
compared, never chosen between.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dasd_lite.config.reading import Columns, Reading, Role, parse_path
from dasd_lite.data.formats.conversation import ROLES, THINKING, listed, role_of, shown
from dasd_lite.data.formats.presets import PRESETS, Format, Reference
from dasd_lite.data.formats.row import OWN_COLUMNS, OWN_FORMAT, TOKEN_COLUMNS, Fault
from dasd_lite.data.formats.tests import from_json

Getter: TypeAlias = Callable[[Mapping[str, Any]], Any]

QUESTIONS = (
    *("messages", "conversations", "conversation", "prompt", "question", "problem", "instruction", "query", "input"),
)
"""Columns that are taken for the question."""
COMPLETIONS = ("completion", "output", "response", "generation", "completions", "generations", "responses")
"""Columns that are taken for the answer or answers."""
SYSTEMS = ("system", "system_prompt")
"""Columns that are taken for the system message."""
CHOICES = ("choices", "options")
"""Columns that are taken for the options of a question."""
_PLAIN = ("answer", "uid", "domain", "finish_reason", "tests", "starter_code")
_CHANGES_QUESTION = (
    *("tools", "functions", "history", "context", *CHOICES),
    *("images", "image", "videos", "audio", "audios", *SYSTEMS),
)
_CHANGES_ANSWER = ("tool_calls", "function_call", "chosen", "rejected", "label", *THINKING)
KNOWN = frozenset(
    {*QUESTIONS, *COMPLETIONS, *SYSTEMS, *_PLAIN, *_CHANGES_QUESTION, *_CHANGES_ANSWER, *TOKEN_COLUMNS, "weight"}
)
"""Columns that mean something by their name."""


@dataclass(frozen=True)
class Layout:
    """Where rows of one shape have what is read.

    Attributes:
        columns: The map.
        same_question: Other columns with a question, which must be the same.
        same_completion: Other columns with an answer, which must be the same.
        unread: Columns that hold something and are not read.
        name: The format that it is, "" for one without a name.
        reference: How the reference answer is read; None: found by its name, so that only a text whose last line is
            `#### …` is taken for more than an answer.
    """

    columns: Columns
    same_question: tuple[str, ...] = ()
    same_completion: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    name: str = ""
    reference: Reference | None = "as it is"


def layout_of(reading: Reading, present: Collection[str], filled: Collection[str], *, answers: bool) -> Layout:
    """Return the layout of rows with the columns `present`, of which `filled` hold something.

    Raises:
        Fault: A column that is needed is missing, or one that changes the meaning of a row is not read.
    """
    name, columns = reading.format, reading.columns or Columns()
    same_question: tuple[str, ...] = ()
    same_completion: tuple[str, ...] = ()
    if name == "auto" and columns.prompt is None:
        found = recognize(present, answers=answers)
        if found:
            name, columns = found, _merged(PRESETS[found].columns, columns)
        else:
            name = ""
            columns, same_question, same_completion = _by_names(columns, present, filled, answers=answers)
    else:
        columns = _merged(PRESETS.get(name, Format(Columns())).columns, columns)
        name = "" if name == "auto" else name
    used = {parse_path(path)[0] for path in paths_of(columns)} | {*columns.ignore, *same_question, *same_completion}
    used |= set(OWN_COLUMNS) if answers and name == OWN_FORMAT else set()
    unread = tuple(column for column in filled if column not in used and not (answers and column == "weight"))
    changes = (*_CHANGES_QUESTION, *_CHANGES_ANSWER) if answers else _CHANGES_QUESTION
    if changed := [column for column in unread if column in changes]:
        raise Fault(
            f"has {', '.join(changed)}, which {'change' if len(changed) > 1 else 'changes'} what the row means and"
            f" {'are' if len(changed) > 1 else 'is'} not read; map what you need, or pass it over with columns ="
            f" {{ ignore = {[*changed]} }}"
        )
    return Layout(columns, same_question, same_completion, unread, name, _reference(reading, name))


def _reference(reading: Reading, name: str) -> Reference | None:
    """Return how the reference answer is read; where the user's own map names it, as it is."""
    if reading.columns is not None and reading.columns.answer is not None:
        return "as it is"
    return PRESETS[name].reference if name in PRESETS else None


def recognize(present: Collection[str], *, answers: bool) -> str:
    """Return the named format that rows with these columns have, or ""; with answers, one that has answers."""
    fits = [
        name
        for name, preset in PRESETS.items()
        if preset.signature and preset.signature <= set(present) and (preset.has_answers or not answers)
    ]
    return max(fits, key=lambda name: len(PRESETS[name].signature), default="")


def paths_of(columns: Columns) -> list[str]:
    """Return every path of a map."""
    paths = list(columns.only)
    for name in type(columns).model_fields:
        value = getattr(columns, name)
        if name not in ("only", "no_answer", "ignore") and value is not None:
            paths += [value] if isinstance(value, str) else value
    return paths


def _merged(below: Columns, top: Columns) -> Columns:
    update = {name: getattr(top, name) for name in top.model_fields_set}
    return below.model_copy(update={**update, "ignore": [*below.ignore, *top.ignore]})


def _by_names(
    mapped: Columns, present: Collection[str], filled: Collection[str], *, answers: bool
) -> tuple[Columns, tuple[str, ...], tuple[str, ...]]:
    """Return the map that the names of the columns suggest, and the columns that must agree with it."""
    taken = {parse_path(path)[0] for path in paths_of(mapped)} | set(mapped.ignore)
    free = [column for column in filled if column not in taken]
    questions: list[str | list[str]] = [column for column in QUESTIONS if column in free]
    if "instruction" in free and "input" in free:  # Alpaca: one question in two columns
        questions = [["instruction", "input"], *(q for q in questions if q not in ("instruction", "input"))]
    if not questions:
        if any(column in present for column in QUESTIONS):
            raise Fault("the prompt is empty; the last message must be a user's, with text")
        raise Fault(
            f"has {listed(present) or 'no keys'}; a row needs `prompt` or `messages`, or a map such as"
            ' columns = { prompt = "…" }'
        )
    found: dict[str, Any] = {"prompt": questions[0]}
    found |= {column: column for column in _PLAIN if column in free}
    if systems := [column for column in SYSTEMS if column in free]:
        found["system"] = systems[0]
    if choices := [column for column in CHOICES if column in free]:
        found["choices"] = choices[0]
    same_completion: tuple[str, ...] = ()
    if answers and mapped.completion is None:
        completions = [column for column in COMPLETIONS if column in free]
        if completions:
            found["completion"], *rest = completions
            same_completion = tuple(rest)
        thinking = [column for column in THINKING if column in free]
        if len(thinking) > 1:
            raise Fault(f"has {' and '.join(thinking)}; name one: columns = {{ thinking = {thinking[0]!r} }}")
        if thinking and mapped.thinking is None and completions:
            found["thinking"] = thinking[0]
    flat = [q for q in questions[1:] if isinstance(q, str)]
    return _merged(Columns.model_validate(found), mapped), tuple(flat), same_completion


# --- paths ----------------------------------------------------------------------------------------------


def getter(path: str) -> Getter:
    """Return what takes the value at `path` out of a row; None where there is none."""
    steps = parse_path(path)
    if len(steps) == 1:
        key = str(steps[0])
        return lambda row: row.get(key)

    def get(row: Mapping[str, Any]) -> Any:
        value: Any = row
        for step in steps:
            if value is None:
                return None
            value = _step(value, step, path)
        return value

    return get


def _step(value: Any, step: str | int | Role, path: str) -> Any:
    if isinstance(value, str) and isinstance(step, str) and value[:1] == "{":  # an object as JSON
        value = from_json(value, path)
    if isinstance(step, Role):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise Fault(f"{path}: {shown(value)} is no list of messages")
        wanted = ROLES.get(step, step)
        of_role = [m for m in value if isinstance(m, Mapping) and ROLES.get(role_of(m)) == wanted]
        if len(of_role) > 1:
            raise Fault(f"{path}: {len(of_role)} messages are of this role; name one by its position, [0]")
        return of_role[0] if of_role else None
    if isinstance(step, int):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise Fault(f"{path}: {shown(value)} is no list")
        return value[step] if -len(value) <= step < len(value) else None
    if not isinstance(value, Mapping):
        raise Fault(f"{path}: {shown(value)} has no {step!r}")
    return value.get(step)
