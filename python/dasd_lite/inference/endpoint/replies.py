"""Parsing of what OpenAI-compatible servers reply: from JSON to text with bytes and log-probabilities.

Input: the body of a reply of /chat/completions or /completions. Invariants: log-probabilities and bytes are the
server's own, and missing values are never filled in; a reply that lacks what the method needs is an EndpointError that
names it, a body that is not a reply at all a ValueError.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from dasd_lite.chat.spelling import ByteLengths, replace_invalid
from dasd_lite.errors import EndpointError
from dasd_lite.method.divergence import TOLERANCE

LogprobColumn = npt.NDArray[np.float32]

_BAD = "\ufffd"  # what a decoder writes for bytes that are not UTF-8
_SPACE = " \t\n\r\f\v"
_OPENED = re.compile(rb"\s*(?:<think>\s*)?")
_CLOSED = re.compile(rb"\s*(?:(</think>)\s*)?")
PLACEHOLDER = -9000.0  # some servers send -9999 for a value that they do not have


class TokenLogprob(msgspec.Struct, gc=False):  # thousands per reply, never part of a cycle
    """One token of a chat reply."""

    token: str = ""
    logprob: float | None = None
    raw: list[int] | None = msgspec.field(default=None, name="bytes")
    id: int | None = None
    top_logprobs: list[TokenLogprob] | None = None

    def to_bytes(self) -> bytes:
        """Return the token's bytes, or those of its text if the server does not report them."""
        return bytes(self.raw) if self.raw is not None else self.token.encode()


class Logprobs(msgspec.Struct):
    """Log-probabilities of a reply: `content` in chat, parallel lists in plain completions."""

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
    """One answer of a reply; a stream has `delta` in place of `message`."""

    message: ReplyMessage | None = None
    delta: ReplyMessage | None = None
    text: str | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    index: int = 0


class TokenCounts(msgspec.Struct):
    """Tokens as the server counts and charges them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Reply(msgspec.Struct):
    """A complete reply, or one event of a streamed one."""

    choices: list[Choice]
    usage: TokenCounts | None = None
    model: str | None = None
    id: str | None = None


_DECODER = msgspec.json.Decoder(Reply)


def parse_reply(body: bytes) -> Reply:
    """Parse a reply; raises ValueError if `body` is not one or has no choices."""
    reply = _DECODER.decode(body)
    if not reply.choices:
        raise ValueError("no choices")
    return reply


class StreamAssembler:
    """Assembles a streamed reply from its events."""

    def __init__(self) -> None:
        """Start with an empty reply."""
        self._reply = Reply(choices=[])
        self._texts: dict[str, list[str]] = {}

    def add(self, data: str) -> bool:
        """Add one event's data; return whether it was the last event."""
        if data == "[DONE]":
            return True
        event = _DECODER.decode(data)
        self._reply.usage = event.usage or self._reply.usage
        self._reply.model = event.model or self._reply.model
        self._reply.id = event.id or self._reply.id
        for choice in event.choices:
            if choice.index == 0:  # only the first of several answers
                self._add_choice(choice)
        return False

    def _add_choice(self, event: Choice) -> None:
        if not self._reply.choices:
            self._reply.choices.append(Choice())
        choice = self._reply.choices[0]
        choice.finish_reason = event.finish_reason or choice.finish_reason
        if event.token_ids is not None:
            choice.token_ids = [*(choice.token_ids or ()), *event.token_ids]
        if event.text:
            self._texts.setdefault("text", []).append(event.text)
        for name in ("content", "reasoning_content", "reasoning", "refusal") if event.delta else ():
            if text := getattr(event.delta, name):
                self._texts.setdefault(name, []).append(text)
        if event.delta is not None and event.delta.tool_calls:
            self._texts.setdefault("tool_calls", []).append("")
        if event.logprobs is not None:
            choice.logprobs = choice.logprobs or Logprobs()
            for name in ("content", "refusal", "tokens", "token_logprobs", "top_logprobs"):
                if (values := getattr(event.logprobs, name)) is not None:
                    kept = getattr(choice.logprobs, name)
                    if kept is None:
                        setattr(choice.logprobs, name, kept := [])
                    kept.extend(values)

    def reply(self) -> Reply:
        """Return the complete reply; raises ValueError if the stream ended before the answer did."""
        if not self._reply.choices or self._reply.choices[0].finish_reason is None:
            raise ValueError("the stream ended before the answer did")
        choice = self._reply.choices[0]
        texts = {name: "".join(parts) for name, parts in self._texts.items()}
        choice.text = texts.get("text")
        choice.message = ReplyMessage(
            content=texts.get("content"),
            reasoning_content=texts.get("reasoning_content"),
            reasoning=texts.get("reasoning"),
            refusal=texts.get("refusal"),
            tool_calls=[None] if "tool_calls" in texts else None,
        )
        return self._reply


