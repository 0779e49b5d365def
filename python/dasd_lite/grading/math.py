"""Extract the answer of a completion and compare it with the right one.

Input: a completion and the right answer as text. Output: right, wrong, or unparseable when no answer
is found; unparseable is a column of its own and never success.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_MARKED = re.compile(r"answer\**(?:\s*(?:\bis\b|:|=))+\s*\**\s*(.+)", re.IGNORECASE)
_MAX_EXPONENT = 4  # digits: 1e9999 is a number, 1e999999999 is a gigabyte


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion and the answer found in it."""

    verdict: str
    extracted: str | None


def grade(completion: str, answer: str) -> Grade:
    r"""Grade a completion: the last `\boxed{…}` after the thinking, or else the last `Answer: …`."""
    found = extract(completion)
    if found is None:
        return Grade("unparseable", None)
    return Grade("right" if _same(found, answer) else "wrong", found)


def extract(completion: str) -> str | None:
    """Return the answer that a completion states behind its thinking, or None."""
    _, closed, said = completion.rpartition("</think>")
    if not closed and "<think>" in said:
        return None  # still thinking where it was cut off
    boxed = _last_boxed(said)
    if boxed is not None:
        return boxed.strip()
    marked = _MARKED.findall(said)
    return _tidy(marked[-1]) if marked else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed")
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin + 1 : i]
    return None


def _tidy(text: str) -> str:
    """Take the answer off the rest of its line: marks around it, and a sentence that follows it."""
    return re.split(r"(?<=[^\s.])\.(?:\s|$)", text.strip())[0].strip(" *`\"'$").rstrip(".,;")


def _same(found: str, answer: str) -> bool:
    a, b = _number(found), _number(answer)
    if a is not None and b is not None:
        return a == b
    return " ".join(found.split()).casefold() == " ".join(answer.split()).casefold()


def _number(text: str) -> Fraction | None:
    plain = re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text.strip().strip("$"))
    plain = plain.replace(",", "").replace(" ", "").removesuffix("%")
    if len(plain.lower().partition("e")[2].lstrip("+-")) > _MAX_EXPONENT:
        return None
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None
