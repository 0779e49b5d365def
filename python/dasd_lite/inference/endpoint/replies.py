"""What OpenAI-compatible servers reply, read and judged: JSON in, a completion with bytes and log-probabilities out.

Input: the body of a reply of /chat/completions or /completions. Invariants: log-probabilities and
bytes are the server's own, nothing is filled in; a reply that lacks what the method needs is an
EndpointError that names it, a body that is no reply at all a ValueError.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from dasd_lite.errors import EndpointError

Lengths = npt.NDArray[np.int32]
LogprobColumn = npt.NDArray[np.float32]

_BAD = "\ufffd"  # what a decoder writes for bytes that are no character
_SPACE = " \t\n\r\f\v"
_OPENED = re.compile(rb"\s*(?:<think>\s*)?")
_CLOSED = re.compile(rb"\s*(?:(</think>)\s*)?")
_ROUNDING = 1e-4  # nats by which rounding may lift a log-probability above 0
PLACEHOLDER = -9000.0  # some servers write -9999 for a value that they do not have


class TokenLogprob(msgspec.Struct, gc=False):  # thousands a reply, and never part of a cycle
    """One token as chat replies have it."""

    token: str = ""
    logprob: float | None = None
    raw: list[int] | None = msgspec.field(default=None, name="bytes")
    id: int | None = None
    top_logprobs: list[TokenLogprob] | None = None

    def spelt(self) -> bytes:
        """Return the token's bytes; where the server tells none, those of its text."""
        return bytes(self.raw) if self.raw is not None else self.token.encode()


class Logprobs(msgspec.Struct):
    """Log-probabilities of a reply: `content` in chat, the parallel lists in plain completions."""

    content: list[TokenLogprob] | None = None
    refusal: list[TokenLogprob] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class ReplyMessage(msgspec.Struct):
    """The assistant's message."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None


class Choice(msgspec.Struct):
    """One answer of a reply; `delta` stands for `message` in a stream."""

    message: ReplyMessage | None = None
    delta: ReplyMessage | None = None
    text: str | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    index: int = 0


class TokenCounts(msgspec.Struct):
    """What the server counts, and charges for."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Reply(msgspec.Struct):
    """A whole reply, or one piece of a streamed one."""

    choices: list[Choice]
    usage: TokenCounts | None = None
    model: str | None = None
    id: str | None = None


_DECODER = msgspec.json.Decoder(Reply)


def read(body: bytes) -> Reply:
    """Read a reply; raises ValueError for what is none, one without a choice included."""
    reply = _DECODER.decode(body)
    if not reply.choices:
        raise ValueError("no choices")
    return reply


class StreamAssembler:
    """A streamed reply, put together from its events."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._whole = Reply(choices=[])
        self._texts: dict[str, list[str]] = {}

    def add(self, data: str) -> bool:
        """Take one event's data; return whether it was the last."""
        if data == "[DONE]":
            return True
        piece = _DECODER.decode(data)
        self._whole.usage = piece.usage or self._whole.usage
        self._whole.model = piece.model or self._whole.model
        self._whole.id = piece.id or self._whole.id
        for choice in piece.choices:
            if choice.index == 0:  # of several answers the first
                self._add_choice(choice)
        return False

    def _add_choice(self, piece: Choice) -> None:
        if not self._whole.choices:
            self._whole.choices.append(Choice())
        choice = self._whole.choices[0]
        choice.finish_reason = piece.finish_reason or choice.finish_reason
        if piece.token_ids is not None:
            choice.token_ids = [*(choice.token_ids or ()), *piece.token_ids]
        if piece.text:
            self._texts.setdefault("text", []).append(piece.text)
        for name in ("content", "reasoning_content", "reasoning", "refusal") if piece.delta else ():
            if text := getattr(piece.delta, name):
                self._texts.setdefault(name, []).append(text)
        if piece.delta is not None and piece.delta.tool_calls:
            self._texts.setdefault("tool_calls", []).append("")
        if piece.logprobs is not None:
            choice.logprobs = choice.logprobs or Logprobs()
            for name in ("content", "refusal", "tokens", "token_logprobs", "top_logprobs"):
                if (values := getattr(piece.logprobs, name)) is not None:
                    kept = getattr(choice.logprobs, name)
                    if kept is None:
                        setattr(choice.logprobs, name, kept := [])
                    kept.extend(values)

    def whole(self) -> Reply:
        """Return the reply; raises ValueError when the stream held no choice or broke off before its end."""
        if not self._whole.choices or self._whole.choices[0].finish_reason is None:
            raise ValueError("the stream ended before the answer did")
        choice = self._whole.choices[0]
        texts = {name: "".join(parts) for name, parts in self._texts.items()}
        choice.text = texts.get("text")
        choice.message = ReplyMessage(
            content=texts.get("content"),
            reasoning_content=texts.get("reasoning_content"),
            reasoning=texts.get("reasoning"),
            refusal=texts.get("refusal"),
            tool_calls=[None] if "tool_calls" in texts else None,
        )
        return self._whole


