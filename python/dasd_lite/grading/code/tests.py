"""The tests of a programming task, checked, and whether an output passes one.

Input: a reference (`data/references.py`). Output: the tests, public ones first; or what is wrong with them. Invariant:
what a program printed is compared as LiveCodeBench compares it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from dasd_lite.data.references import read_tests
from dasd_lite.grading.code.private_tests import from_json, unpack


@dataclass(frozen=True)
class Test:
    """One test of a program or a function.

    Attributes:
        given: What a program reads, or the arguments of a function, one JSON value per line.
        wanted: What a program prints, or the JSON value that a function returns.
    """

    given: str
    wanted: str

    @property
    def arguments(self) -> list[str]:
        """JSON of each argument."""
        return [line for line in self.given.split("\n") if line.strip()]


@dataclass(frozen=True)
class Task:
    """All tests of a task, and the name of the function that they call (None: they run the program)."""

    function: str | None
    tests: tuple[Test, ...]


@functools.lru_cache(maxsize=8)  # the samples of a question come one after the other, and unpacking takes time
def read_task(reference: str) -> Task:
    """Return the tests of a reference.

    Raises:
        ValueError: They cannot be graded against; the message says why, and can follow "its ".
    """
    try:
        stored = read_tests(reference)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tests are not JSON ({error})") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError("tests must be a list of objects with `input` and `output`") from None
    if not isinstance(stored.function, str | None) or not (stored.function is None or stored.function.isidentifier()):
        raise ValueError(f"`function` is {stored.function!r}; it must be the name of a function")
    if not isinstance(stored.private, str):
        raise ValueError(f"`private` is {type(stored.private).__name__}; it must be text")
    tests = [_test(given, wanted, f"test {number}") for number, (given, wanted) in enumerate(stored.tests, 1)]
    if stored.private:
        try:
            private = unpack(stored.private)
        except ValueError as error:
            raise ValueError(f"private tests {error}") from None
        tests += _private(private, function=stored.function)
    if not tests:
        raise ValueError("list of tests is empty")
    if stored.function is not None:
        for number, test in enumerate(tests, 1):
            _check_json(test, number)
    return Task(stored.function, tuple(tests))


def _private(rows: Any, *, function: str | None) -> list[Test]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("private tests must be a list of objects with `input` and `output`")
    wanted = "stdin" if function is None else "functional"
    tests = []
    for number, row in enumerate(rows, 1):
        kind = row.get("testtype", wanted)
        if kind != wanted:
            raise ValueError(f"private test {number} has the type {kind!r}; the others are {wanted!r}")
        tests.append(_test(row.get("input"), row.get("output"), f"private test {number}"))
    return tests


def _test(given: Any, wanted: Any, name: str) -> Test:
    for key, value in (("input", given), ("output", wanted)):
        if not isinstance(value, str):
            raise ValueError(f"{name} has {'no' if value is None else type(value).__name__ + ' as'} `{key}`; use text")
    return Test(given, wanted)


def _check_json(test: Test, number: int) -> None:
    for text, name in [*((text, "argument") for text in test.arguments), (test.wanted, "output")]:
        try:
            from_json(text)
        except ValueError:
            raise ValueError(f"test {number} has an {name} that is not JSON: {text[:40]!r}") from None


def prints_the_same(printed: str, wanted: str) -> bool:
    """Return whether two outputs are equal line by line: as text, or as lists of decimal numbers.

    White space around the whole and around each line does not count. There is no tolerance: 0.50 equals 0.5, and 0.333
    differs from 0.3333.
    """
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (printed, wanted))
    return len(ours) == len(theirs) and all(
        one == other or _same_numbers(one, other) for one, other in zip(ours, theirs, strict=True)
    )


def _same_numbers(one: str, other: str) -> bool:
    try:
        return [Decimal(word) for word in one.split()] == [Decimal(word) for word in other.split()]
    except InvalidOperation:
        return False


def returns_the_same(result: bytes, wanted: str) -> bool:
    """Return whether the JSON of a result equals the JSON that a test wants; a tuple has become a list."""
    try:
        return bool(from_json(result.decode()) == from_json(wanted))
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists in lists
        return False