class ParsedAnswer(msgspec.Struct):
    """A reply's answer as a completion has it."""

    text: str
    logprobs: LogprobColumn
    token_bytes: ByteLengths
    finish_reason: str


def parse_chat_choice(choice: Choice, source: str, *, continued: bool = False) -> ParsedAnswer:
    """Parse a choice of /chat/completions.

    Args:
        choice: From the reply.
        source: Server and model, which begin error messages.
        continued: The answer continues a given prefix.

    Raises:
        EndpointError: Log-probabilities are missing, or the tokens do not add up to the text.
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
    pieces = [token.to_bytes() for token in tokens]
    logprobs = check_logprobs([token.logprob for token in tokens], source, expected=bool(reasoning or content))
    ended = finish_reason in ("stop", "refusal", "tool_calls")
    # If the template opened the thinking itself, the text gets its <think> back, which no token spells.
    opened_by_template = "</think>" in content and "<think>" not in content and not reasoning and not continued
    think_prefix = "<think>\n" if opened_by_template else ""
    if finish_reason == "tool_calls" or continued:
        # The server has removed the text of a tool call; a continuation may close thinking that it did not open.
        text, token_bytes = _text_of_tokens(pieces, reasoning, content)
    else:
        text, token_bytes = align(pieces, reasoning, content, ended=ended)
    if token_bytes is None:
        raise EndpointError(
            f"{source}: the tokens have {sum(map(len, pieces))} bytes, but the text has {len(text.encode())}; the"
            " server must return `logprobs` with `bytes` for the whole answer, reasoning included; a vLLM server that"
            " parses channels (gpt-oss) or tools returns all of it as token ids: set teacher.tokenizer"
        )
    return ParsedAnswer(think_prefix + text, logprobs, token_bytes, finish_reason)


def answer_text(choice: Choice) -> tuple[str, str]:
    """Return the text and the finish reason of a choice of /chat/completions, without its tokens."""
    message = choice.message or ReplyMessage()
    reasoning = (message.reasoning_content or message.reasoning or "").strip(_SPACE)
    text, _ = align([], reasoning, message.refusal or message.content or "", ended=True)
    if reasoning and message.content:
        text = f"<think>\n{reasoning}\n</think>\n\n{message.content.lstrip(_SPACE)}"
    finish_reason = "tool_calls" if message.tool_calls else choice.finish_reason or "unknown"
    return text, "refusal" if message.refusal else finish_reason


def parse_text_choice(choice: Choice, source: str) -> ParsedAnswer:
    """Parse a choice of /completions that reports its tokens as text; raises as `parse_chat_choice` does."""
    reported, text = choice.logprobs or Logprobs(), choice.text or ""
    logprobs = check_logprobs(reported.token_logprobs or [], source, expected=bool(text))
    pieces = [_token_bytes(token) for token in reported.tokens or []]
    finish_reason = choice.finish_reason or "unknown"
    _, token_bytes = align(pieces, "", text, ended=finish_reason == "stop")
    if token_bytes is None or len(pieces) != len(logprobs):
        raise EndpointError(
            f"{source}: the {len(pieces)} tokens have {sum(map(len, pieces))} bytes, but the text has"
            f" {len(text.encode())}; the server must return token ids (vLLM does) or every token's text"
        )
    return ParsedAnswer(text, logprobs, token_bytes, finish_reason)


def token_ids(choice: Choice) -> list[int] | None:
    """Return the ids of the sampled tokens, or None if the server does not report them."""
    if choice.token_ids is not None:
        return choice.token_ids
    tokens = (choice.logprobs and choice.logprobs.content) or []
    ids = [token.id for token in tokens if token.id is not None]
    return ids if ids and len(ids) == len(tokens) else None


def id_logprobs(choice: Choice, num_ids: int, source: str) -> LogprobColumn:
    """Return the log-probability of each of the ids that `token_ids` returned."""
    reported = choice.logprobs or Logprobs()
    values = reported.token_logprobs
    if values is None:
        values = [token.logprob for token in reported.content or []]
    logprobs = check_logprobs(values, source, expected=num_ids > 0)
    if len(logprobs) != num_ids:
        raise EndpointError(f"{source} returns {len(logprobs)} log-probabilities for {num_ids} tokens")
    return logprobs


def check_logprobs(values: list[float | None], source: str, *, expected: bool) -> LogprobColumn:
    """Return log-probabilities as an array; raises EndpointError for missing or impossible ones.

    Args:
        values: As the server reports them.
        source: Server and model, which begin error messages.
        expected: There must be at least one.
    """
    logprobs = np.array([np.nan if p is None else p for p in values], dtype=np.float32)
    if not np.isfinite(logprobs).all() or (not len(logprobs) and expected):
        raise EndpointError(
            f"{source} returns no log-probabilities, which the method needs; enable `logprobs` on the server, use a"
            " provider that supports it, or run the model on this machine with kind = 'vllm'"
        )
    wrong = (logprobs > TOLERANCE) | (logprobs < PLACEHOLDER)
    if wrong.any():
        i = int(wrong.argmax())
        raise EndpointError(
            f"{source}: token {i} has log-probability {logprobs[i]:g}, which is impossible for a sampled token"
        )
    return logprobs


def _token_bytes(token: str) -> bytes:
    """Return the bytes of a token's text; some servers write "bytes:" and escapes for a token that is not UTF-8."""
    if token.startswith("bytes:"):
        with suppress(UnicodeEncodeError, UnicodeDecodeError):
            return token.removeprefix("bytes:").encode("latin-1").decode("unicode_escape").encode("latin-1")
    return token.encode()


