"""What an answer is graded against, as one text: the column `answer` of every row.

Of a question with one answer it is that answer. Of a question with options it is a JSON object that begins with
`{"choices":`, of a programming task one that begins with `{"tests":`. So a row says by itself how it is graded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["math", "choice", "code"]

_CHOICES, _TESTS = '{"choices":', '{"tests":'
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Choices:
    """The options of a question in the order in which they are shown, and the index of the right one."""

    options: tuple[str, ...]
    right: int

    @property
    def letter(self) -> str:
        """Letter of the right option."""
        return LETTERS[self.right]

    def encode(self) -> str:
        """Return the text for the column `answer`."""
        return json.dumps({"choices": list(self.options), "answer": self.letter}, ensure_ascii=False)


@dataclass(frozen=True)
class Tests:
    """The tests of a programming task.

    Attributes:
        tests: Pairs of `input` and `output`. For programs both are what is read and printed; for functions the input
            is one JSON value per line and argument, the output one JSON value.
        function: Name of the function that is called; None: the program reads its standard input.
        private: More tests as LiveCodeBench packs them: JSON, or base64 of zlib of pickle of JSON. "" for none.
        summary: How many there are and a hash of them, in place of the tests themselves; "" where these are here.
    """

    tests: tuple[tuple[str, str], ...]
    function: str | None = None
    private: str = ""
    summary: str = ""

    def encode(self) -> str:
        """Return the text for the column `answer`."""
        value: dict[str, Any] = {"tests": [{"input": given, "output": wanted} for given, wanted in self.tests]}
        value |= {"function": self.function} if self.function is not None else {}
        value |= {"private": self.private} if self.private else {}
        value |= {"summary": self.summary} if self.summary else {}
        return json.dumps(value, ensure_ascii=False)


def kind_of(answer: str) -> Kind:
    """Return how an answer to this reference is graded."""
    if answer.startswith(_CHOICES):
        return "choice"
    return "code" if answer.startswith(_TESTS) else "math"


def read_choices(answer: str) -> Choices:
    """Read what `Choices.encode` wrote."""
    value = json.loads(answer)
    return Choices(tuple(value["choices"]), LETTERS.index(value["answer"]))


def read_tests(answer: str) -> Tests:
    """Read what `Tests.encode` wrote."""
    value = json.loads(answer)
    pairs = tuple((test["input"], test["output"]) for test in value["tests"])
    return Tests(pairs, value.get("function"), value.get("private", ""), value.get("summary", ""))
