"""What a row of a user's file is once it is read: a question, and its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dasd_lite.data.records import Message

TOKEN_COLUMNS = ("token_ids", "logprobs", "token_logprobs", "token_bytes")
"""Columns with something for each token of an answer."""
OWN_FORMAT = "rollouts"
"""The format of what stages write: answers of a run's own, which are taken as they are."""
OWN_COLUMNS = ("index", "prefix_bytes", "num_tokens", "max_tokens")
"""Columns of answers that only this format has, whole numbers."""


class Fault(Exception):
    """What is wrong with a row; the reader adds where it is."""


class LeftOut(Exception):
    """Why a row, which is as it should be, is not used."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a row.

    Attributes:
        completion: Thinking and final answer, with the thinking in `<think>` and `</think>`.
        finish_reason: Why it ended; "unknown" if the row does not say.
        thinking: The thinking, if it was apart from the rest in the file; else "".
        content: The text beside `thinking`, as it is in the file: with its tags, if it has any.
        tokens: `TOKEN_COLUMNS` that the row has, untouched: lists, or arrays of numpy; `logprobs` also an object.
        own: `OWN_COLUMNS` of an answer that a stage wrote; None for others.
    """

    completion: str
    finish_reason: str = "unknown"
    thinking: str = ""
    content: str = ""
    tokens: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, int | None] | None = None

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the completion that the student wrote; the tokens are those after them."""
        return (self.own or {}).get("prefix_bytes") or 0


@dataclass(frozen=True, slots=True)
class Row:
    """A row.

    Attributes:
        where: `file:line`, or `file row N`, for messages.
        messages: The question: the conversation before the answer, which ends with the user.
        answers: Its answers, none if only questions are read.
        uid: The name that the row has in the file; None if it has none.
        prompt_uid: The name that the question has in the file.
        domain: The domain; None if the row does not say.
        answer: The reference answer.
    """

    where: str
    messages: list[Message]
    answers: tuple[Answer, ...] = ()
    uid: str | None = None
    prompt_uid: str | None = None
    domain: str | None = None
    answer: str | None = None
