"""What a completion says after its thinking."""

from __future__ import annotations


def conclusion(text: str) -> str | None:
    """Return the text after the thinking, or None if the thinking does not end."""
    _, closed, rest = text.rpartition("</think>")
    return None if not closed and "<think>" in rest else rest
