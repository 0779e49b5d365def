"""Messages as every tool writes them → roles and texts.

Input: a list of messages with `role` and `content`, or `from` and `value`. Output: messages of the roles system, user
and assistant, and the assistant's last one apart from them. Invariant: whatever a message has that is not read is a
fault, or is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dasd_lite.data.formats.row import Fault
from dasd_lite.data.records import Message

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "answer"), "assistant"),
}
"""What the roles of other tools are here."""
THINKING = ("reasoning_content", "reasoning", "thinking")
"""Where a message or row may have the thinking before the answer."""
_TRAINED = ("weight", "loss", "train", "trainable")
_CHANGES = ("tool_calls", "function_call", "tool_call_id", "tools", "functions", "refusal", "audio", "images", "image")
_READ = frozenset({"role", "content", "from", "value", *THINKING, *_TRAINED, *_CHANGES})


@dataclass(frozen=True, slots=True)
class Turn:
    """What the assistant says: `thinking` is "" if it has no field of its own."""

    content: str
    thinking: str = ""
    is_trained: bool = True


def read_messages(
    value: Sequence[Any], key: str, unread: Counter[str], mapped: Collection[tuple[str | int, str]] = ()
) -> tuple[list[Message], Turn | None]:
    """Return a conversation without the answer at its end, and that answer.

    Args:
        value: The messages.
        key: Where they are, for errors.
        unread: Counts what is not read and changes nothing.
        mapped: Role or position, and field, of what else is read of a message.

    Raises:
        Fault: A message that is not understood, or with something that changes its meaning.
    """
    messages: list[Message] = []
    last: Turn | None = None
    for i, message in enumerate(value):
        role, turn = _read(message, key, i, unread, mapped)
        if last is not None:
            if role == "assistant":
                raise Fault(f"{key}[{i - 1}] and {key}[{i}] are both the assistant's; one answer follows a question")
            messages.append({"role": "assistant", "content": last.content})
            unread["thinking of earlier answers"] += bool(last.thinking)
            last = None
        if role == "assistant":
            last = turn
        else:
            messages.append({"role": role, "content": turn.content})
    return messages, last


def _read(
    message: Any, key: str, position: int, unread: Counter[str], mapped: Collection[tuple[str | int, str]]
) -> tuple[str, Turn]:
    """Return the role and text of a message."""
    at = f"{key}[{position}]"
    if not isinstance(message, Mapping):
        raise Fault(f"{at} = {shown(message)}; a message has role and content, or from and value")
    role, content = role_of(message), content_of(message)
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        what = (
            "calls of tools are not read"
            if role in ("tool", "function", "observation", "function_call")
            else ("should be system, user or assistant")
        )
        raise Fault(f"{at}: role = {shown(role)}; {what}")
    thinking, is_trained = "", True
    if len(message) > 2 or content is None:
        for name, extra in message.items():
            if extra is None or extra == "" or extra == [] or name in ("role", "content", "from", "value"):
                continue
            if name in THINKING:
                if not isinstance(extra, str):
                    raise Fault(f"{at}.{name} = {shown(extra)}; it must be text")
                if thinking not in ("", extra):
                    raise Fault(f"{at} has two fields with different thinking; {name} is one of them")
                thinking = extra
            elif name in _TRAINED:
                if not isinstance(extra, bool) and extra not in (0, 1):
                    raise Fault(f"{at}.{name} = {shown(extra)}; only 0 and 1 are read")
                is_trained = is_trained and bool(extra)
            elif name in _CHANGES:
                raise Fault(f"{at} has {name}, which are not read")
            elif (known, name) not in mapped and (position, name) not in mapped:
                unread[f"{key}[{known}].{name}"] += 1
    if not isinstance(content, str):
        inside, content = _parts(content, at)
        thinking = thinking or inside
    return known, Turn(content, thinking, is_trained)


def role_of(message: Mapping[str, Any]) -> Any:
    """Return the role of a message, under either name; the other may be there and null."""
    return message.get("from") if (role := message.get("role")) is None else role


def content_of(message: Mapping[str, Any]) -> Any:
    """Return the content of a message, under either name."""
    return message.get("value") if (content := message.get("content")) is None else content


def _parts(content: Any, at: str) -> tuple[str, str]:
    """Return thinking and text of content that is a list of parts."""
    if content is None:
        return "", ""
    if not isinstance(content, list):
        raise Fault(f"{at}.content = {shown(content)}; it must be text, or a list of parts")
    thinking, texts = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning"):
            inner = next((part[name] for name in ("thinking", "reasoning", "text") if part.get(name)), "")
            thinking.append(inner if isinstance(inner, str) else _parts(inner, at)[1])
        else:
            raise Fault(f"{at}.content has a part of type {shown(kind)}; only text and thinking are read")
    return "".join(thinking), "".join(texts)


def listed(names: Iterable[str], most: int = 30) -> str:
    """Write names of columns into a line, however many there are and whatever they contain."""
    every = [name if name.isprintable() and len(name) <= 60 else shown(name) for name in names]
    return ", ".join(every[:most]) + (f" and {len(every) - most:,} more" if len(every) > most else "")


def shown(value: Any) -> str:
    """Write a value of a file into an error, cut short."""
    text = repr(value[:100]) if isinstance(value, str) else repr(value)[:200]
    return text if len(text) <= 60 else f"{text[:59]}…"
