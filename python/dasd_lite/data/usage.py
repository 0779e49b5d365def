"""What a teacher's answers cost: tokens and money."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dasd_lite.config.models import Prices


@dataclass
class Usage:
    """Tokens that a teacher read and wrote. Providers charge for both.

    Attributes:
        prompt_tokens: Tokens read.
        completion_tokens: Tokens written.
        answers: Number of answers.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    answers: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Return the sum of both."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.answers + other.answers,
        )

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Add one answer."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.answers += 1

    def cost(self, prices: Prices | None) -> float | None:
        """Return the cost of these tokens, in the currency of `prices`, or None without prices."""
        if prices is None:
            return None
        return (self.prompt_tokens * prices.input + self.completion_tokens * prices.output) / 1e6
