"""TOML from the Rust core: the values of `tomllib` in its order, the line of each key, and one-line errors."""

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_lite import _rust
from dasd_lite.errors import ConfigError

KEYS = st.sampled_from(["a", "b", "a-1", "_", "7", "'c d'", '"é\\n"', '""'])
STRINGS = st.text(max_size=9).map(lambda text: json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f"))
NUMBERS = ["0", "-1", "+9_9", "0xfF", "0o7", "0b1_0", "1.5", "-0.0", "6e2", "1_0.0_1E-5", "inf", "-inf", "nan", "1e400"]
SCALARS = st.one_of(
    st.sampled_from([*NUMBERS, "true", "false", "''", "'\\'", '"\\u00e9"', "'''a'b'''", '"""a"b"""']),
    STRINGS,
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
)
DOTTED = st.lists(KEYS, min_size=1, max_size=3).map(".".join)
VALUES = st.recursive(
    SCALARS,
    lambda values: st.one_of(
        st.lists(values, max_size=3).map(lambda inner: f"[{', '.join(inner)}]"),
        st.lists(st.tuples(DOTTED, values), max_size=3).map(
            lambda inner: "{ " + ", ".join(f"{key} = {value}" for key, value in inner) + " }"
        ),
    ),
    max_leaves=5,
)
STATEMENTS = st.one_of(
    st.tuples(st.just("="), DOTTED, VALUES),
    st.tuples(st.just("[]"), DOTTED, st.none()),
    st.tuples(st.just("[[]]"), DOTTED, st.none()),
    st.tuples(st.just("#"), st.sampled_from(["", "# [a] \"\"\" = '''"]), st.none()),
)


def written(statement: tuple[str, str, str | None]) -> str:
    """Return a statement as a line."""
    kind, key, value = statement
    return {"=": f"{key} = {value}", "[]": f"[{key}]", "[[]]": f" [[ {key} ]] # x", "#": key}[kind]


def names(dotted: str) -> list[str]:
    """Return the parts of a dotted key."""
    table, parts = tomllib.loads(f"{dotted} = 1"), []
    while isinstance(table, dict):
        ((key, table),) = table.items()
        parts.append(key)
    return parts


def lines_of(statements: list[tuple[str, str, str | None]]) -> dict[tuple[str | int, ...], int]:
    """Return the line on which each key and each element is written first, of a document that is right."""
    lines: dict[tuple[str | int, ...], int] = {}
    sizes: dict[tuple[str | int, ...], int] = {}  # of the arrays of tables
    table: tuple[str | int, ...] = ()
    for number, (kind, dotted, value) in enumerate(statements, start=1):
        if kind == "#":
            continue
        path = table if kind == "=" else ()
        for key in names(dotted):
            if path in sizes:
                path = (*path, sizes[path] - 1)
            path = (*path, key)
            lines.setdefault(path, number)
        if kind == "[[]]":
            sizes[path] = sizes.get(path, 0) + 1
            path = (*path, sizes[path] - 1)
            lines[path] = number
        elif path in sizes:
            path = (*path, sizes[path] - 1)
        if kind == "=":
            for inner in paths(tomllib.loads(f"x = {value}")["x"]):
                lines[(*path, *inner)] = number
        else:
            table = path
    return lines


def paths(value: Any) -> list[tuple[str | int, ...]]:
    """Return the paths of everything inside a value."""
    items: list[tuple[str | int, Any]] = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        items = list(enumerate(value))
    return [path for key, inner in items for path in [(key,), *((key, *deeper) for deeper in paths(inner))]]


def is_valid(value: str) -> bool:
    """Return whether a value has no duplicate keys."""
    try:
        tomllib.loads(f"x = {value}")
    except tomllib.TOMLDecodeError:
        return False
    return True


@settings(max_examples=400, deadline=None)
@given(statements=st.lists(STATEMENTS, max_size=8), end=st.sampled_from(["\n", "\r\n"]))
def test_values_and_lines(statements: list[tuple[str, str, str | None]], end: str) -> None:
    text = end.join(map(written, statements))
    try:
        expected = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        with pytest.raises(ConfigError, match=r"\A[1-9][0-9]*:[1-9][0-9]*: .*\Z"):
            _rust.parse_toml(text)
        return
    values, lines = _rust.parse_toml(text)
    assert repr(values) == repr(expected)
    assert lines == lines_of(statements)


@settings(max_examples=150, deadline=None)
@given(elements=st.lists(VALUES.filter(is_valid), max_size=4))
def test_values_on_several_lines(elements: list[str]) -> None:
    text = "\n#\na = [\n" + "".join(f"  {value}, # {value[:1]}\n" for value in elements) + "]\nb = '''\n[x]\n'''\n"
    values, lines = _rust.parse_toml(text)
    assert repr(values) == repr(tomllib.loads(text))
    assert [lines["a", index] for index in range(len(elements))] == list(range(4, 4 + len(elements)))
    assert lines["b",] == len(elements) + 5


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab.=[]{}\"'\\#,\n\r\t\0 é1-", max_size=40))
def test_any_text_is_values_or_one_line(text: str) -> None:
    try:
        values, _ = _rust.parse_toml(text)
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    try:
        expected = tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # TOML 1.1 allows more: a line break in an inline table, say
        return
    assert repr(values) == repr(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nout = \n", "2:7: the value is missing"),
        ("é = 1", "1:1: invalid unquoted key, expected letters, numbers, `-`, `_`"),
        ("[a]\n[a]", "2:2: duplicate key a"),
        ("a = \ud800", "1:1: the text has a character that is not Unicode (a lone surrogate)"),
        ("a = 12:30:00", "1:5: dates and times are not supported; write text in quotes"),
        ("a = " + "1" * 5_000, "1:5: the integer has more than 128 bits"),
        ("a = " + "[" * 5_000, "1:68: more than 64 keys and brackets inside each other"),
        ("a" + "." * 20_000 + " = 1", "1:66: more than 64 keys and brackets inside each other"),
        ("a" + ".a" * 20_000 + " = 1", "1:129: more than 64 keys and brackets inside each other"),
        ("a = 1\0", "1:5: not a value; text must be in quotes"),
        ('a = """x\n', '2:1: invalid multi-line basic string, expected `"`'),
        ("x" * 50_000_000, "1:1: the text has 50000000 bytes; the most is 1048576"),
    ],
    ids=range(12),
)
def test_errors_are_one_line_with_line_and_column(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        _rust.parse_toml(text)
    assert str(error.value) == message
