"""Tokens, requests and money that a teacher has been asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dasd_lite.config.models import Prices


@dataclass
class Usage:
    """Tokens that were read and written, which is what providers charge for."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    answers: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Return both together."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.answers + other.answers,
        )

    @property
    def tokens(self) -> int:
        """Return how many in all."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count one answer more."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.answers += 1

    def cost(self, prices: Prices | None) -> float | None:
        """Return what these tokens cost, or none without prices."""
        if prices is None:
            return None
        return (self.prompt_tokens * prices.input + self.completion_tokens * prices.output) / 1e6
