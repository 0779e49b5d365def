"""What every grader returns, and what one is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

Verdict = Literal["right", "wrong", "no_answer", "unparseable", "unknown"]
"""`right` and `wrong` are claims. `no_answer`: the completion states no final answer, or was cut off. `unparseable`: it
states one that cannot be compared with the reference. `unknown`: the comparison took too long or died."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
UNDECIDED: tuple[Verdict, ...] = ("unparseable", "unknown")
"""Verdicts of answers that may be right."""


@dataclass(frozen=True)
class Grade:
    """The verdict on a completion, and the answer that it states.

    `reason` says in a few words why it is not right, where that is not plain: the test that failed, the limit that was
    reached.
    """

    verdict: Verdict
    extracted: str | None
    reason: str | None = None

    def is_valid(self) -> bool:
        """Return whether all fields have a value that they may have."""
        return self.verdict in VERDICTS and _is_text(self.extracted) and _is_text(self.reason)


def _is_text(value: object) -> bool:
    """Return whether it is None, or text that can be written as UTF-8."""
    if not isinstance(value, str):
        return value is None
    return not any("\ud800" <= char <= "\udfff" for char in value)


class Grader(Protocol):
    """Decides whether a completion is right; called with both by position."""

    def __call__(self, completion: str, answer: str, /) -> Grade:
        """Compare the final answer of `completion` with `answer`."""
        ...
