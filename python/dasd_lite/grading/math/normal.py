r"""The normal form of a mathematical answer, and whether two of them are equal.

Input: answers as text, LaTeX or plain. Output: a `Form`; `canonical`, a text that equal answers share; `same`.
Invariants: exact, so 0.333 is not 1/3; what is not known to be equal or unequal is left to the `Equal` that the caller
passes, which asks a computer algebra system; under 0.1 ms for integers.

What the form disregards, as graders of the field do: LaTeX spacing and styles, `\left`, a unit or words behind a number
on one side only, `x =`, the order of a bare list or set. Decisions where they differ:

* A percent sign may be missing, as where "how many percent" is asked, or be the factor 1/100: `50\%` equals 50 and 0.5.
* The same number with two different units is wrong; two numbers with different units are not compared.
* A comma separates thousands only in groups of three outside of brackets (`1,234`); `1,2` and `0,5` are lists.
* A bare list and a tuple or interval (`1,2` and `(1,2)`) are not compared: brackets may be what was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeAlias

from dasd_lite.grading.math.latex import brackets_of, plain, split, stripped
from dasd_lite.grading.math.number import BASE, CHANGING, Number, behind, read_number

MAX_CHARS = 4_096
_MAX_LIST = 12  # items that are compared each with each
_MAX_NESTING = 64


@dataclass(frozen=True)
class Items:
    """Several answers: kind "list", "set", "named" (x = 1, y = 2), "union", or the brackets, such as "[)".

    A set that is no member of anything is a "list" too, as braces are often left out.
    """

    kind: str
    parts: tuple[Form, ...]
    text: str
    name: str = ""


@dataclass(frozen=True)
class Words:
    """Text that is no mathematics, in lower case."""

    text: str
    name: str = ""


@dataclass(frozen=True)
class Formula:
    """Mathematics of any other kind."""

    text: str
    unit: str = ""
    name: str = ""


Form: TypeAlias = Number | Items | Words | Formula
Equal: TypeAlias = Callable[[str, str], bool | None]
"""Whether a formula (first) of the reference and one (second) of a completion are equal; None if that is not known."""


def canonical(text: str) -> str:
    """Return a text that equal answers share, as far as their form shows it; what an answer votes for."""
    form = read(text)
    return _key(replace(form, words="") if isinstance(form, Number) else form)


def same(reference: Form, stated: Form, equal: Equal) -> bool | None:
    """Return whether two answers are equal; None if that is not known."""
    if _key(reference) == _key(stated) and not _has_other_unit(reference, stated):
        return None if _are_other_variables(reference, stated) else True
    if _are_other_variables(reference, stated):
        return None
    match reference, stated:
        case Number(), Number():
            return _same_number(reference, stated)
        case Words(), Words():
            shorter, longer = sorted([reference.text.split(), stated.text.split()], key=len)
            return None if set(shorter) <= set(longer) else False
        case (Number(), Words() as words) | (Words() as words, Number()):
            return None if _NUMERIC.search(words.text) else False
        case (Words(), _) | (_, Words()):
            return None
        case Items(), Items():
            return _same_items(reference, stated, equal)
        case (Number() as number, Items() as items) | (Items() as items, Number() as number):
            return None if _is_decimal_comma(items, number) or not _are_numbers(items) else False
        case (Items("list" | "set", (_,)), _) | (_, Items("list" | "set", (_,))):  # a set of sets, or of nothing
            return None
    if any(isinstance(form, Number) and (form.unit == "°" or BASE in form.unit) for form in (reference, stated)):
        return None  # 60 degrees are π/3
    if _has_other_unit(reference, stated):
        return None
    if any(not isinstance(form, Number) and _PASSED_OVER.search(form.text) for form in (reference, stated)):
        return None
    if _letters(reference) == _letters(stated):  # n and N; H_2O and H2O
        return None
    if _NO_SUM.search(_text(reference)) or _NO_SUM.search(_text(stated)):
        return None
    if _RATIO.fullmatch(_text(reference)) or _RATIO.fullmatch(_text(stated)):
        return _same_ratio(_text(reference), _text(stated))
    if any(_UNCLEAR.search(_text(form)) for form in (reference, stated)):
        return None
    if ("\\ne " in _text(reference)) != ("\\ne " in _text(stated)):  # x ≠ 3 and its intervals
        return None
    points = [re.sub(r"\\[A-Za-z]+|[\s{}]", "", _text(form)) for form in (reference, stated)]
    if (
        not reference.name
        and all(re.fullmatch("[A-Z]{2,}", each) for each in points)
        and sorted(points[0]) == sorted(points[1])
    ):
        return None  # AB and BA: a line, a vector, or a product
    verdict = equal(_whole(reference, stated), _whole(stated, reference))
    logs = [set(re.findall(r"\\ln|\\log(?!\s?_)", _text(form))) for form in (reference, stated)]  # of base 10, or e
    return None if verdict is False and all(logs) and logs[0] != logs[1] else verdict


# math-verify passes over these: x' and x, A^T and A, 5 and 5\ldots, 1_000 and 1, a set and its condition are one to it.
_PASSED_OVER = re.compile(
    r"^[A-Za-z]\s?:|['\"]|\\(?:prime|[lc]?dots|top|dagger)(?![A-Za-z])|\^\s?\{?T(?![A-Za-z])|\d_|\\\{[^{}]*(?::|\||\\mid(?![A-Za-z]))"
)
# A date, a score, a telephone number: no difference, no quotient.
_NO_SUM = re.compile(r"^\s*\d+(?:\s?-\s?\d+)+\s*$|^\s*\d+(?:\s?/\s?\d+){2,}\s*$")
# 1/2 x and 1/2\pi: is the letter above or below? 7 (mod 11): is the answer 7? And 7(7) is read as 7.
_UNCLEAR = re.compile(
    r"/\s?\d+\s?(?:[A-Za-z(]|\\(?!c?dot|times|pm|mp|c[au]p|[lg]e|ne|in(?:fty)?|approx|end)[A-Za-z])"
    r"|(?<![A-Za-z])[pb]?mod(?![A-Za-z])|\d\s?\(\s?\d+\s?\)"
)
_RATIO = re.compile(r"\d{1,30}(?:\s?:\s?\d{1,30}){1,9}")
_NUMERIC = re.compile(
    r"\d|\b(?:none?|nothing|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|half|halves|thirds?|quarters?"
    r"|hundreds?|thousands?|\w*(?:teen|ty|llion)|dozen|pair|twice|once)\b"
)


def _letters(form: Form) -> str:
    return re.sub(r"[_{}]", "", _key(form)).casefold()


def _are_other_variables(a: Form, b: Form) -> bool:
    return a.name != b.name and a.name != "" != b.name


def _has_other_unit(a: Form, b: Form) -> bool:
    units = [form.unit or getattr(form, "words", "") for form in (a, b) if isinstance(form, Number | Formula)]
    return len(units) == 2 and "" != units[0] != units[1] != ""


def _same_number(a: Number, b: Number) -> bool | None:
    said, other_said = (set(re.sub(r"s\b", "", number.words).split()) for number in (a, b))
    if said and other_said and not (said <= other_said or other_said <= said):  # 5 apples, 5 oranges
        return None
    if a.unit != b.unit and "" in (a.unit, b.unit) and (other_said if a.unit else said):  # 5 dollars, 5 EUR
        return None
    if a.unit != b.unit and "%" in (a.unit, b.unit):
        percent, other = (a, b) if a.unit == "%" else (b, a)
        return other.value in (percent.value, percent.value / 100)
    if a.unit != b.unit and BASE in a.unit + b.unit:
        return None
    is_rate = a.unit.startswith(f"{b.unit}/") or b.unit.startswith(f"{a.unit}/")  # dollars, and dollars an hour
    if a.unit != b.unit and a.unit != "" != b.unit and not is_rate:  # 5 m may be 500 cm, and is not 5 cm
        return False if a.value == b.value != 0 else None
    return a.value == b.value


def _same_ratio(reference: str, stated: str) -> bool | None:
    """Compare `2:1` and `4:2`, which may be times of day or scores if they look like these."""
    if not (_RATIO.fullmatch(reference) and _RATIO.fullmatch(stated)):
        return None
    a, b = ([int(part) for part in text.split(":")] for text in (reference, stated))
    if len(a) != len(b):
        return None
    if any(x * b[0] != y * a[0] for x, y in zip(a, b, strict=True)):
        return False
    are_times = all(re.fullmatch(r"\d{1,2}(?::\d\d)+", text) for text in (reference, stated))
    return True if a == b or (0 not in a + b and not are_times) else None


def _same_items(a: Items, b: Items, equal: Equal) -> bool | None:
    if {a.kind, b.kind} == {"named", "()"}:
        named = a if a.kind == "named" else b
        if [part.name for part in named.parts] != sorted(part.name for part in named.parts):
            return None
    elif {a.kind, b.kind} == {"named", "list"} and _are_indexed(a if a.kind == "named" else b):
        return _same_set(a.parts, b.parts, equal)
    elif a.kind != b.kind and {"list", "set", "named"} & {a.kind, b.kind}:
        return None
    elif a.kind != b.kind or "union" in (a.kind, b.kind):
        if "union" in (a.kind, b.kind):
            return equal(a.text, b.text)
        return False if len(a.parts) == len(b.parts) else None
    if len(a.parts) != len(b.parts):
        return False if _are_numbers(a) and _are_numbers(b) else None
    if a.kind == b.kind == "named":
        if [part.name for part in a.parts] != [part.name for part in b.parts]:
            return None
    elif a.kind in ("list", "set"):
        return _same_set(a.parts, b.parts, equal)
    return _all(same(_unnamed(x), _unnamed(y), equal) for x, y in zip(a.parts, b.parts, strict=True))


def _same_set(a: Sequence[Form], b: Sequence[Form], equal: Equal) -> bool | None:
    """Return whether each item has a partner of its own; equality is transitive, so any partner will do."""
    if len(a) > _MAX_LIST:
        return None
    rest, is_unclear = list(b), False
    for item in a:
        verdicts = [same(_unnamed(item), _unnamed(other), equal) for other in rest]
        if True in verdicts:
            del rest[verdicts.index(True)]
        elif None in verdicts:
            is_unclear = True
        else:
            return False
    return None if is_unclear else not rest


def _all(verdicts: Iterator[bool | None]) -> bool | None:
    is_unclear = False
    for verdict in verdicts:
        if verdict is False:
            return False
        is_unclear |= verdict is None
    return None if is_unclear else True


def _are_indexed(named: Items) -> bool:
    """Return whether the names are those of one variable: x_1 = 1, x_2 = 2."""
    return len({re.sub(r"_(?:\d|\{\d+\})$", "_", part.name) for part in named.parts}) == 1


def _are_numbers(items: Items) -> bool:
    return all(isinstance(part, Number) for part in items.parts)


def _is_decimal_comma(items: Items, number: Number) -> bool:
    """Return whether `0,5` may mean 0.5."""
    return re.fullmatch(r"-?\d+,\d+", items.text) is not None and Fraction(items.text.replace(",", ".")) == number.value


def _unnamed(form: Form) -> Form:
    return replace(form, name="")


_DECIMAL = re.compile(r"(?<![\w.,])(\d{0,30})\.(\d{1,30})(?![\d.])")


def _whole(form: Form, other: Form) -> str:
    """Return the text for a computer algebra system, exact; with its `y =` if the other one is an equation."""
    text = _DECIMAL.sub(lambda match: rf"{{\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}}}", _text(form))
    return f"{form.name}={text}" if form.name and "=" in _text(other) else text


def _text(form: Form) -> str:
    if not isinstance(form, Number):
        return form.text
    value = form.value
    if value.denominator == 1:
        return str(value)
    return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _key(form: Form) -> str:
    match form:
        case Number(value, unit, _, words):
            return " ".join(filter(None, (str(value), unit, words)))
        case Items("list" | "set" | "union" as kind, parts):
            return f"{kind}: {', '.join(sorted(map(_key, parts)))}"
        case Items("named", parts):
            return ", ".join(f"{part.name} = {_key(part)}" for part in parts)
        case Items(kind, parts):
            return f"{kind[0]}{', '.join(map(_key, parts))}{kind[-1]}"
        case Words(text):
            return text
    text = re.sub(r"\s*(?:\\(?:cdot|times)(?![A-Za-z])|\*)\s*", "*", form.text)
    return re.sub(r"(?<!\d)[\s*]|[\s*](?!\d)", "", text)


# --- text -> form

_INTEGER = re.compile(r"([-+−]?)\s?0*(\d{1,1000})\.?")


def read(text: str) -> Form:
    """Return the form of an answer."""
    text = text.strip()
    if simple := _INTEGER.fullmatch(text):  # the way of nearly every answer of AIME and GSM8K
        value = int(simple[2])
        return Number(Fraction(-value if simple[1] in ("-", "−") and simple[1] else value))
    if len(text) > MAX_CHARS:
        return Words(text)
    form = _form(plain(text), 0)
    if not isinstance(form, Items) or form.kind != "set":
        return form
    (first, *others) = form.parts or (None,)
    if first is None or others or isinstance(first, Items) or "\\emptyset" in _text(first):
        return replace(form, kind="list")
    return first  # {5} is 5


_LIST = (",", ";", " and ", " or ")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_VARIABLE = r"\\?[A-Za-z]+(?:_(?:\{\w+\}|\w))?'{0,2}"
_NAMED = re.compile(
    rf"({_VARIABLE}(?:\s?\([^()=]{{0,20}}\))?|[A-Za-z](?:\s?[-+]\s?[A-Za-z]){{1,3}}"
    r"|m?\s?\\angle\s?[A-Z]{1,3}|\|[A-Z]{2}\||\[[A-Z]{3,6}\])"
    r"\s?=\s?(?=[^=]*$)(.+)",
    re.DOTALL,
)
_MEMBER = re.compile(rf"{_VARIABLE}\s?\\in(?![A-Za-z])\s?(.+)", re.DOTALL)
_RELATION = re.compile(r"\s*(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z]))\s*")
_NAMES = (
    "sin cos tan cot sec csc log ln exp sqrt frac pi arcsin arccos arctan sinh cosh tanh max min gcd lcm mod det deg"
    " dim binom begin end pmatrix bmatrix vmatrix matrix array cases aligned align mathbb"
)
_FUNCTIONS = frozenset(_NAMES.split())


def _form(text: str, depth: int) -> Form:
    text = stripped(text)
    if depth > _MAX_NESTING:
        return Formula(text)
    if (number := read_number(text)) is not None:
        return number
    brackets = brackets_of(text)
    if brackets is None:
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
        return _bare(text, depth)
    inside = text[2:-2] if brackets[0] == "\\" else text[1:-1]
    parts = split(inside, (",", ";"))
    if brackets == r"\{}":
        if condition := _BUILDER.match(inside):  # {x : x > 0}
            return _form(inside[condition.end() :], depth + 1)
        is_builder = re.search(r"\\mid(?![A-Za-z])|[:|]", inside) is not None
        return Formula(text) if is_builder else _items("set", parts, text, depth)
    if len(parts) == 1:
        return _form(inside, depth + 1)
    return _items(brackets, parts, text, depth)


def _items(kind: str, parts: list[str], text: str, depth: int) -> Form:
    parts = [part for part in (re.sub(r"^\s*(?:and|or)\s", "", part).strip() for part in parts) if part]
    forms = [_form(part, depth + 1) for part in parts]
    if kind in ("list", "set"):  # a list in a list: 1 and 2, 3
        forms = [
            each
            for form in forms
            for each in (form.parts if isinstance(form, Items) and form.kind == "list" else [form])
        ]
        if kind == "set":
            return Items(kind, tuple(forms), text)
        if len(forms) == 1:
            return forms[0]
        names = [form.name for form in forms]
        if re.fullmatch(r"[^,;]* or [^,;]*", text) and all(
            isinstance(form, Items) and form.kind[0] in "([" for form in forms
        ):
            return Items("union", tuple(_unnamed(form) for form in forms), text)
        if all(names) and len(set(names)) == len(names):
            return Items("named", tuple(sorted(forms, key=lambda form: form.name)), text)
    return Items(kind, tuple(forms), text)


def _bare(text: str, depth: int) -> Form:
    """Read a text without brackets around it."""
    if (number := read_number(text)) is not None:
        return number
    parts = split(text, _LIST)
    if len(parts) > 1 and not _is_sentence(text):
        return _items("list", parts, text, depth)
    if "\\cup" in text:
        parts = re.split(r"\\cup(?![A-Za-z])", text)
        forms = tuple(_form(part, depth + 1) for part in parts)
        member = _MEMBER.fullmatch(text)
        return _form(member[1], depth + 1) if member else Items("union", forms, text)
    if member := _MEMBER.fullmatch(text):
        return _form(member[1], depth + 1)
    if (interval := _interval(text, depth)) is not None:
        return interval
    if (first := _first_of_equal(text)) is not None:
        return first
    if named := _NAMED.fullmatch(text):
        form = _form(named[2], depth + 1)
        return replace(form, name=form.name or named[1].replace(" ", ""))
    if text.count("\\pm") == 1:
        two = [stripped(text.replace("\\pm", sign)).removeprefix("+").strip() for sign in "+-"]
        return _items("list", [re.sub(r"-\s+", "-", each) for each in two], text, depth)
    if (formula := _with_words(text, depth)) is not None:
        return formula
    if _has_words(text) or text.startswith('"'):
        return Words(_spoken(text))
    return Formula(text)


_MAX_UNIT = 60  # characters; to look for it in all of a long text takes time in proportion to the square of the length
_UNIT = re.compile(r"[A-Za-z][A-Za-z /.]*(?:\^\s?\{?[23]\}?)?")


def _with_words(text: str, depth: int) -> Formula | None:
    r"""Read a formula with a unit or words behind it: `\frac{\pi}{2} cm`, `\sqrt{2} apples`."""
    for space in re.finditer(r"\s+", text[-_MAX_UNIT:]):
        at = max(0, len(text) - _MAX_UNIT)
        head, rest = text[: at + space.start()], text[at + space.end() :]
        if not re.search(r"[\d}\\]", head) or not _UNIT.fullmatch(rest) or _FUNCTIONS & set(rest.split()):
            continue
        found = None if _has_words(head) or CHANGING & set(head.split()) else behind(" " + rest, is_fraction=True)
        if found is not None and found[2] == 1 and isinstance(form := _form(head, depth + 1), Formula):
            return replace(form, unit=found[0] or found[1])
    return None


_BUILDER = re.compile(rf"\s*{_VARIABLE}\s*(?:\\in\s*\\mathbb\s?\{{?\s?R\s?\}}?\s*)?(?:\\mid(?![A-Za-z])|[:|])")


def _first_of_equal(text: str) -> Form | None:
    """Return the first number of `2/3 = 0.667`, if the second is the same or the first one, rounded."""
    left, sign, right = re.sub(r"\\approx(?![A-Za-z])", "=", text).partition("=")
    a, b = (read_number(side.strip()) for side in (left, right)) if sign else (None, None)
    if a is None or b is None:
        return None
    is_same = abs(a.value - b.value) * 10 ** len(right.partition(".")[2].strip()) <= ("." in right)
    return a if is_same else Words(text)


def _is_sentence(text: str) -> bool:
    """Return whether a text is prose, in which a comma separates no answers."""
    return len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)) > 6


def _has_words(text: str) -> bool:
    words = re.findall(r"(?<![\\A-Za-z])[^\W\d_]{3,}", re.sub(r"\\(?:begin|end)\{\w+\}", "", text))
    return any(word not in _FUNCTIONS for word in words) or re.search(r"[^\x00-\x7f]", text) is not None


def _spoken(text: str) -> str:
    text = re.sub(r"[\s\"'`*_]+", " ", text).strip().strip(".,;:!").casefold()
    text = re.sub(r"^(?:the|a|an) ", "", text)
    return "does not exist" if text == "dne" else text


_INFINITY = Formula(r"\infty")


def _interval(text: str, depth: int) -> Form | None:
    r"""Read `0 < x \le 1` or `x > 3` as an interval."""
    pieces = _RELATION.split(text)
    if len(pieces) not in (3, 5) or not all(pieces):
        return None
    low: Form
    high: Form
    if len(pieces) == 5:
        left, first, name, second, right = pieces
        if re.fullmatch(_VARIABLE, name) is None or (first in "<\\le") != (second in "<\\le"):
            return None
        if first not in ("<", r"\le"):
            left, right, first, second = right, left, second, first
        low, high = _form(left, depth + 1), _form(right, depth + 1)
        kind = ("(" if first in "<>" else "[") + (")" if second in "<>" else "]")
    else:
        left, sign, right = pieces
        if re.fullmatch(_VARIABLE, left) is not None:
            name, bound, is_upper = left, right, sign in ("<", r"\le")
        elif re.fullmatch(_VARIABLE, right) is not None:
            name, bound, is_upper = right, left, sign in (">", r"\ge")
        else:
            return None
        value, strict = _form(bound, depth + 1), sign in "<>"
        low, high = (Formula(r"-\infty"), value) if is_upper else (value, _INFINITY)
        kind = ("(" + (")" if strict else "]")) if is_upper else (("(" if strict else "[") + ")")
    return Items(kind, (low, high), f"{kind[0]}{_text(low)},{_text(high)}{kind[1]}", name)
