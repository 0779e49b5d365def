"""The options of a question: how they are shown, and in which order.

Input: a question whose reference answer is options (`data/references.py`). Output: the same question with its options
in another order. Invariant: the order is a pure function of question, number of the answer, and seed, so that resuming
changes nothing and two models see the same orders.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import permutations

from dasd_lite.data.records import Prompt
from dasd_lite.data.references import LETTERS, Choices, kind_of, read_choices
from dasd_lite.data.seeds import digest
from dasd_lite.errors import DataError

_MOST_LISTED = 5  # options whose orders are all listed: 120


def options_block(options: tuple[str, ...]) -> str:
    """Return the text with the options that a question ends with."""
    lines = (f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    return "\n\n" + "\n".join(lines)


def shuffled(choices: Choices, question: str, index: int, seed: int) -> Choices:
    """Return the options in the order in which answer number `index` to a question sees them.

    The first n answers see the n rotations of one order, so each option stands once at each letter, and so do each n
    after them. Of up to 5 options, the first n! answers see every order once, and so do each n! after them.

    Args:
        choices: The options.
        question: What identifies the question, such as `Prompt.key`.
        index: Number of the answer, from 0.
        seed: Seed of the run.
    """
    order = _order(len(choices.options), question, index, seed)
    return Choices(tuple(choices.options[i] for i in order), order.index(choices.right))


def with_order(prompt: Prompt, choices: Choices) -> Prompt:
    """Return a question with its options in the order of `choices`: in its last message and in its reference.

    Raises:
        DataError: It has no options at its end, or others.
    """
    if prompt.answer is None or kind_of(prompt.answer) != "choice":
        raise DataError(f"question {prompt.name} has no options; its reference is not one of a choice")
    now, text = read_choices(prompt.answer), prompt.messages[-1]["content"]
    if sorted(now.options) != sorted(choices.options):
        raise DataError(f"question {prompt.name} has other options; only their order may change")
    block = options_block(now.options)
    if not text.endswith(block):
        raise DataError(f"question {prompt.name} does not end with its options as `A) …`, so they cannot be reordered")
    last = {**prompt.messages[-1], "content": text.removesuffix(block) + options_block(choices.options)}
    return replace(prompt, messages=(*prompt.messages[:-1], last), answer=choices.encode())


def _order(number: int, question: str, index: int, seed: int) -> tuple[int, ...]:
    """Return the options by number, in the order in which they are shown."""
    block, at = divmod(index, number)
    if number <= _MOST_LISTED:
        bases = _bases(number, question, seed)
        base = bases[block % len(bases)]
    else:
        base = _drawn(range(number), "options", question, block, seed)
    shift = _drawn(range(number), "rotation", question, block, seed)[at]
    return base[shift:] + base[:shift]


@lru_cache(maxsize=4096)
def _bases(number: int, question: str, seed: int) -> tuple[tuple[int, ...], ...]:
    """Return the orders that begin with option 0, which no rotation makes equal, in an order of this question."""
    orders = [(0, *rest) for rest in permutations(range(1, number))]
    return tuple(orders[i] for i in _drawn(range(len(orders)), "orders", question, 0, seed))


def _drawn(items: range, purpose: str, question: str, block: int, seed: int) -> tuple[int, ...]:
    """Return `items` in an order that is random but the same on every machine."""
    return tuple(sorted(items, key=lambda item: digest(seed, "choices", purpose, question, block, item)))
