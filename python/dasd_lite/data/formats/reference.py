r"""A reference answer inside a text: behind the last `####`, as GSM8K has it, or in a `\boxed{…}`.

Input: the text of a column. Output: the answer alone, or None if the text does not mark one.
"""

from __future__ import annotations

_HASHES = "####"


def marked(text: str) -> str | None:
    r"""Return what is behind `####` on the last line of a text, or else in its last `\boxed{…}`."""
    return after_hashes(text) if ends_in_hashes(text) else (last_boxed(text) or "").strip() or None


def after_hashes(text: str) -> str | None:
    """Return what follows the last `####` of a text."""
    _, mark, answer = text.rpartition(_HASHES)
    return (answer.strip() or None) if mark else None


def ends_in_hashes(text: str) -> bool:
    """Return whether the last line of a text is `#### …`, so that it is a solution and no answer."""
    last = text.strip().rpartition("\n")[2]
    return last.startswith(_HASHES) and after_hashes(last) is not None


def last_boxed(text: str) -> str | None:
    r"""Return what is between the braces of the last `\boxed{…}` of a text; None if there is none that closes."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed")
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin + 1 : i]
    return None
