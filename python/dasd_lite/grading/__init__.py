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

import importlib
import os
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from dasd_lite.config.evaluate import GRADERS
from dasd_lite.config.extensions import check_callable, code_hash, is_extension, load_extension, name_of, running
from dasd_lite.console import note
from dasd_lite.data.references import Kind, kind_of
from dasd_lite.data.seeds import digest
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.grading.grade import VERDICTS, Grade, Grader

_KEY = "evaluate.grader"
_VERSION = 2  # of what the built-in graders decide; 1 compared strings
_LETTER = re.compile(r"\(?[A-J]\)?\.?")
_THREADS = 32
_GIVEN_UP = 3  # answers on which a grader may hang; every further one costs a processor


@dataclass(frozen=True)
class CheckedGrader:
    """A grader whose results are checked.

    Attributes:
        function: The grader itself.
        name: Its built-in name, or `package.module:attribute`.
        code: Hash of all that its verdicts depend on beside completion and reference.
        is_own: Whether it is the user's own.
        seconds: After these, a grader of the user's own is given up.
        given_up: The references of the answers on which it was.
    """

    function: Callable[..., Any]
    name: str
    code: str
    is_own: bool = False
    seconds: float = 60.0
    given_up: list[str] = field(default_factory=list, compare=False)

    def __call__(self, completion: str, answer: str) -> Grade:
        """Grade a completion.

        Raises:
            DataError: A grader of the user's own returned anything but a valid Grade, or hung on several answers.
        """
        # An exception in a grader of ours is a defect and stays a traceback.
        result = self._call_own(completion, answer) if self.is_own else self.function(completion, answer)
        if not isinstance(result, Grade) or not result.is_valid():
            returned = " ".join(repr(result).split())[:80]
            raise DataError(
                f"grader {self.name} returned {returned}; it must return Grade(verdict, extracted), where verdict is"
                f" {', '.join(map(repr, VERDICTS))} and extracted is text or None"
            )
        return result

    def _call_own(self, completion: str, answer: str) -> Any:
        """Call a grader that may hang, in a thread that is left alone then: Python cannot end it."""
        outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                outcome.put((self.function(completion, answer), None))
            except SystemExit as error:
                outcome.put((None, DataError(f"grader {self.name} called sys.exit({error.code!r}); it must return")))
            except BaseException as error:
                outcome.put((None, error))

        threading.Thread(target=call, name=f"grader {self.name}", daemon=True).start()
        try:
            result, error = outcome.get(timeout=self.seconds)
        except queue.Empty:
            self.given_up.append(answer)
            if len(self.given_up) > _GIVEN_UP:
                raise DataError(
                    f"grader {self.name} did not return within {self.seconds:g} s on {len(self.given_up)} answers; give"
                    " it a limit of its own"
                ) from None
            note(f"grader {self.name} did not return within {self.seconds:g} s; that answer counts as unknown")
            return Grade("unknown", None, f"the grader did not return within {self.seconds:g} s")
        with running(self.function, f"grader {self.name}"):
            if error is not None:
                raise error
        return result

    def code_of(self, kind: Kind) -> str:
        """Return what the verdicts on one kind of reference depend on: programs do not ask math-verify."""
        depends_on_all = self.is_own or kind == "math" or self.name == "math"
        return self.code if depends_on_all else digest("grading", _VERSION, self.name)

    def fault(self, answer: str) -> str | None:
        """Return why nothing can be graded against a reference answer, for a message; None if all is well."""
        if self.is_own:
            return None
        kind = grader_kind(answer) if self.name == "auto" else self.name
        problem: str | None = _module(kind).fault(answer)
        return problem


def open_grader(grader: str | Grader) -> CheckedGrader:
    """Return a grader, ready to use.

    Args:
        grader: The name of a built-in grader, `package.module:attribute`, or a function.

    Raises:
        ConfigError: There is no such grader, or it cannot be called with a completion and an answer.
    """
    if isinstance(grader, str) and grader in GRADERS:
        function = _grade_by_kind if grader == "auto" else _module(grader).grade
        return CheckedGrader(function, grader, digest("grading", _VERSION, _version_of("math-verify")))
    if isinstance(grader, str) and not is_extension(grader):
        raise ConfigError(f"{_KEY} = {grader!r}: use {', '.join(map(repr, GRADERS))}, or package.module:attribute")
    own = load_extension(grader, kind="grader", key=_KEY) if isinstance(grader, str) else grader
    check_callable(own, ("completion", "answer"), kind="grader", key=_KEY)
    name = grader if isinstance(grader, str) else name_of(grader)
    return CheckedGrader(own, name, code_hash(own), is_own=True)


def grader_kind(answer: str) -> Kind:
    """Return which grader `auto` takes for a reference answer; a single letter is the name of an option."""
    kind = kind_of(answer)
    return "choice" if kind == "math" and _LETTER.fullmatch(answer.strip()) else kind


def grade_answer(completion: str, answer: str, grader: str | Grader = "auto") -> Grade:
    """Grade one completion.

    Args:
        completion: What a model wrote, its thinking included.
        answer: The reference answer, or a solution that states it.
        grader: The name of a grader, or one of your own.

    Raises:
        ConfigError: There is no such grader.
        DataError: Nothing can be graded against this reference answer.
    """
    grade = open_grader(grader)
    if (fault := grade.fault(answer)) is not None:
        raise DataError(f"answer = {answer[:60]!r}: {fault}")
    return grade(completion, answer)


def grade_all(grade: CheckedGrader, pairs: Iterable[tuple[str, str]]) -> Iterator[Grade]:
    """Yield the grade of each completion with its reference, in order.

    The built-in graders wait for processes of their own most of the time, so several work at once. A grader of the
    user's own is called by one thread.
    """
    if grade.is_own:
        for completion, answer in pairs:
            yield grade(completion, answer)
        return
    threads = min(os.cpu_count() or 1, _THREADS)
    waiting: deque[Future[Grade]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="grade") as pool:
        try:
            for completion, answer in pairs:
                waiting.append(pool.submit(grade, completion, answer))
                if len(waiting) >= 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _grade_by_kind(completion: str, answer: str) -> Grade:
    grade: Grade = _module(grader_kind(answer)).grade(completion, answer)
    return grade


def _module(kind: str) -> Any:
    """Import a built-in grader, which starts no process yet."""
    return importlib.import_module(f"dasd_lite.grading.{kind}")


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
