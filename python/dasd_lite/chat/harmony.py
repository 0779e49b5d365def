"""gpt-oss's harmony channels ↔ our text: `<think>`, thinking, `</think>`, answer.

Input: sampled token ids, or text in our form. Output: what each token spells in the other form. The
format is that of openai/harmony, docs/format.md: a prompt ends with `<|start|>assistant`, and the model writes

    <|channel|>analysis<|message|>thinking<|end|><|start|>assistant<|channel|>final<|message|>answer<|return|>

Invariants: every token keeps its place and its bytes; a header has none but for its `<|message|>`, which
stands for the tag between two parts; a tool call and a header that is none are told, never mended. About 4 % of
gpt-oss's answers at temperature 1 have such headers (llama.cpp#27720). A `<think>` that a message spells as text
stays what it is; select then rejects the answer for its structure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

MARKS = ("channel", "message", "start", "end", "return", "call", "constrain")
"""Special tokens of the format, without their `<|` and `|>`."""

_TO = r" to=(?!assistant\b)[^\s<]+"  # a message to the assistant is a tool's, never the model's
_HEADER = re.compile(
    rf"(?P<role>assistant)?(?P<to>{_TO})?<\|channel\|>(?P<channel>analysis|commentary|final)(?P<too>{_TO})?"
    r"(?: ?<\|constrain\|> ?[\w/.+-]+|(?P<bare> [\w/.+-]+))?\s*"
)
_THOUGHT = re.compile(r"(<think>\n?)(.*?)(?:(\s*</think>\s*)(.*))?", re.DOTALL)
OPENING, CLOSING, BETWEEN = "<think>\n", "\n</think>\n\n", "\n\n"

Verdict = Literal["", "tool_calls", "malformed"]


class Parts(NamedTuple):
    """An answer in our form, taken apart; together they are the answer."""

    opening: str
    thinking: str
    closing: str
    """The tag between, with the white space around it; "" while the thought is open."""
    answer: str


def parts(text: str) -> Parts:
    """Take apart an answer or the beginning of one; without a `<think>` it is all answer."""
    found = _THOUGHT.fullmatch(text)
    if found is None:
        return Parts("", "", "", text)
    return Parts(found[1], found[2], found[3] or "", found[4] or "")


def write(text: str) -> str:
    """Return an answer, or the beginning of one, as the model would have written it."""
    if not text:
        return ""
    opening, thinking, closing, answer = parts(text)
    final = f"<|channel|>final<|message|>{answer}"
    if not opening:
        return final
    thought = f"<|channel|>analysis<|message|>{thinking}"
    return f"{thought}<|end|><|start|>assistant{final}" if closing else thought


@dataclass
class Rewriter:
    """What becomes of sampled tokens, one after the other.

    `marks` names the ids of the special tokens, `piece` spells an id. `tags` are what opens and what closes a
    thought in the text.
    """

    marks: Mapping[int, str]
    piece: Callable[[int], bytes]
    tags: tuple[str, str] = (OPENING, CLOSING)

    def rewrite(self, ids: Sequence[int], prefix: str = "") -> tuple[list[bytes], Verdict]:
        """Return what each of `ids` spells in our text, behind `prefix`, and what is the matter with them.

        "tool_calls": the model calls a tool, whose message is spelt as it was written. "malformed": a header is none, a
        message has no header, something follows the answer; then all tokens are spelt as they were written.
        """
        opening, _, closing, _ = parts(prefix)
        self._opened = bool(opening) and not closing
        self._channel = "" if not prefix else "analysis" if self._opened else "final"
        self._where = "message" if prefix else "header"
        self._header: list[int] = []
        self._calls = self._after_start = False
        spelt: list[bytes] = []
        for token_id in ids:
            piece = self._take(token_id)
            if piece is None:
                return [self.piece(i) for i in ids], "malformed"
            spelt.append(piece)
        return spelt, "tool_calls" if self._calls else ""

    @property
    def in_header(self) -> bool:
        """Tell whether the tokens so far end within a header."""
        return self._where == "header" and bool(self._header or self._after_start)

    def _take(self, token_id: int) -> bytes | None:
        """Return what a token spells; none when it must not stand where it does."""
        mark = self.marks.get(token_id, "")
        if self._where == "message":
            if not mark:
                return self.piece(token_id)
            self._calls |= mark == "call"
            self._where = "between"
            return b"" if mark in ("end", "return", "call") else None
        if self._where == "between":
            self._where, self._header, self._after_start = "header", [], True
            return b"" if mark == "start" and self._channel != "final" else None
        if mark == "message":
            return self._begin()
        self._header.append(token_id)
        return b"" if mark in ("", "channel", "constrain") else None

    def _begin(self) -> bytes | None:
        """Begin the message whose header is complete; return what stands for the header in the text."""
        header = b"".join(self.piece(i) for i in self._header)
        found = _HEADER.fullmatch(header.decode(errors="replace"))
        if found is None or bool(found["role"]) != self._after_start:
            return None
        calls = found["to"] or found["too"]
        if found["bare"] and not calls:  # a content type stands behind a recipient, or is marked
            return None
        self._where, self._channel = "message", found["channel"]
        if calls:
            self._calls = True
            return header + b"<|message|>"
        if self._channel == "final":
            return self.tags[1].encode() if self._opened else b""
        opened, self._opened = self._opened, True
        return (BETWEEN if opened else self.tags[0]).encode()