class Answer(msgspec.Struct):
    """An answer with its tokens: what a sampler needs of a reply."""

    text: str
    logprobs: LogprobColumn
    token_bytes: Lengths
    finish_reason: str


def chat_answer(choice: Choice, source: str, *, continued: bool = False) -> Answer:
    """Read a choice of /chat/completions; `continued` when the answer's beginning was given.

    Raises EndpointError, beginning with `source`, where it lacks what the method needs.
    """
    message = choice.message or ReplyMessage()
    tokens = (choice.logprobs and choice.logprobs.content) or []
    finish_reason = choice.finish_reason or "unknown"
    reasoning = (message.reasoning_content or message.reasoning or "").strip(_SPACE)
    content = message.content or ""
    if message.refusal:
        finish_reason, content = "refusal", message.refusal
        tokens = (choice.logprobs and choice.logprobs.refusal) or tokens
    elif message.tool_calls:
        finish_reason = "tool_calls"
    pieces = [token.spelt() for token in tokens]
    logprobs = checked([token.logprob for token in tokens], source, expected=bool(reasoning or content))
    ended = finish_reason in ("stop", "refusal", "tool_calls")
    # A template that opens the thought itself: the text has what no token spells, as everywhere.
    closed = "</think>" in content and "<think>" not in content and not reasoning and not continued
    opener = "<think>\n" if closed else ""
    if finish_reason == "tool_calls" or continued:
        # A call is text that the server has taken out; a continuation may close a thought that it did not open.
        text, token_bytes = _as_spelt(pieces, reasoning, content)
    else:
        text, token_bytes = align(pieces, reasoning, content, ended=ended)
    if token_bytes is None:
        raise EndpointError(
            f"{source}: its tokens spell {sum(map(len, pieces))} bytes, its text has {len(text.encode())};"
            " the server must give `logprobs` with `bytes` for the whole answer, reasoning included; a vLLM server that"
            " parses channels (gpt-oss) or tools gives all of it by token ids: set teacher.tokenizer"
        )
    return Answer(opener + text, logprobs, token_bytes, finish_reason)


def spoken(choice: Choice) -> tuple[str, str]:
    """Return the text of a choice of /chat/completions and why it ended, whatever its tokens were."""
    message = choice.message or ReplyMessage()
    reasoning = (message.reasoning_content or message.reasoning or "").strip(_SPACE)
    text, _ = align([], reasoning, message.refusal or message.content or "", ended=True)
    if reasoning and message.content:
        text = f"<think>\n{reasoning}\n</think>\n\n{message.content.lstrip(_SPACE)}"
    calls = "tool_calls" if message.tool_calls else choice.finish_reason or "unknown"
    return text, "refusal" if message.refusal else calls


def text_answer(choice: Choice, source: str) -> Answer:
    """Read a choice of /completions whose tokens are told by their text; raises EndpointError like `chat_answer`."""
    found, text = choice.logprobs or Logprobs(), choice.text or ""
    logprobs = checked(found.token_logprobs or [], source, expected=bool(text))
    pieces = [_spelt(token) for token in found.tokens or []]
    finish_reason = choice.finish_reason or "unknown"
    _, token_bytes = align(pieces, "", text, ended=finish_reason == "stop")
    if token_bytes is None or len(pieces) != len(logprobs):
        raise EndpointError(
            f"{source}: its {len(pieces)} tokens spell {sum(map(len, pieces))} bytes, its text has"
            f" {len(text.encode())}; the server must return token ids (vLLM does) or every token's text"
        )
    return Answer(text, logprobs, token_bytes, finish_reason)


def token_ids(choice: Choice) -> list[int] | None:
    """Return the ids of a plain completion's tokens, or none where the server does not tell them."""
    if choice.token_ids is not None:
        return choice.token_ids
    tokens = (choice.logprobs and choice.logprobs.content) or []
    ids = [token.id for token in tokens if token.id is not None]
    return ids if ids and len(ids) == len(tokens) else None


def id_logprobs(choice: Choice, num_ids: int, source: str) -> LogprobColumn:
    """Return the log-probability of each of the ids that `token_ids` gave."""
    found = choice.logprobs or Logprobs()
    values = found.token_logprobs
    if values is None:
        values = [token.logprob for token in found.content or []]
    logprobs = checked(values, source, expected=num_ids > 0)
    if len(logprobs) != num_ids:
        raise EndpointError(f"{source} returns {len(logprobs)} log-probabilities for {num_ids} tokens")
    return logprobs


