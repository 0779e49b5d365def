"""The tests of a programming task, as rows have them → `Tests`.

Input: a list of `{"input": …, "output": …}`, as LiveCodeBench has it, or an object with the lists `inputs` and
`outputs` and for functions `fn_name`, as APPS, TACO and verl have it; each also as JSON text. Invariant: anything else
is a fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dasd_lite.data.formats.conversation import shown
from dasd_lite.data.formats.row import Fault
from dasd_lite.data.references import Tests

_FORMS = 'a list of {"input": …, "output": …}, or an object with `inputs` and `outputs`'
_PACKED = re.compile(r"[A-Za-z0-9+/]{16,}={0,2}")  # base64, in which LiveCodeBench has tests that are not to be read


def read_tests(values: Sequence[tuple[str, Any]], function: Any = None) -> Tests | None:
    """Return the tests of a task; None if there are none.

    Args:
        values: What errors call a column, and its value; the tests of all of them are taken.
        function: Name of the function that is called, if the tests do not say it.

    Raises:
        Fault: A column with something else.
    """
    if function is not None and not isinstance(function, str):
        raise Fault(f"the function of the tests = {shown(function)}; it must be a name")
    name, private = function or None, ""
    pairs: list[tuple[str, str]] = []
    for path, value in values:
        if value is None or value == "":
            continue
        if isinstance(value, str) and _PACKED.fullmatch(value.strip()):
            if private:
                raise Fault(f"{path}: only one column may have packed tests")
            private = value.strip()
            continue
        tests = from_json(value, path) if isinstance(value, str) else value
        if isinstance(tests, Mapping) and "inputs" in tests:
            name = name or tests.get("fn_name") or None
            pairs += _pairs(tests, name, path)
        elif isinstance(tests, list):
            pairs += [_pair(test, f"{path}[{i}]") for i, test in enumerate(tests)]
        else:
            raise Fault(f"{path} = {shown(tests)}; it must be {_FORMS}")
    if not pairs and not private:
        return None
    return Tests(tuple(pairs), name, private)


def from_json(text: str, path: str) -> Any:
    """Return the value of JSON in a column of text.

    Raises:
        Fault: It is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError:  # also a number of more than 4,300 digits
        raise Fault(f"{path} = {shown(text)}; it must be a list or an object, or one as JSON") from None
    except RecursionError:
        raise Fault(f"{path}: brackets are nested more than a thousand deep") from None


def _pair(test: Any, path: str) -> tuple[str, str]:
    if (
        not isinstance(test, Mapping)
        or not isinstance(test.get("input"), str)
        or not isinstance(test.get("output"), str)
    ):
        raise Fault(f"{path} = {shown(test)}; it must be an object with the texts `input` and `output`")
    return test["input"], test["output"]


def _pairs(tests: Mapping[str, Any], function: str | None, path: str) -> list[tuple[str, str]]:
    """Return the tests of an object with `inputs` and `outputs`."""
    inputs, outputs = tests["inputs"], tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise Fault(f"{path} must have as many `inputs` as `outputs`, each a list")
    if function is None:
        return [(_lines(given, path), _lines(wanted, path)) for given, wanted in zip(inputs, outputs, strict=True)]
    return [_call(given, wanted, path) for given, wanted in zip(inputs, outputs, strict=True)]


def _lines(value: Any, path: str) -> str:
    """Return what a program reads or prints: text, or a list of lines."""
    lines = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str) for line in lines):
        raise Fault(f"{path}: {shown(value)} is read or printed by a program; it must be text, or a list of lines")
    return "\n".join(lines)


def _call(given: Any, wanted: Any, path: str) -> tuple[str, str]:
    """Return a test of a function; arguments are a list of values, or JSON with one on each line.

    With a list of arguments, a result is a value in a list of its own, as APPS and TACO write it, or the value itself.
    """
    if isinstance(given, str):
        if not isinstance(wanted, str):
            raise Fault(f"{path}: {shown(wanted)} must be JSON in a text, as its input is")
        return given, wanted
    if not isinstance(given, list):
        raise Fault(f"{path}: {shown(given)} must be a list of arguments")
    result = wanted[0] if isinstance(wanted, list) and len(wanted) == 1 else wanted
    return "\n".join(json.dumps(each) for each in given), json.dumps(result)
