"""The harmony channels of gpt-oss, to and from our form of an answer: `<think>`, thinking, `</think>`, answer.

Input: sampled token ids, or text in our form. Output: the same in the other form. The format is described in
openai/harmony, docs/format.md: a prompt ends with `<|start|>assistant`, and the model writes

    <|channel|>analysis<|message|>thinking<|end|><|start|>assistant<|channel|>final<|message|>answer<|return|>

Invariants: every token keeps its position and its bytes. The tokens of a header spell nothing, except `<|message|>`,
which spells the tag between two parts. Tool calls and malformed headers are reported, never repaired; about 4 % of the
answers of gpt-oss at temperature 1 have such headers (llama.cpp#27720). A `<think>` that a message spells as text stays
as it is, and select rejects the answer for its structure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

SPECIAL_TOKENS = ("channel", "message", "start", "end", "return", "call", "constrain")
"""Names of the special tokens, which are written `<|name|>`."""

_TO = r" to=(?!assistant\b)[^\s<]+"  # only a tool writes to the assistant
_HEADER = re.compile(
    rf"(?P<role>assistant)?(?P<to>{_TO})?<\|channel\|>(?P<channel>analysis|commentary|final)(?P<too>{_TO})?"
    r"(?: ?<\|constrain\|> ?[\w/.+-]+|(?P<bare> [\w/.+-]+))?\s*"
)
_THOUGHT = re.compile(r"(<think>\n?)(.*?)(?:(\s*</think>\s*)(.*))?", re.DOTALL)
OPENING, CLOSING, BETWEEN = "<think>\n", "\n</think>\n\n", "\n\n"

Verdict = Literal["", "tool_calls", "malformed"]


class Parts(NamedTuple):
    """An answer in our form in four parts, which joined are the answer."""

    opening: str
    thinking: str
    closing: str
    """The closing tag with the white space around it; "" if thinking has not ended."""
    answer: str


def split_thinking(text: str) -> Parts:
    """Split an answer, or the beginning of one, into its parts. Without `<think>` all of it is the answer."""
    match = _THOUGHT.fullmatch(text)
    if match is None:
        return Parts("", "", "", text)
    return Parts(match[1], match[2], match[3] or "", match[4] or "")


def render(text: str) -> str:
    """Return an answer, or the beginning of one, as the model would write it."""
    if not text:
        return ""
    opening, thinking, closing, answer = split_thinking(text)
    final = f"<|channel|>final<|message|>{answer}"
    if not opening:
        return final
    thought = f"<|channel|>analysis<|message|>{thinking}"
    return f"{thought}<|end|><|start|>assistant{final}" if closing else thought


@dataclass
class Rewriter:
    """Turns sampled tokens into our form, one after another.

    Attributes:
        special_tokens: Name of each special token, by id.
        piece: Returns the bytes of a token.
        tags: What opens and what closes the thinking in our form.
    """

    special_tokens: Mapping[int, str]
    piece: Callable[[int], bytes]
    tags: tuple[str, str] = (OPENING, CLOSING)

    def rewrite(self, ids: Sequence[int], prefix: str = "") -> tuple[list[bytes], Verdict]:
        """Return what each of `ids` spells in our form after `prefix`, and a verdict.

        The verdict is "tool_calls" if the model calls a tool, whose message is left as written. It is "malformed" if a
        header is not valid, a message has no header, or something follows the answer; then every token is left as
        written.
        """
        opening, _, closing, _ = split_thinking(prefix)
        self._opened = bool(opening) and not closing
        self._channel = "" if not prefix else "analysis" if self._opened else "final"
        self._where = "message" if prefix else "header"
        self._header: list[int] = []
        self._calls_tool = self._after_start = False
        spelled: list[bytes] = []
        for token_id in ids:
            piece = self._take(token_id)
            if piece is None:
                return [self.piece(i) for i in ids], "malformed"
            spelled.append(piece)
        return spelled, "tool_calls" if self._calls_tool else ""

    @property
    def in_header(self) -> bool:
        """Whether the tokens so far end inside a header."""
        return self._where == "header" and bool(self._header or self._after_start)

    def _take(self, token_id: int) -> bytes | None:
        """Return what a token spells, or None if it is not allowed here."""
        special = self.special_tokens.get(token_id, "")
        if self._where == "message":
            if not special:
                return self.piece(token_id)
            self._calls_tool |= special == "call"
            self._where = "between"
            return b"" if special in ("end", "return", "call") else None
        if self._where == "between":
            self._where, self._header, self._after_start = "header", [], True
            return b"" if special == "start" and self._channel != "final" else None
        if special == "message":
            return self._begin_message()
        self._header.append(token_id)
        return b"" if special in ("", "channel", "constrain") else None

    def _begin_message(self) -> bytes | None:
        """Return what a complete header spells in our form, or None if it is not valid."""
        header = b"".join(self.piece(i) for i in self._header)
        match = _HEADER.fullmatch(header.decode(errors="replace"))
        if match is None or bool(match["role"]) != self._after_start:
            return None
        recipient = match["to"] or match["too"]
        if match["bare"] and not recipient:  # a content type needs a recipient before it, or <|constrain|>
            return None
        self._where, self._channel = "message", match["channel"]
        if recipient:
            self._calls_tool = True
            return header + b"<|message|>"
        if self._channel == "final":
            return self.tags[1].encode() if self._opened else b""
        opened, self._opened = self._opened, True
        return (BETWEEN if opened else self.tags[0]).encode()