def checked(values: list[float | None], source: str, *, expected: bool) -> LogprobColumn:
    """Return log-probabilities as a column; raises EndpointError for missing ones and for what none can be."""
    logprobs = np.array([np.nan if p is None else p for p in values], dtype=np.float32)
    if not np.isfinite(logprobs).all() or (not len(logprobs) and expected):
        raise EndpointError(
            f"{source} returns no log-probabilities; the method needs them: switch `logprobs` on at the server,"
            " take a provider that supports it, or run the model here with kind = 'vllm'"
        )
    wrong = (logprobs > _ROUNDING) | (logprobs < PLACEHOLDER)
    if wrong.any():
        i = int(wrong.argmax())
        raise EndpointError(f"{source}: token {i} has log-probability {logprobs[i]:g}, which no sampled token can have")
    return logprobs


def _spelt(token: str) -> bytes:
    """Return the bytes of a token's text, which some write as "bytes:" and escapes where it is no character."""
    if token.startswith("bytes:"):
        with suppress(UnicodeEncodeError, UnicodeDecodeError):
            return token.removeprefix("bytes:").encode("latin-1").decode("unicode_escape").encode("latin-1")
    return token.encode()


def _as_spelt(pieces: list[bytes], reasoning: str, content: str) -> tuple[str, Lengths | None]:
    """Return the text that the tokens spell, when what the server shows of it is in there."""
    pieces = _whole_characters(pieces)
    raw = b"".join(pieces)
    start = raw.find(reasoning.encode())
    end = -1 if start < 0 else raw.find(content.encode(), start + len(reasoning.encode()))
    if end < 0:
        return reasoning + content, None
    if pieces and len(raw) - len(pieces[-1]) >= end + len(content.encode()):  # behind the text: what ends the turn
        pieces = [*pieces[:-1], b""]
    return b"".join(pieces).decode(), np.array([len(p) for p in pieces], dtype=np.int32)


def align(pieces: list[bytes], reasoning: str, content: str, *, ended: bool) -> tuple[str, Lengths | None]:
    """Join an answer that the server has split; return each token's bytes of it, or none if the tokens spell another.

    The text is `<think>`, reasoning, `</think>`, content, with the line breaks usual between them. Tokens may spell
    the tags in this way, otherwise, or not at all: then the tags' bytes belong to the token before (the opening's to
    the first). A last token behind the text has no bytes: one that `ended` the turn, or half a character.
    """
    text, lengths = _fit(pieces, reasoning, content, ended=ended)
    if lengths is None and _BAD in text:
        # vLLM's server gives no bytes to a token that is none or half of a character, and U+FFFD to the text.
        bare, found = _fit(pieces, reasoning.replace(_BAD, ""), content.replace(_BAD, ""), ended=ended)
        if found is not None and bare == text.replace(_BAD, ""):
            gaps = np.cumsum([len(part.encode()) for part in text.split(_BAD)[:-1]])
            edges = np.cumsum([0, *found])
            last = np.append(edges[1:] > edges[:-1], True)  # of several edges at one place
            before = np.where(last, np.searchsorted(gaps, edges, "right"), np.searchsorted(gaps, edges))
            before[0] = 0
            lengths = np.diff(edges + len(_BAD.encode()) * before).astype(np.int32)
    return text, lengths


def _fit(pieces: list[bytes], reasoning: str, content: str, *, ended: bool) -> tuple[str, Lengths | None]:
    pieces = _whole_characters(pieces)
    raw = b"".join(pieces)
    think, answer = reasoning.encode(), content.encode()
    think_at = closing_at = answer_at = 0
    opening = closing = b""
    if think:
        opening, answer = b"<think>\n", content.lstrip(_SPACE).encode()
        think_at = found.end() if (found := _OPENED.match(raw)) else 0
        closing_at = answer_at = think_at + len(think)
        found = _CLOSED.match(raw, closing_at)
        # Where neither an answer nor a tag shows that the thought was ended, the text does not say so.
        if found and (answer or found.group(1)):
            closing, answer_at = b"\n</think>\n\n", found.end()
    end, text = answer_at + len(answer), opening + think + closing + answer
    rest = raw[end:].strip()
    fits = raw[think_at:closing_at] == think and raw[answer_at:end] == answer
    if not fits or rest not in (b"", _BAD.encode(), *([pieces[-1].strip()] if ended and pieces else [])):
        return text.decode(), None
    raw_bounds = np.array([0, think_at, closing_at, answer_at, end])
    text_bounds = np.cumsum([0, len(opening), len(think), len(closing), len(answer), 0])
    edges = np.cumsum([0, *map(len, pieces)])
    part = np.searchsorted(raw_bounds, edges, side="right") - 1
    moved = np.minimum(text_bounds[part] + edges - raw_bounds[part], text_bounds[part + 1])
    moved[0] = 0
    return text.decode(), np.diff(moved).astype(np.int32)


def _whole_characters(pieces: list[bytes]) -> list[bytes]:
    """Write bytes that are no UTF-8 as U+FFFD, as servers do in the text; a split character goes to its last token."""
    with suppress(UnicodeDecodeError):
        b"".join(pieces).decode()
        return pieces
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(p, final=i + 1 == len(pieces)).encode() for i, p in enumerate(pieces)]
