"""The options of a multiple-choice question, as rows have them → `Choices`.

Input: a list of texts, an object letter → text, or an object with the lists `text` and `label`; each also as JSON text.
The right one: its letter, its index from 0, or its text. Invariant: an answer that may mean two options is a fault.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from dasd_lite.data.formats.conversation import listed, shown
from dasd_lite.data.formats.row import Fault
from dasd_lite.data.formats.tests import from_json
from dasd_lite.data.references import LETTERS, Choices

_MARK = re.compile(r"\(?(?P<letter>[A-Za-z])[).:]\s+(?=\S)")


def read_options(value: Any, path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels and texts of options.

    Args:
        value: The options of a row.
        path: What errors call them.

    Raises:
        Fault: They have another form, or are fewer than 2 or more than 26.
    """
    value = from_json(value, path) if isinstance(value, str) else value
    labels: Sequence[Any]
    if isinstance(value, Mapping) and isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
        labels, texts = value["label"], value["text"]
    elif isinstance(value, Mapping):
        there = {label: text for label, text in value.items() if text is not None}
        labels, texts = list(there), list(there.values())
    elif isinstance(value, list):
        labels, texts = LETTERS[: len(value)], value
    else:
        raise Fault(f"{path} = {shown(value)}; it must be a list of options, or an object letter → option")
    if not 2 <= len(texts) <= len(LETTERS) or len(labels) != len(texts):
        of = f" and {len(labels)} labels" if isinstance(value, Mapping) else ""
        raise Fault(f"{path} has {len(texts)} options{of}; it must have 2 to {len(LETTERS)}")
    options = tuple(_option(text, f"{path}[{i}]") for i, text in enumerate(texts))
    marks = [_MARK.match(option) for option in options]
    own = [mark["letter"].upper() for mark in marks if mark is not None]
    if own == list(LETTERS[: len(options)]) and not isinstance(value, Mapping):  # `A) iron`: their order will change
        options = tuple(option[mark.end() :] for option, mark in zip(options, marks, strict=True) if mark is not None)
    return tuple(str(label).strip() for label in labels), options


def right_option(labels: Sequence[str], options: tuple[str, ...], answer: Any, path: str) -> Choices:
    """Return options with the right one.

    Args:
        labels: Their labels.
        options: Their texts.
        answer: The letter, index, or text of the right one. A number is an index or a text.
        path: What errors call the answer.

    Raises:
        Fault: It is none of them, or may be two of them.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = {answer} & set(range(len(options)))
        found |= {i for i, option in enumerate(options) if option == str(answer)}
    elif isinstance(answer, str):
        text = answer.strip()
        letter = text.strip("().: ")
        found = {i for i, option in enumerate(options) if option == text}
        found |= {i for i, label in enumerate(labels) if label in (text, letter, letter.upper())}
        mark = _MARK.match(text)  # letter and text
        found |= {i for i, option in enumerate(options) if mark is not None and option == text[mark.end() :]}
        if letter.isascii() and letter.isdigit() and len(letter) < 3 and not set(labels) & {text, letter}:
            found |= {int(letter)} & set(range(len(options)))
    else:
        found = set()
    if len(found) != 1:
        there = listed([f"{label}) {option}" for label, option in zip(labels, options, strict=True)])
        what = "is none of" if not found else "may be two of"
        raise Fault(f"{path} = {shown(answer)}, which {what} the options {there}; give the letter of the right one")
    right = found.pop()
    if options.count(options[right]) > 1:
        raise Fault(f"{path} = {shown(answer)}: the right option {options[right]!r} is there twice; leave one out")
    return Choices(options, right)


def _option(value: Any, path: str) -> str:
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise Fault(f"{path} = {shown(value)}; an option must be text")
    return value.strip()
