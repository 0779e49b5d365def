"""What every grader returns, and what one is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

Verdict = Literal["right", "wrong", "unparseable"]


@dataclass(frozen=True)
class Grade:
    """The verdict on a completion, and the answer that it states."""

    verdict: Verdict
    extracted: str | None

    def is_valid(self) -> bool:
        """Return whether both fields have a value that they may have."""
        return self.verdict in get_args(Verdict) and isinstance(self.extracted, str | None)


class Grader(Protocol):
    """Decides whether a completion is right; called with both by position."""

    def __call__(self, completion: str, answer: str, /) -> Grade:
        """Compare the final answer of `completion` with `answer`."""
        ...
