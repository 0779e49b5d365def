"""Whether an answer is right.

Input: a completion and the reference answer, as text. Output: a `Grade` with one of five verdicts. Invariant: only
`right` counts as right; each of the others is counted on its own.

A grader of your own is any function like this, or an instance whose class has such a `__call__`. The recipe names it as
`evaluate.grader = "package.module:attribute"`:

    from dasd_lite import Grade

    def grade(completion: str, answer: str) -> Grade:
        stated = completion.splitlines()[-1]
        return Grade("right" if stated == answer else "wrong", stated)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from dasd_lite.config.extensions import check_callable, code_hash, is_extension, load_extension, name_of, running
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.grading import math
from dasd_lite.grading.grade import VERDICTS, Grade, Grader

GRADERS: dict[str, Grader] = {"math": math.grade}
"""The built-in graders."""

_KEY = "evaluate.grader"


@dataclass(frozen=True)
class CheckedGrader:
    """A grader whose results are checked.

    Attributes:
        function: The grader itself.
        name: Its built-in name, or `package.module:attribute`.
        code: Hash of its source; None for a built-in grader.
    """

    function: Callable[..., Any]
    name: str
    code: str | None = None

    def __call__(self, completion: str, answer: str) -> Grade:
        """Grade a completion. Raises DataError if the grader returns anything but a valid Grade."""
        own = self.code is not None  # an exception in a grader of ours is a defect and stays a traceback
        with running(self.function, f"grader {self.name}") if own else nullcontext():
            result = self.function(completion, answer)
        if not isinstance(result, Grade) or not result.is_valid():
            returned = " ".join(repr(result).split())[:80]
            raise DataError(
                f"grader {self.name} returned {returned}; it must return Grade(verdict, extracted), where verdict is"
                f" {', '.join(map(repr, VERDICTS))} and extracted is text or None"
            )
        return result


def open_grader(grader: str | Grader) -> CheckedGrader:
    """Return a grader, ready to use.

    Args:
        grader: The name of a built-in grader, `package.module:attribute`, or a function.

    Raises:
        ConfigError: There is no such grader, or it cannot be called with a completion and an answer.
    """
    if isinstance(grader, str) and grader in GRADERS:
        return CheckedGrader(GRADERS[grader], grader)
    if isinstance(grader, str) and not is_extension(grader):
        raise ConfigError(f"{_KEY} = {grader!r}: use {' or '.join(map(repr, GRADERS))}, or package.module:attribute")
    function = load_extension(grader, kind="grader", key=_KEY) if isinstance(grader, str) else grader
    check_callable(function, ("completion", "answer"), kind="grader", key=_KEY)
    name = grader if isinstance(grader, str) else name_of(grader)
    return CheckedGrader(function, name, code_hash(function))
