"""Formats by name: where published data sets and other tools have what is read.

A format is a map of columns. `signature` are columns by which `format = "auto"` recognizes it; most need none, because
the columns have names that are read anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from dasd_lite.config.reading import Columns

Reference: TypeAlias = Literal["as it is", "after ####", "marked or as it is", "tests or as it is"]
"""How the column of the reference answer is read, which may hold a worked solution, or tests as JSON."""


@dataclass(frozen=True)
class Format:
    """A format: its map, what `auto` knows it by, and how its reference answers are read."""

    columns: Columns
    signature: frozenset[str] = frozenset()
    reference: Reference = "as it is"

    @property
    def has_answers(self) -> bool:
        """Whether its rows have answers, not only questions."""
        return self.columns.completion is not None or self.columns.prompt in ("messages", "conversations")


def _format(*signature: str, reference: Reference = "as it is", **columns: object) -> Format:
    return Format(Columns.model_validate(columns), frozenset(signature), reference)


_NEMOTRON_MATH: dict[str, Any] = {
    "prompt": "messages",
    "answer": "expected_answer",
    "only": {"tools": ""},  # the others call Python in their thinking
    "ignore": ["problem"],
}

PRESETS: dict[str, Format] = {
    # --- tools
    "messages": _format(prompt="messages"),
    "sharegpt": _format(prompt="conversations", system="system"),
    "alpaca": _format(prompt=["instruction", "input"], completion="output", system="system"),
    "trl": _format(prompt="prompt", completion="completion"),
    "prompt-response": _format(prompt="prompt", completion="response"),
    "input-output": _format(prompt="input", completion="output"),
    "rollouts": _format(
        *("prompt_uid", "messages", "completion", "prefix_bytes"),
        prompt="messages",
        completion="completion",
        uid="uid",
        prompt_uid="prompt_uid",
        domain="domain",
        answer="answer",
        finish_reason="finish_reason",
    ),
    "verl": _format(
        "prompt",
        "reward_model",
        "data_source",
        prompt="prompt",
        answer="reward_model.ground_truth",
        domain="data_source",
        reference="tests or as it is",
    ),
    # --- data sets
    "dasd": _format(
        "uuid", "input", "output", "domain", prompt="input", completion="output", uid="uuid", domain="domain"
    ),
    "openthoughts": _format(prompt="conversations", system="system", domain="domain"),
    "openr1-math": _format(
        *("problem", "generations", "is_reasoning_complete"),
        prompt="problem",
        completion="generations",
        answer="answer",
        uid="uuid",
        finish_reason="finish_reasons",
        keep="is_reasoning_complete",
        ignore=["messages"],  # the first generation again
    ),
    "am-deepseek-r1": _format(prompt="messages", answer="messages[user].info.reference_answer"),
    "nemotron-post-training": _format(
        *("category", "reasoning", "messages", "generator"),
        prompt="messages",
        uid="uuid",
        domain="category",
        ignore=["reasoning"],  # "on" or "off"
    ),
    "nemotron-math": _format("problem", "messages", "expected_answer", uid="uuid", **_NEMOTRON_MATH),
    "openmathreasoning": _format(
        *("problem", "generated_solution", "expected_answer"),
        prompt="problem",
        completion="generated_solution",
        answer="expected_answer",
    ),
    "acereason": _format(prompt="input", completion="output", domain="category"),
    "opencodereasoning": _format(
        "input", "output", "solution", "dataset", prompt="input", completion="output", uid="id"
    ),
    "deepmath": _format(
        *("question", "final_answer", "r1_solution_1"),
        prompt="question",
        completion=["r1_solution_1", "r1_solution_2", "r1_solution_3"],
        answer="final_answer",
    ),
    "numinamath": _format(
        *("problem", "solution", "answer", "problem_is_valid", "question_type"),
        prompt="problem",
        answer="answer",
        only={"problem_is_valid": "Yes"},
        no_answer=["proof", "notfound"],
    ),
    "s1k": _format(
        *("question", "thinking_trajectories", "attempt"),
        prompt="question",
        thinking="thinking_trajectories[0]",
        completion="attempt",
        answer="solution",
        reference="marked or as it is",  # a number, or prose
    ),
    "s1k-1.1": _format(
        *("question", "deepseek_thinking_trajectory", "deepseek_attempt", "gemini_attempt"),
        prompt="question",
        thinking=["gemini_thinking_trajectory", "deepseek_thinking_trajectory"],
        completion=["gemini_attempt", "deepseek_attempt"],
        answer="solution",
        reference="marked or as it is",
        ignore=["thinking_trajectories", "attempt"],
    ),
    "limo": _format(prompt="question", completion="solution", answer="answer"),
    "dolci-think": _format(prompt="messages", uid="id"),
    "gsm8k": _format(prompt="question", answer="answer", reference="after ####"),
    "livecodebench": _format(
        *("question_content", "public_test_cases"),
        prompt="question_content",
        tests=["public_test_cases", "private_test_cases"],
        function="metadata.func_name",
        starter_code="starter_code",
        uid="question_id",
    ),
}
