r"""A rational number as it is written in an answer, with its unit.

Input: text such as `1,234`, `2\frac{1}{2}`, `3\times10^8`, `101_2`, `five`, `12 cm^2`, `5 apples`. Output: a `Number`,
exact, or None. Words behind a number are kept beside it; those that change it ("5 dozen", "5 or more") make it None.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

_MAX_WORDS = 100  # characters behind a number
_MAX_DIGITS = 2_000  # int() refuses 4,300; a longer number is compared as text


@dataclass(frozen=True)
class Number:
    """A rational number; `unit` is a standard name, "%" or "", `words` what else stands behind it ("apples")."""

    value: Fraction
    unit: str = ""
    name: str = ""
    words: str = ""


_DIGITS = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SIGN = r"[-+]?\s?"


def _fraction(above: str, below: str) -> str:
    number = rf"\s?(?P<{{}}>{_SIGN}{_DIGITS})\s?"
    return rf"\\frac\s?\{{{number.format(above)}\}}\s?\{{{number.format(below)}\}}"


_EXPONENT = r"[-+]?\d{1,3}"  # 1e9999 is compared as text
_VALUE = re.compile(
    rf"(?P<sign>{_SIGN})(?:(?P<ten>10)\s?\^\s?\{{?\s?(?P<of_ten>{_EXPONENT})\s?\}}?(?!\d)"
    rf"|(?P<whole>\d+)\s?{_fraction('a', 'b')}"
    rf"|(?P<mixed>\d+) (?P<c>\d+)\s?/\s?(?P<d>\d+)"
    rf"|{_fraction('e', 'f')}"
    rf"|(?P<g>{_DIGITS})\s?/\s?(?P<h>{_DIGITS})"
    rf"|(?P<digits>\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?(?![\d,])|{_DIGITS})"
    rf"(?:[eE](?P<exponent>{_EXPONENT})|\s?(?:\\times|\\cdot|\*|x)\s?10\s?\^\s?\{{?\s?(?P<power>{_EXPONENT})\s?\}}?)?"
    r")(?P<rest>.*)",
    re.DOTALL,
)
UNITS = {
    name: unit
    for unit, names in {
        "%": "% percent pct",
        "°": "degree degrees deg",
        "mm": "mm millimeter millimeters millimetre millimetres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers kilometre kilometres",
        "in": "inch inches",
        "ft": "ft foot feet",
        "yd": "yd yard yards",
        "mi": "mi mile miles",
        "g": "g gram grams",
        "mg": "mg milligram milligrams",
        "kg": "kg kilogram kilograms kilo kilos",
        "lb": "lb lbs pound pounds",
        "oz": "oz ounce ounces",
        "s": "s sec secs second seconds",
        "min": "min mins minute minutes",
        "h": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "year years yr yrs",
        "l": "l liter liters litre litres",
        "ml": "ml milliliter milliliters",
        "dollar": "dollar dollars usd bucks",
        "euro": "euro euros eur",
        "yen": "yen",
        "rupee": "rupee rupees",
        "cent": "cent cents",
        "rad": "rad radian radians",
        "km/h": "km/h kph",
        "mi/h": "mph",
        "m/s": "m/s",
    }.items()
    for name in names.split()
}
BASE = "in base"
_BASED = re.compile(r"(-?[0-9A-Za-z]{1,200})_\{?(\d{1,2})\}?")
_SCALE = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen twenty"
)
_VALUES = {word: value for value, word in enumerate(_WORDS.split())}
_CHANGING_WORDS = (
    "or more less fewer plus minus times over squared cubed factorial dozen dozens mod to choose above below half"
    " halves pi sqrt remainder divided multiplied than at least most about pair pairs and score gross lakh crore"
    " thirds quarters fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths"
    " base am pm if unless when else otherwise not no never negative mln mn bn mio mrd tens hundreds thousands millions"
    " billions trillions"
)
CHANGING = frozenset(_CHANGING_WORDS.split())
_BEHIND = re.compile(
    r"(?P<space>\s*)(?P<unit>%|[^\W\d_]+(?:/[^\W\d_]+)?)?(?P<power>\s?\^\s?\{?[23]\}?(?!\d)|[23](?!\d))?(?P<words>(?:[\s.,'’-]+[^\W\d_]+)*)[\s.]*"
)


_TWICE = re.compile(r"(\d{1,30}(?=\s?\(\s?[a-z])|[A-Za-z]{2,9}(?=\s?\(\s?\d))\s?\(\s?([a-z]{2,9}|\d{1,30})\s?\)")
_REPEATING = re.compile(r"(-?)(\d{0,30})\.(\d{0,30})\s?\\overline\s?\{(\d{1,30})\}")
_SCALES_BEHIND = re.compile("[十百千万萬亿億兆半打십백천만억]")


def read_number(text: str) -> Number | None:
    """Return the number that a text is as a whole, with its unit; None for anything else."""
    if (word := _VALUES.get(text.lower())) is not None:
        return Number(Fraction(word))
    if (based := _BASED.fullmatch(text)) and 2 <= (base := int(based[2])) <= 36:
        with suppress(ValueError):  # 102_2
            return Number(Fraction(int(based[1], base)), f"{BASE} {base}")
    if repeating := _REPEATING.fullmatch(text):
        sign, whole, once, again = repeating.groups()
        above = int(whole + once + again) - int(whole + once or "0")
        return Number(Fraction(-above if sign else above, 10 ** len(once) * (10 ** len(again) - 1)))
    if (twice := _TWICE.fullmatch(text)) and (number := read_number(twice[1])) is not None:  # 7 (seven), seven (7)
        return number if twice[2] == "only" or read_number(twice[2]) == number else None
    return _read_number(text)


def _read_number(text: str) -> Number | None:
    match = _VALUE.fullmatch(text)
    if match is None or len(text) - len(match["rest"]) > _MAX_DIGITS:
        return None
    found = behind(match["rest"], is_fraction=match["digits"] is None) if match["rest"].strip() else ("", "", 1)
    value = _value(match)
    if found is None or value is None:
        return None
    unit, words, scale = found
    return Number((-value if "-" in match["sign"] else value) * scale, unit, words=words)


def behind(rest: str, *, is_fraction: bool) -> tuple[str, str, int] | None:
    """Return unit, other words and scale of what stands behind a number; None if it is more than that."""
    if re.fullmatch(r"[^\W\d_a-zA-Z]{1,20}", rest.strip()):  # 3个, 5개
        return None if _SCALES_BEHIND.search(rest) else ("", rest.strip(), 1)
    match = _BEHIND.fullmatch(rest) if len(rest) <= _MAX_WORDS else None
    if match is None or match["unit"] is None or rest[0] in ".,":
        return None
    if len(match["unit"]) == 1 and match["unit"].isupper() and match["unit"] != "L":  # 5 M
        return None
    words = [match["unit"].casefold(), *re.findall(r"[^\W\d_]+", match["words"].casefold())]
    if match["power"] is None and words[0] in _SCALE and match["space"]:
        after = behind(match["words"], is_fraction=False) if match["words"].strip() else ("", "", 1)
        return (*after[:2], after[2] * _SCALE[words[0]]) if after is not None else None
    if CHANGING & set(words):
        return None
    power = re.sub(r"[^23]", "", match["power"] or "")
    while len(words) > 1 and words[0] in ("square", "sq", "cubic"):
        power = "3" if words.pop(0) == "cubic" else "2"
    if len(words) > 1 and words[0] in UNITS and words[1] in ("squared", "cubed"):
        power = "2" if words.pop(1) == "squared" else "3"
    first, *others = words
    if first in ("st", "nd", "rd", "th"):
        return "", " ".join(others), 1
    if first in ("unit", "units"):
        return "", "", 1
    if first in UNITS and len(others) > 1 and others[0] == "per":
        return f"{UNITS[first]}/{UNITS.get(others[1], others[1])}", " ".join(others[2:]), 1
    if first in UNITS and (match["space"] or len(first) > 1 or first == "%"):
        return UNITS[first] + power, " ".join(others), 1
    is_word = bool(match["space"]) and (len(first) > 2 or first == "of") and not power
    return ("", " ".join(words), 1) if is_word and (not is_fraction or first != "x") else None


def _value(match: re.Match[str]) -> Fraction | None:
    def fraction(above: str, below: str) -> Fraction | None:
        low = Fraction(below.replace(" ", ""))
        return Fraction(above.replace(" ", "")) / low if low else None

    if match["whole"] is not None:
        part = fraction(match["a"], match["b"])
        return Fraction(match["whole"]) + part if part is not None and 0 <= part < 1 else None
    if match["mixed"] is not None:
        part = fraction(match["c"], match["d"])
        return Fraction(match["mixed"]) + part if part is not None and part < 1 else None
    if match["e"] is not None:
        return fraction(match["e"], match["f"])
    if match["g"] is not None:
        return fraction(match["g"], match["h"])
    if match["ten"] is not None:
        return Fraction(10) ** int(match["of_ten"])
    return Fraction(match["digits"].replace(",", "").rstrip(".")) * Fraction(10) ** int(
        match["exponent"] or match["power"] or 0
    )
