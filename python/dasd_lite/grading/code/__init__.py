"""Code: runs the program of a completion against the tests of a task, in a sandbox.

Input: a completion, and a reference with tests (`data/references.py`). Output: a `Grade`. Invariant: a program that
fails is wrong; a sandbox that fails is `unknown`. What the tests want never enters the sandbox.
"""

from __future__ import annotations

import dataclasses

from dasd_lite.errors import DataError
from dasd_lite.grading.code.fences import extract
from dasd_lite.grading.code.sandbox import DEFAULT_LIMITS, Limits, Sandbox, open_sandbox, sandbox_name
from dasd_lite.grading.code.tests import Task, Test, prints_the_same, read_task, returns_the_same
from dasd_lite.grading.grade import Grade

__all__ = ["extract", "fault", "grade", "grade_in", "sandbox_name"]


def grade(completion: str, reference: str) -> Grade:
    """Grade a completion by running its program against the tests, one process each, up to the first that fails.

    Raises:
        ConfigError: This machine has no sandbox.
        DataError: The reference cannot be graded against (`fault` says so beforehand).
    """
    return grade_in(open_sandbox(), completion, reference)


def grade_in(sandbox: Sandbox, completion: str, reference: str, limits: Limits = DEFAULT_LIMITS) -> Grade:
    """Grade a completion in this sandbox."""
    code = extract(completion)
    if code is None:
        return Grade("no_answer", None)
    try:
        task = read_task(reference)
    except ValueError as error:
        raise DataError(f"a programming task cannot be graded: its {error}") from None
    for number, test in enumerate(task.tests, 1):
        where = f"test {number} of {len(task.tests)}"
        fault, ours = _failure(sandbox, code, task, test, limits)
        if fault:
            return Grade("unknown" if ours else "wrong", code, f"{where}: {fault}")
    return Grade("right", code)


def _failure(sandbox: Sandbox, code: str, task: Task, test: Test, limits: Limits) -> tuple[str, bool]:
    """Return why a program fails a test ("": it does not), and whether the fault is ours."""
    limits = dataclasses.replace(limits, output=limits.output + 2 * len(test.wanted.encode("utf-8", "replace")))
    if task.function is None:
        run = sandbox.run_program(code, test.given, limits)
        passes = not run.fault and prints_the_same(run.output.decode("utf-8", "replace"), test.wanted)
    else:
        run = sandbox.call_function(code, task.function, test.arguments, limits)
        passes = not run.fault and returns_the_same(run.output, test.wanted)
    return ("" if passes else run.fault or "wrong output"), run.ours


def fault(reference: str) -> str | None:
    """Return why a reference cannot be graded against, in half a sentence; None: it can."""
    try:
        read_task(reference)
    except ValueError as error:
        return f"its {error}"
    return None
