"""The grader for mathematics: compares the final answer of a completion with the reference answer.

Numbers are equal if their values are, and other answers if their text is, apart from case and white space.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dasd_lite.data.formats.reference import last_boxed
from dasd_lite.grading.grade import Grade

_MARKED = re.compile(r"answer\**(?:\s*(?:\bis\b|:|=))+\s*\**\s*(.+)", re.IGNORECASE)
_MAX_EXPONENT = 4  # digits; the value of 1e999999999 would take a gigabyte


def grade(completion: str, answer: str) -> Grade:
    r"""Grade a completion by its last `\boxed{…}` after the thinking, or else its last `Answer: …`."""
    extracted = extract(completion)
    if extracted is None:
        return Grade("no_answer", None)
    return Grade("right" if _same(extracted, answer) else "wrong", extracted)


def extract(completion: str) -> str | None:
    """Return the answer that a completion states after its thinking, or None."""
    _, closed, conclusion = completion.rpartition("</think>")
    if not closed and "<think>" in conclusion:
        return None  # cut off while thinking
    boxed = last_boxed(conclusion)
    if boxed is not None:
        return boxed.strip()
    marked = _MARKED.findall(conclusion)
    return _tidy(marked[-1]) if marked else None


def _tidy(text: str) -> str:
    """Remove markup around an answer, and a sentence that follows it on its line."""
    return re.split(r"(?<=[^\s.])\.(?:\s|$)", text.strip())[0].strip(" *`\"'$").rstrip(".,;")


def _same(extracted: str, answer: str) -> bool:
    a, b = _number(extracted), _number(answer)
    if a is not None and b is not None:
        return a == b
    return " ".join(extracted.split()).casefold() == " ".join(answer.split()).casefold()


def _number(text: str) -> Fraction | None:
    plain = re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text.strip().strip("$"))
    plain = plain.replace(",", "").replace(" ", "").removesuffix("%")
    if len(plain.lower().partition("e")[2].lstrip("+-")) > _MAX_EXPONENT:
        return None
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None
