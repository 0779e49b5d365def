"""A graded answer as people may see it.

Input: a row of an evaluation. Output: the same row, ready to be printed or exported. Invariant: of a hidden task no
word of the question, of its options, or of a completion, which repeats them, is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dasd_lite.data.records import HIDDEN_TASKS, HIDDEN_TEXT, RIGHT
from dasd_lite.data.references import kind_of, read_choices, read_tests


def without_hidden_text(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row; of a hidden task without its texts, with the letter of the right option as the answer."""
    if row.get("task") not in HIDDEN_TASKS:
        return dict(row)
    answer, extracted = row["answer"] or "", row["extracted"]
    return {
        **row,
        "messages": [{**message, "content": HIDDEN_TEXT} for message in row["messages"]],
        "completion": HIDDEN_TEXT,
        "answer": read_choices(answer).letter if kind_of(answer) == "choice" else HIDDEN_TEXT,
        "extracted": extracted if extracted is None or len(extracted) == 1 else HIDDEN_TEXT,
        "reason": None,
        "vote": row["vote"] if row["vote"] in (None, RIGHT) else HIDDEN_TEXT,  # the text of an option
    }


def reference_in_words(answer: str) -> str:
    """Return what an answer is graded against: of options the right one, of tests their number."""
    match kind_of(answer):
        case "choice":
            choices = read_choices(answer)
            return f"{choices.letter} ({choices.options[choices.right]})"
        case "code":
            tests = read_tests(answer)
            return tests.summary or f"{len(tests.tests):,} tests" + (" and private ones" if tests.private else "")
        case _:
            return answer
