"""The fingerprint of code from outside the package: what changes it and what does not."""

import dataclasses
import functools
import importlib
import re
import sys
import threading
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from dasd_lite.config.extensions import check_callable, code_hash, load_extension, name_of
from dasd_lite.errors import ConfigError


class Color(Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Options:
    size: int
    path: Path = Path("a")


class Rule:
    def __init__(self, **state):
        vars(self).update(state)

    def __call__(self, candidates):
        return candidates.num_tokens

    def other(self, candidates):
        return candidates.num_sentences


class Slots:
    __slots__ = ("size",)

    def __init__(self, size):
        self.size = size

    def __call__(self, candidates):
        return self.size


def closure(value):
    return lambda candidates: value


def default(value):
    def rule(candidates, value=value):
        return value

    return rule


def add(a, b):
    return a + b


up, down = lambda x: x, lambda x: -x


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (1, 1.0),
        (1, True),
        (0, None),
        ("1", 1),
        ("a", b"a"),
        ("a", Path("a")),
        ([1, 2], [2, 1]),
        ({1, 2}, {1, 3}),
        ({"a": {"b": [1]}}, {"a": {"b": [2]}}),
        ({1: "a"}, {"1": "a"}),
        (np.arange(3), np.arange(1, 4)),
        (np.zeros(2), np.zeros(2, np.float32)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.float32(1), np.float32(2)),
        (np.dtype("int32"), np.dtype("int64")),
        (Color.RED, Color.BLUE),
        (re.compile("a"), re.compile("a", re.IGNORECASE)),
        (Options(1), Options(2)),
        (add, closure(1)),
        (functools.partial(add, 1), functools.partial(add, 2)),
        (int, float),
        (len, max),
        ("a".count, "b".count),
        (functools.cache(add), functools.cache(closure)),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda value: Rule(value=value),
        lambda value: Rule(value=value).other,
        lambda value: Rule(value=[{"inner": value}]),
        Slots,
        closure,
        default,
        lambda value: functools.partial(add, value),
        lambda value: functools.partial(add, b=value),
        lambda value: functools.partial(closure(value)),
    ],
)
def test_other_state_is_another_fingerprint(make, one, other):
    assert code_hash(make(one)) == code_hash(make(one))
    assert code_hash(make(one)) != code_hash(make(other))


def test_other_code_is_another_fingerprint():
    things = [up, down, add, Rule, Rule(), Rule().other, Slots(1), closure(1), default(1), functools.partial(add, 1)]
    assert len({code_hash(thing) for thing in things}) == len(things)
    assert code_hash(functools.partial(add, 1)) != code_hash(functools.partial(closure, 1))
    assert code_hash(Rule(a=1, b=2)) == code_hash(Rule(b=2, a=1))
    assert code_hash(Rule(a={1: 2, 3: 4})) == code_hash(Rule(a={3: 4, 1: 2}))


def test_state_that_contains_itself():
    items = [1]
    items.append(items)
    rule = Rule(items=items)
    rule.again, rule.method = rule, rule.other
    assert code_hash(rule) == code_hash(rule)


@pytest.mark.parametrize("value", [threading.Lock(), object(), np.array([object()]), iter([1]), Rule()])
def test_state_that_cannot_be_hashed_is_one_line_and_fingerprint_solves_it(value):
    for thing in (Rule(value=[value]), closure({"x": value}), functools.partial(add, value)):
        with pytest.raises(ConfigError) as error:
            code_hash(thing)
        assert str(error.value).startswith(f"{name_of(thing)}: ") and "\n" not in str(error.value)
        assert "an attribute `fingerprint`, a string that changes with its results" in str(error.value)
        thing.fingerprint = "1"
        first = code_hash(thing)
        assert code_hash(Rule(inner=thing)) != first
        thing.fingerprint = "2"
        assert code_hash(thing) != first


@pytest.mark.parametrize("thing", [len, int, np.negative])
def test_code_without_source_is_one_line(thing):
    with pytest.raises(ConfigError, match="its source cannot be read, so a change in it would go unnoticed") as error:
        code_hash(thing)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("gone_module:rule", None, "No module named 'gone_module'); the module must be installed, or be in the"),
        ("own_module.gone:rule", "x = 1", "'own_module' is not a package); the module must be installed, or be"),
        ("own_module:rule", "import gone_module", "its module 'own_module' failed: ModuleNotFoundError: No module"),
        ("own_module:rule", "1 / 0", "its module 'own_module' failed: ZeroDivisionError: division by zero"),
        ("own_module:rule", "import sys\nsys.exit(0)", "its module 'own_module' failed: SystemExit: 0"),
        ("own_module:rule", "def rule(:", "its module 'own_module' failed: SyntaxError: invalid syntax"),
        ("own_module:rule", "raise ValueError('a\\nb')", "its module 'own_module' failed: ValueError: a b"),
        ("own_module:rule", "from own_module.x import y", "its module 'own_module' failed: ModuleNotFoundError"),
    ],
)
def test_a_module_that_is_missing_and_one_that_fails_are_different_errors(tmp_path, monkeypatch, name, code, message):
    if code is not None:
        (tmp_path / "own_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_extension(name, kind="selection rule", key="select.rule")
    sys.modules.pop("own_module", None)
    assert str(error.value).startswith(f"select.rule = {name!r}: the selection rule cannot be imported")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_called():
    with pytest.raises(ConfigError, match=r"^key: builtins:int cannot be called; a rule is called with \(cand"):
        check_callable(3, ("candidates",), kind="rule", key="key")
    with pytest.raises(ConfigError, match=r"Slots is a class; a rule is an instance or a function, called with \(cand"):
        check_callable(Slots, ("candidates",), kind="rule", key="key")
    check_callable(importlib.import_module, ("candidates",), kind="rule", key="key")
