r"""The grader for mathematics: is the final answer of a completion equal to that of the reference?

Input: a completion and a reference, as text. Output: a `Grade`. Invariants: never right by accident of form, so in
doubt an answer is `unparseable`; the time is bounded, and linear in the length of the completion.

Both texts are read by the same code (`data/formats/final_answer.py`) and brought into a normal form (`normal.py`); only
what that leaves open goes to a computer algebra system (`algebra.py`). docs/evaluation.md has the rules with examples.
"""

from __future__ import annotations

import re
import threading

from dasd_lite.data.formats.final_answer import final_answers, reference_answer
from dasd_lite.grading.grade import Grade
from dasd_lite.grading.math.algebra import Budget, Unknown, Unparseable, is_available
from dasd_lite.grading.math.normal import MAX_CHARS, Words, canonical, read, same

__all__ = ["canonical", "fault", "grade"]

_NO_REFERENCE = "the reference states no answer"
_MAX_CACHE = 50_000
_cache: dict[tuple[str, str], Grade] = {}  # (reference, stated) -> its grade
_lock = threading.Lock()


def grade(completion: str, reference: str) -> Grade:
    """Grade the final answer of a completion, behind its thinking."""
    stated, later = final_answers(completion)
    if stated is None:
        return Grade("no_answer", None)
    graded = _remembered(stated, reference)
    if later is not None and re.search(r"[\d\\]|^\W*[A-Za-z]\W*$", later):
        verdicts = {graded.verdict, _remembered(later, reference).verdict}
        if verdicts == {"right", "wrong"}:
            return Grade("unparseable", stated, f"behind it the text says that the answer is {later[:40]!r}")
    return graded


def _remembered(stated: str, reference: str) -> Grade:
    with _lock:
        known = _cache.get((reference, stated))
    if known is not None:
        return known
    graded = _grade(stated, reference)
    if graded.verdict != "unknown":  # the next try may have more luck
        with _lock:
            if len(_cache) >= _MAX_CACHE:
                _cache.clear()
            _cache[reference, stated] = graded
    return graded


def fault(reference: str) -> str | None:
    """Return why nothing can be graded against a reference, in half a sentence, or None."""
    if not reference.strip():
        return "it is empty; give the answer, or leave the row out"
    answer = reference_answer(reference)
    if answer is None:
        return r"no answer is found in it; give the answer alone, in \boxed{…}, or behind a last '####'"
    if len(answer) > MAX_CHARS:
        return f"the answer in it has {len(answer):,} characters; at most {MAX_CHARS:,} can be compared"
    return None


def _grade(stated: str, reference: str) -> Grade:
    gold = reference_answer(reference)
    if gold is None:
        return Grade("unparseable", stated, _NO_REFERENCE)
    if stated.strip() in (gold, reference.strip()):
        return Grade("right", stated)
    if "\\boxed" in stated:
        return Grade("unparseable", stated, "the box is a part of a formula")
    if (letter := re.fullmatch(r"\(?([A-Z])\)?", gold)) and (said := _LETTER.match(stated)):
        return Grade("right" if said[1] == letter[1] else "wrong", stated)
    a, b = read(gold), read(stated)
    if isinstance(a, Words) and isinstance(b, Words) and a.text == b.text:
        return Grade("right", stated)
    budget, reasons = Budget(), []

    def equal(x: str, y: str) -> bool | None:
        if not is_available():
            reasons.append("math-verify is not installed")
            return None
        try:
            return budget.equal(x, y)
        except Unparseable as error:
            reasons.append(str(error))
            return None

    try:
        verdict = same(a, b, equal)
    except Unknown as error:
        return Grade("unknown", stated, str(error))
    if verdict is None:
        return Grade("unparseable", stated, reasons[0] if reasons else "the two cannot be compared")
    return Grade("right" if verdict else "wrong", stated)


_LETTER = re.compile(r"\W*(?:\\text\w*\s*\{|\\math\w+\s*\{)?\W*(?:(?:option|choice)\s+)?\(?([A-Z])(?=[).:}]|\s*$)")
