"""What the first questions of a long evaluation show, while there is time to stop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from dasd_lite.console import note
from dasd_lite.data.asked import Asked
from dasd_lite.data.references import kind_of
from dasd_lite.grading import CheckedGrader

QUESTIONS = 10
_SHORT_SECONDS = 60.0  # an evaluation that is over by then needs no look


class EarlyLook:
    """Prints one line as soon as the first ten questions have their answers, if the rest will take a while."""

    def __init__(self, label: str, plan: Sequence[Asked], grade: CheckedGrader, num_done: int) -> None:
        """Look at the first questions of `plan`; at none if some of it is done already, as it has been seen then."""
        self._label, self._plan, self._grade = label, plan, grade
        first = dict.fromkeys((each.task, each.key, each.before) for each in plan)
        wanted = set(list(first)[:QUESTIONS])
        self._waiting = {at for at, each in enumerate(plan) if (each.task, each.key, each.before) in wanted}
        if num_done or len(first) <= QUESTIONS:
            self._waiting = set()
        self._num_looked, self._seen, self._tokens = len(self._waiting), Counter[str](), 0
        self._num_answers, self._started = 0, time.perf_counter()

    def look(self, position: int, text: str, finish_reason: str, num_tokens: int) -> None:
        """Take note of an answer to a question of the plan."""
        self._num_answers += 1
        if position not in self._waiting:
            return
        self._waiting.remove(position)
        answer = self._plan[position].question.answer or ""
        if finish_reason == "length":
            self._seen["cut off"] += 1
        elif kind_of(answer) != "code" and not self._grade.is_own:  # they may take long, and are asked at the end
            self._seen[self._grade(text, answer).verdict] += 1
        self._tokens += num_tokens
        if not self._waiting:
            self._say()

    def _say(self) -> None:
        seconds = time.perf_counter() - self._started
        rest = seconds * (len(self._plan) - self._num_answers) / self._num_answers
        if rest < _SHORT_SECONDS:
            return
        number, seen = self._num_looked, self._seen
        looked_at = seen.total()  # those that were cut off or graded
        parts = [f"{seen['right'] / looked_at:.0%} right"] if looked_at > seen["cut off"] else []
        parts += [f"{seen[name] / looked_at:.0%} {words}" for name, words in _WORDS.items() if name in seen and parts]
        parts += [f"{seen['cut off'] / number:.0%} cut off", f"{self._tokens / number:,.0f} tokens each"]
        left = f"{rest / 3600:,.1f} h" if rest >= 3600 else f"{rest / 60:,.0f} min"
        note(
            f"{self._label}: the first {QUESTIONS} questions ({number:,} answers): {', '.join(parts)};"
            f" about {left} left"
        )


_WORDS = {"no_answer": "without an answer", "unparseable": "unparseable", "unknown": "unknown"}
