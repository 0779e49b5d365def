"""Thinking as every tool writes it → `<think>…</think>` and the final answer.

Input: the text of an answer, and its thinking if that has a field of its own. Output: one text. Invariant: a text that
has `<think>` already stays as it is to the byte, except for an `<answer>` right behind the thinking. Tags that do not
enclose all of the rest stay too.
"""

from __future__ import annotations

import re

from dasd_lite.data.formats.conversation import shown
from dasd_lite.data.formats.row import Fault

_SPACE = " \t\r\n"
_THOUGHT = re.compile(
    r"\s*(?:<\|begin_of_thought\|>(?P<a>.*?)(?:<\|end_of_thought\|>(?P<b>.*))?|\[THINK\](?P<c>.*?)(?:\[/THINK\](?P<d>.*))?)",
    re.DOTALL,
)
# A closing tag is at the end or missing; text behind one is no part of what the tags mark.
_SOLUTION = re.compile(
    r"\s*<\|begin_of_solution\|>((?:(?!<\|end_of_solution\|>).)*)(?:<\|end_of_solution\|>\s*)?", re.DOTALL
)
_ANSWER = re.compile(r"(\s*)<(answer|final_answer|final)>((?:(?!</\2>).)*)(?:</\2>\s*)?", re.DOTALL)

# gpt-oss's channels as text. chat/harmony.py reads sampled tokens; a test holds the two against each other.
_SPECIAL = r"<\|(?:channel|message|start|end|return|call|constrain)\|>"
_MESSAGE = re.compile(
    r"<\|channel\|>(analysis|commentary|final)(?: ?<\|constrain\|> ?[\w/.+-]+)?\s*<\|message\|>"
    rf"((?:(?!{_SPECIAL}).)*)",
    re.DOTALL,
)
_END = re.compile(r"(?:<\|(?:end|return)\|>)?\s*")
_CUT_OFF = re.compile(r"<\|end\|><\|start\|>(?:assistant(?:<\|channel\|>\w*)?)?\s*")
_START, _NEXT = "<|start|>assistant", "<|end|><|start|>assistant"


def join(thinking: str, content: str) -> tuple[str, str]:
    """Return one text of an answer, and which tags of the file were rewritten in it ("" for none).

    Args:
        thinking: The thinking, if it has a field of its own; else "".
        content: The text of the answer.

    Raises:
        Fault: Both have a thinking, and they differ.
    """
    content, rewritten = rewrite(content)
    thinking = thinking.strip(_SPACE)
    if not thinking:
        return content, rewritten
    if content.lstrip(_SPACE).startswith("<think>"):
        inside = content.partition("<think>")[2].partition("</think>")[0]
        if inside.strip(_SPACE) == thinking:
            return content, rewritten
        raise Fault("its thinking is in a field of its own and, another one, in <think> of the answer")
    if not content.strip(_SPACE):
        return f"<think>\n{thinking}", rewritten  # nothing shows that it ended
    if match := _ANSWER.fullmatch(content):
        content, rewritten = match[3].strip(_SPACE), f"<{match[2]}>"
    return f"<think>\n{thinking}\n</think>\n\n{content.lstrip(_SPACE)}", rewritten


def rewrite(text: str) -> tuple[str, str]:
    """Return `text` with `<think>` in place of other tags, and the tag that was rewritten ("" for none).

    Raises:
        Fault: It has channels with calls of tools, or in an order that is not valid.
    """
    start = text[:40].lstrip(_SPACE)
    if start.startswith(("<|begin_of_thought|>", "[THINK]")):
        match = _THOUGHT.fullmatch(text)
        assert match is not None, "both tags may be open"
        thinking, rest = (match["a"], match["b"]) if match["a"] is not None else (match["c"], match["d"])
        tag = "<|begin_of_thought|>" if match["a"] is not None else "[THINK]"
        if rest is None:
            return f"<think>\n{thinking.strip(_SPACE)}", tag
        if solution := _SOLUTION.fullmatch(rest):
            rest = solution[1]
        elif "<|end_of_solution|>" in rest:
            return text, ""
        return f"<think>\n{thinking.strip(_SPACE)}\n</think>\n\n{rest.strip(_SPACE)}", tag
    if start.startswith(("<|channel|>", _START)):
        return _from_channels(text.lstrip(_SPACE)), "<|channel|>"
    if start.startswith("<think>"):
        end = text.find("</think>") + len("</think>")
        is_tag = end >= len("</think>") and text[end : end + 40].lstrip(_SPACE).startswith("<")
        if is_tag and (match := _ANSWER.fullmatch(text, end)):
            return f"{text[:end]}{match[1]}{match[3].strip(_SPACE)}", f"<{match[2]}>"
    return text, ""


def _from_channels(text: str) -> str:
    """Return an answer in gpt-oss's channels as one with `<think>`."""
    at = len(_START) if text.startswith(_START) else 0
    parts: list[str] = []
    while (match := _MESSAGE.match(text, at)) is not None:
        channel, at = match[1], match.end()
        if channel == "final":
            parts.append("\n</think>\n\n" if parts else "")
        else:
            parts.append("\n\n" if parts else "<think>\n")
        parts.append(match[2])
        if _END.fullmatch(text, at) or (channel != "final" and _CUT_OFF.fullmatch(text, at)):
            return "".join(parts)
        if channel == "final" or not text.startswith(_NEXT, at):
            break
        at += len(_NEXT)
    raise Fault(
        f"has channels of gpt-oss that are not valid, or call a tool, at character {at}: {shown(text[at : at + 60])};"
        " only analysis, commentary and final are read, which is the last"
    )