def _text_of_tokens(pieces: list[bytes], reasoning: str, content: str) -> tuple[str, ByteLengths | None]:
    """Return the text of the tokens and their lengths, if it contains the text that the server returns."""
    pieces = replace_invalid(pieces)
    raw = b"".join(pieces)
    start = raw.find(reasoning.encode())
    end = -1 if start < 0 else raw.find(content.encode(), start + len(reasoning.encode()))
    if end < 0:
        return reasoning + content, None
    if pieces and len(raw) - len(pieces[-1]) >= end + len(content.encode()):  # after the text: the end token
        pieces = [*pieces[:-1], b""]
    return b"".join(pieces).decode(), np.array([len(p) for p in pieces], dtype=np.int32)


def align(pieces: list[bytes], reasoning: str, content: str, *, ended: bool) -> tuple[str, ByteLengths | None]:
    """Join an answer that the server has split, and align its tokens with the text.

    The text is `<think>`, reasoning, `</think>`, content, with the usual line breaks between them. Tokens may spell
    the tags in this way, in another way, or not at all; in the last case the bytes of a tag belong to the token before
    it (those of `<think>` to the first token). A last token after the text has no bytes: the end token, or half a
    character.

    Args:
        pieces: Bytes of each token.
        reasoning: The thinking, without tags.
        content: The answer after the thinking.
        ended: The model ended its turn, so the last token may be an end token.

    Returns:
        The text, and the bytes of it that each token has; None if the tokens spell another text.
    """
    text, lengths = _align_exactly(pieces, reasoning, content, ended=ended)
    if lengths is None and _BAD in text:
        # vLLM's server reports no bytes for a token that is not or only half a character, and puts U+FFFD in the text.
        bare, bare_lengths = _align_exactly(pieces, reasoning.replace(_BAD, ""), content.replace(_BAD, ""), ended=ended)
        if bare_lengths is not None and bare == text.replace(_BAD, ""):
            gaps = np.cumsum([len(part.encode()) for part in text.split(_BAD)[:-1]])
            edges = np.cumsum([0, *bare_lengths])
            last = np.append(edges[1:] > edges[:-1], True)  # among equal edges
            before = np.where(last, np.searchsorted(gaps, edges, "right"), np.searchsorted(gaps, edges))
            before[0] = 0
            lengths = np.diff(edges + len(_BAD.encode()) * before).astype(np.int32)
    return text, lengths


def _align_exactly(pieces: list[bytes], reasoning: str, content: str, *, ended: bool) -> tuple[str, ByteLengths | None]:
    pieces = replace_invalid(pieces)
    raw = b"".join(pieces)
    think, answer = reasoning.encode(), content.encode()
    think_at = closing_at = answer_at = 0
    opening = closing = b""
    if think:
        opening, answer = b"<think>\n", content.lstrip(_SPACE).encode()
        think_at = opened.end() if (opened := _OPENED.match(raw)) else 0
        closing_at = answer_at = think_at + len(think)
        closed = _CLOSED.match(raw, closing_at)
        # Without an answer or a tag, nothing shows that the thinking has ended, so the text does not close it.
        if closed and (answer or closed.group(1)):
            closing, answer_at = b"\n</think>\n\n", closed.end()
    end, text = answer_at + len(answer), opening + think + closing + answer
    rest = raw[end:].strip()
    fits = raw[think_at:closing_at] == think and raw[answer_at:end] == answer
    if not fits or rest not in (b"", _BAD.encode(), *([pieces[-1].strip()] if ended and pieces else [])):
        return text.decode(), None
    raw_bounds = np.array([0, think_at, closing_at, answer_at, end])
    text_bounds = np.cumsum([0, len(opening), len(think), len(closing), len(answer), 0])
    edges = np.cumsum([0, *map(len, pieces)])
    part = np.searchsorted(raw_bounds, edges, side="right") - 1
    text_edges = np.minimum(text_bounds[part] + edges - raw_bounds[part], text_bounds[part + 1])
    text_edges[0] = 0
    return text.decode(), np.diff(text_edges).astype(np.int32)
