"""A row as its file has it → the question and the answers that it means.

Input: a dictionary. Output: a `Row`, `LeftOut`, or a `Fault` in one sentence. What is not read and changes nothing is
counted in `unread`, what is left out in `left_out`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from dasd_lite.config.reading import Reading, Role, parse_path
from dasd_lite.data.choices import options_block
from dasd_lite.data.formats.conversation import ROLES, Turn, content_of, read_messages, shown
from dasd_lite.data.formats.final_answer import after_hashes, ends_in_hashes, marked
from dasd_lite.data.formats.layout import Getter, Layout, getter, layout_of, paths_of
from dasd_lite.data.formats.options import read_options, right_option
from dasd_lite.data.formats.row import OWN_COLUMNS, OWN_FORMAT, TOKEN_COLUMNS, Answer, Fault, LeftOut, Row
from dasd_lite.data.formats.tests import read_tests
from dasd_lite.data.formats.thinking import join
from dasd_lite.data.records import Message

_EMPTY_PROMPT = "the prompt is empty; the last message must be a user's, with text"
_LISTS = ("messages", "conversations", "conversation")
_HAS_SIZE = (str, list, dict)


class Meaning:
    """Reads rows of any number of shapes; what depends on the shape alone is decided once for each."""

    def __init__(self, reading: Reading, *, answers: bool, tokens: bool = False, system: str | None = None) -> None:
        """Read rows as `reading` says.

        Args:
            reading: Format and map.
            answers: Read the answers too, not only the questions.
            tokens: Also hand over the columns with something for each token.
            system: System message for questions that have none.
        """
        self._reading, self._answers, self._system = reading, answers, system
        self._tokens = TOKEN_COLUMNS if tokens else ()
        self._shapes: dict[tuple[tuple[str, ...], tuple[str, ...]], _Shape | Fault] = {}
        self._numbers: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = Counter()
        self._unread: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.rewritten: Counter[str] = Counter()
        self.num_continued = 0  # whose question has earlier answers in it
        self.num_solutions = 0  # whose end is the reference answer

    def read(self, where: str, row: Mapping[str, Any]) -> Row:
        """Return what a row means.

        Raises:
            Fault: It cannot be read; says why.
            LeftOut: It is left out, and has been counted.
        """
        filled = tuple([k for k, v in row.items() if v is not None and (v.__class__ not in _HAS_SIZE or v)])
        shape = tuple(row), filled
        self._numbers[shape] += 1
        found = self._shapes.get(shape)
        if found is None:
            try:
                found = _Shape(layout_of(self._reading, shape[0], filled, answers=self._answers), self._answers)
            except Fault as fault:
                found = fault
            self._shapes[shape] = found
        if isinstance(found, Fault):
            raise Fault(*found.args)
        self._leave_out(found, row)
        messages, turn = self._question(found, row)
        answers: tuple[Answer, ...] = ()
        if self._answers:
            answers = self._read_answers(found, row, turn)
        elif turn is not None:
            self._unread["the answer at the end of the conversation"] += 1
        self.num_continued += any(message["role"] == "assistant" for message in messages)
        for name, positions, get in found.of_lists:
            if isinstance(value := get(row), list) and len(value) > len({p % len(value) for p in positions}):
                self._unread[f"{name} but for {', '.join(f'[{p}]' for p in positions)}"] += 1
        return Row(
            where,
            messages,
            answers,
            uid=_text(found.uid(row), found.columns.uid),
            prompt_uid=_text(found.prompt_uid(row), found.columns.prompt_uid),
            domain=_text(found.domain(row), found.columns.domain),
            answer=self._reference(found, row),
        )

    @property
    def unread(self) -> Counter[str]:
        """What was not read → in how many rows."""
        unread = Counter(self._unread)
        for shape, number in self._numbers.items():
            found = self._shapes[shape]
            for column in found.layout.unread if isinstance(found, _Shape) else ():
                if column not in self._tokens:
                    unread[column] += number
        return +unread

    @property
    def num_rows(self) -> int:
        """How many rows there were."""
        return self._numbers.total()

    @property
    def formats(self) -> list[str]:
        """The named formats that were recognized."""
        found = (shape.layout.name for shape in self._shapes.values() if isinstance(shape, _Shape))
        return sorted({name for name in found if name})

    @property
    def columns(self) -> set[str]:
        """Every column that a row had."""
        return {column for present, _ in self._numbers for column in present}

    def _leave_out(self, shape: _Shape, row: Mapping[str, Any]) -> None:
        for path, wanted, get in shape.only:
            value = get(row)
            if value != wanted and not (wanted == "" and (value is None or value == [])):
                self.left_out[f"{path} is not {wanted!r}"] += 1
                raise LeftOut
        if self._answers and (weight := row.get("weight")) is not None and "weight" not in shape.columns.ignore:
            if weight not in (0, 1):
                raise Fault(f"weight = {shown(weight)}; only 0 and 1 are read")
            if weight == 0:
                self.left_out["weight = 0"] += 1
                raise LeftOut

    # --- the question

    def _question(self, shape: _Shape, row: Mapping[str, Any]) -> tuple[list[Message], Turn | None]:
        messages, turn = self._conversation(shape, row)
        for other in shape.layout.same_question:
            self._must_agree(shape, messages, row[other], other)
        system = _text(shape.system(row), shape.columns.system)
        has_system = bool(messages) and messages[0]["role"] == "system"
        if system and has_system and messages[0]["content"] != system:
            raise Fault(f"{shape.columns.system} is another system message than that of {shape.columns.prompt}")
        system = system or self._system
        if system is not None and not has_system:
            messages.insert(0, {"role": "system", "content": system})
        if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise Fault(_EMPTY_PROMPT)
        if added := self._after_question(shape, row, messages[-1]["content"]):
            messages[-1] = {**messages[-1], "content": messages[-1]["content"].rstrip() + added}
        return messages, turn

    def _after_question(self, shape: _Shape, row: Mapping[str, Any], question: str) -> str:
        """Return what is written behind a question: code to begin with, and its options, if they are not there."""
        code = _text(shape.starter_code(row), shape.columns.starter_code)
        added = f"\n\n```python\n{code.rstrip()}\n```" if code and code.strip() else ""
        if value := shape.choices(row):
            added += options_block(read_options(value, str(shape.columns.choices))[1])
        return "" if question.endswith(added) else added

    def _conversation(self, shape: _Shape, row: Mapping[str, Any]) -> tuple[list[Message], Turn | None]:
        values = [get(row) for get in shape.prompt]
        if len(values) == 1 and isinstance(values[0], list):
            return read_messages(values[0], shape.prompt_paths[0], self._unread, shape.of_messages)
        if shape.prompt_paths[0] in _LISTS:
            raise Fault(f"{shape.prompt_paths[0]} = {shown(values[0])}; it must be a list of {{role, content}}")
        texts = [_content(value, path) for value, path in zip(values, shape.prompt_paths, strict=True)]
        text = "\n\n".join(text for text in texts if text)
        if text.strip() == "-":  # OpenCodeReasoning's second split
            raise Fault(f"{shape.prompt_paths[0]} = '-': the question is in another data set; join them first")
        return [{"role": "user", "content": text}], None

    def _must_agree(self, shape: _Shape, messages: list[Message], value: Any, other: str) -> None:
        """Raise Fault if another column has another question."""
        if isinstance(value, list):
            value = read_messages(value, other, Counter())[0]
            value = value[-1]["content"] if value else ""
        here = messages[-1]["content"] if messages else ""
        if not isinstance(value, str) or value.strip() != here.strip():
            first = " and ".join(shape.prompt_paths)
            raise Fault(
                f"has different questions in {first} and {other}; name the one to read: columns = {{ prompt ="
                f" {shape.prompt_paths[0]!r} }}, or a format"
            )

    def _reference(self, shape: _Shape, row: Mapping[str, Any]) -> str | None:
        """Return the reference answer: options, tests, or a text; of a worked solution only the answer in it."""
        tests = [(path, get(row)) for path, get in zip(shape.tests_paths, shape.tests, strict=True)]
        if tests and (read := read_tests(tests, shape.function(row))) is not None:
            self._unread[f"{shape.columns.answer} beside tests"] += shape.answer(row) is not None
            return read.encode()
        if value := shape.choices(row):
            labels, options = read_options(value, str(shape.columns.choices))
            right = shape.answer(row)
            if right is None or right == "" or right in shape.columns.no_answer:
                return None
            return right_option(labels, options, right, str(shape.columns.answer)).encode()
        text = _text(shape.answer(row), shape.columns.answer)
        if text is None or text in shape.columns.no_answer:
            return None
        answer: str | None = text
        match shape.layout.reference:
            case "after ####":
                answer = after_hashes(text)
                if answer is None:
                    raise Fault(
                        f"{shape.columns.answer} = {shown(text)}; in this format the answer follows a last '####';"
                        " without it, leave format out"
                    )
            case "marked or as it is":
                answer = marked(text) or text
            case "tests or as it is" if text.lstrip().startswith(("{", "[{")):
                found = read_tests([(str(shape.columns.answer), text)])
                return found.encode() if found is not None else None
            case None if ends_in_hashes(text):
                answer = after_hashes(text)
        self.num_solutions += answer != text
        return answer

    # --- the answers

    def _read_answers(self, shape: _Shape, row: Mapping[str, Any], turn: Turn | None) -> tuple[Answer, ...]:
        turns = self._turns(shape, row) if shape.completion else [turn] if turn is not None else []
        if shape.completion and turn is not None:
            if shape.layout.name or shape.layout.columns is self._reading.columns:
                self._unread["the answer at the end of the conversation"] += 1
            elif turn.content not in [each.content for each in turns]:
                raise Fault(
                    f"has different answers in {shape.prompt_paths[0]} and {shape.completion_paths[0]}; name the one to"
                    f" read: columns = {{ completion = {shape.completion_paths[0]!r} }}"
                )
        if not turns:
            raise Fault(
                "has no answer; a row needs `completion`, `output` or `response`, or `messages` that end with the"
                ' assistant, or a map: columns = { completion = "…" }'
            )
        keep = _one_each(shape.keep(row), len(turns), shape.columns.keep, True)
        reasons = _one_each(shape.finish_reason(row), len(turns), shape.columns.finish_reason, None)
        tokens = {name: row[name] for name in self._tokens if row.get(name) is not None}
        if tokens and len(turns) > 1:
            self._unread[f"{', '.join(tokens)} of rows with several answers"] += 1
            tokens = {}
        answers = []
        for each, kept, reason in zip(turns, keep, reasons, strict=True):
            if not isinstance(kept, bool | int):
                raise Fault(f"{shape.columns.keep} = {shown(kept)}; it must be true or false")
            is_own = shape.layout.name == OWN_FORMAT and not each.thinking
            completion, tag = (each.content, "") if is_own else join(each.thinking, each.content)
            own = _own(row, completion) if is_own else None
            if not kept or not each.is_trained:
                self.left_out["weight = 0" if kept else f"{shape.columns.keep} = false"] += 1
            elif own is None and (not completion or completion.isspace()):
                if len(turns) == 1:
                    raise Fault("has an empty answer")
                self.left_out["empty answers"] += 1
            else:
                self.rewritten[tag] += bool(tag)
                finish = _text(reason, shape.columns.finish_reason) or "unknown"
                answers.append(Answer(completion, finish, each.thinking, each.content, tokens, own))
        if not answers:
            raise LeftOut
        return tuple(answers)

    def _turns(self, shape: _Shape, row: Mapping[str, Any]) -> list[Turn]:
        """Return the answers in the columns for them, with their thinking."""
        contents = _flat([get(row) for get in shape.completion])
        for other in shape.layout.same_completion:
            if _flat([row[other]]) != contents:
                raise Fault(
                    f"has different answers in {shape.completion_paths[0]} and {other}; name the one to read: columns ="
                    f" {{ completion = {shape.completion_paths[0]!r} }}"
                )
        thinking = _flat([get(row) for get in shape.thinking]) if shape.thinking else [None] * len(contents)
        if len(thinking) != len(contents):
            raise Fault(f"has {len(contents)} answers, but {len(thinking)} thinkings")
        turns = []
        for content, thought in zip(contents, thinking, strict=True):
            if isinstance(content, list):
                before, turn = read_messages(content, shape.completion_paths[0], self._unread)
                if before or turn is None:
                    raise Fault(f"{shape.completion_paths[0]} must be one message of the assistant")
            else:
                turn = Turn(_content(content, shape.completion_paths[0]) or "")
            if own := _content(thought, "thinking"):
                turn = Turn(turn.content, own, turn.is_trained)
            turns.append(turn)
        return turns


@dataclass
class _Shape:
    """A layout whose paths have become functions.

    Attributes:
        of_lists: Lists of which only some positions are read: the path to them, and these positions.
        of_messages: Role or position, and field, of what the map reads of the messages beside their text.
    """

    layout: Layout
    answers: bool

    def __post_init__(self) -> None:
        columns = self.columns = self.layout.columns
        self.prompt_paths, self.prompt = _getters(columns.prompt)
        self.completion_paths, self.completion = _getters(columns.completion)
        _, self.thinking = _getters(columns.thinking)
        self.tests_paths, self.tests = _getters(columns.tests)
        self.choices, self.function = _getter(columns.choices), _getter(columns.function)
        self.starter_code = _getter(columns.starter_code)
        self.system, self.answer = _getter(columns.system), _getter(columns.answer)
        self.uid, self.prompt_uid = _getter(columns.uid), _getter(columns.prompt_uid)
        self.domain, self.finish_reason = _getter(columns.domain), _getter(columns.finish_reason)
        self.keep = _getter(columns.keep)
        self.only = [(path, wanted, getter(path)) for path, wanted in columns.only.items()]
        unasked: dict[str, None] = {} if self.answers else {"completion": None, "thinking": None}
        paths = paths_of(columns.model_copy(update=unasked))
        positions: dict[str, list[int]] = {}
        for path in paths:
            before, position = _before_position(path)
            if position is not None and before not in paths:
                positions.setdefault(before, []).append(position)
        self.of_lists = [(name, sorted(set(found)), getter(name)) for name, found in positions.items()]
        self.of_messages = frozenset(
            (ROLES.get(str(steps[1]), str(steps[1])) if isinstance(steps[1], Role) else int(steps[1]), str(steps[2]))
            for steps in map(parse_path, paths)
            if len(steps) > 2 and steps[0] == columns.prompt and isinstance(steps[1], Role | int)
        )


def _before_position(path: str) -> tuple[str, int | None]:
    """Split a path at its first position: `a[role].b[0].c` → `a[role].b`, 0."""
    match = re.search(r"\[(-?\d+)\]", path)
    return (path[: match.start()], int(match[1])) if match else (path, None)


def _getter(path: str | None) -> Getter:
    return getter(path) if path is not None else lambda row: None


def _getters(paths: str | Sequence[str] | None) -> tuple[list[str], list[Getter]]:
    names = [] if paths is None else [paths] if isinstance(paths, str) else list(paths)
    return names, [getter(path) for path in names]


def _flat(values: list[Any]) -> list[Any]:
    """Lay out lists of texts; a list of messages is one value."""
    flat: list[Any] = []
    for value in values:
        is_list = isinstance(value, list) and not (value and isinstance(value[0], Mapping))
        flat += value if is_list else [value]
    return flat


def _one_each(value: Any, number: int, path: str | None, default: Any) -> list[Any]:
    """Return a value for each answer: those of a list, or the same for all."""
    if value is None:
        return [default] * number
    if not isinstance(value, list):
        return [value] * number
    if len(value) != number:
        raise Fault(f"{path} has {len(value)} values for {number} answers")
    return [default if each is None else each for each in value]


def _content(value: Any, path: str) -> str | None:
    """Return a text: a string, UTF-8 bytes, or what a message says."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping) and "[" in path and ("content" in value or "value" in value):
        return _content(content_of(value), path)
    if isinstance(value, bytes):
        return _decoded(value, path)
    raise Fault(f"{path} = {shown(value)}; it must be text")


def _text(value: Any, path: str | None) -> str | None:
    """Return a short text: a string or a number."""
    if value is None or value.__class__ is str:
        return value or None
    if isinstance(value, bytes):
        return _decoded(value, str(path))
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or value != value:
        raise Fault(f"{path} = {shown(value)}; it must be text or a number")
    return str(value)


def _own(row: Mapping[str, Any], completion: str) -> dict[str, int | None]:
    """Return what only rows of a stage have."""
    own = {name: row.get(name) for name in OWN_COLUMNS}
    for name, value in own.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise Fault(f"{name} = {shown(value)}; it must be a whole number of at least 0")
    text, prefix = completion.encode(), own["prefix_bytes"] or 0
    if prefix > len(text) or (prefix < len(text) and text[prefix] & 0xC0 == 0x80):  # inside a character
        raise Fault(f"prefix_bytes = {prefix}; it must be where a character of the {len(text):,} bytes ends")
    return own


def _decoded(value: bytes, path: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise Fault(f"{path}: not UTF-8: byte 0x{value[error.start]:02x} at {error.start}") from None
