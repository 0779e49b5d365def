"""The demo's three kinds of question, and how a teacher and a sloppy student write about them.

dial: turns add and subtract modulo 10. pick: the running maximum or minimum of digits. cups: a ball under one of four
cups that are swapped. Named players act in turn; the names let a tiny model keep track of its position in the prompt.
There are 324 facts in all, so only the length of its chain makes a question hard.

Input: a seeded `random.Random`. Output: `Question`s, and answers as lists of `Span`s.
Invariant: the same seed gives the same text, and every answer ends in `</think>`, a newline and `Answer: N`.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

DOMAINS = ("dial", "pick", "cups")
QUESTIONS = {"train": 400, "heldout": 200, "validation": 200}
NUM_MOVES = (3, 8)
"""Shortest and longest chain in the shipped questions."""
NAMES = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon")

Fact = tuple[str, int]
"""A move and the value before it; the words of the move determine the domain."""


class Style(NamedTuple):
    """One style of reasoning: its sentences, the most frequent wording first."""

    openers: tuple[str, str, str]
    steps: tuple[str, str, str]
    check: str
    repair: str


STYLES = (
    Style(  # terse
        openers=("Start at {a}.", "From {a}.", "First {a}."),
        steps=(
            "{who} {move} from {a} is {b}.",
            "{who} {move} takes {a} to {b}.",
            "{who} {move} turns {a} into {b}.",
        ),
        check="Check: {b}, yes.",
        repair="Wait, no.",
    ),
    Style(  # normal
        openers=("We begin with {a}.", "Let us start at {a}.", "At first it is {a}."),
        steps=(
            "Then {who} {move}, so {a} is {b}.",
            "Then {who} {move}, and {a} becomes {b}.",
            "Next {who} {move}, so {a} goes to {b}.",
        ),
        check="Is it {b}? Yes.",
        repair="Hmm, that is wrong.",
    ),
    Style(  # careful
        openers=("Let me go step by step.", "Okay, one by one.", "I will be careful."),
        steps=(
            "It is {a}. {who} {move} makes {b}.",
            "Now at {a}. {who} {move} gives {b}.",
            "We have {a}. {who} {move} leads to {b}.",
        ),
        check="Let me check, and {b} is right.",
        repair="Hold on, let me redo this.",
    ),
)
CLOSINGS = {"dial": "The dial shows {b}.", "pick": "The card is {b}.", "cups": "The ball is under cup {b}."}


class Span(NamedTuple):
    """Part of an answer, and whether models are trained to write it."""

    text: str
    trained: bool = True


@dataclass(frozen=True)
class Question:
    """A chain of moves from a starting value."""

    domain: str
    start: int
    turns: tuple[tuple[str, str], ...]
    """(who, move) in the order of play."""

    @property
    def prompt(self) -> str:
        """The question in words."""
        turns = ", ".join(f"{who} {move}" for who, move in self.turns)
        if self.domain == "dial":
            return f"A dial shows {self.start}. Turns: {turns}. What does it show?"
        if self.domain == "pick":
            return f"A card shows {self.start}. Draws: {turns}. Which card is it?"
        return f"A ball is under cup {self.start}. Swaps: {turns}. Where is the ball?"

    @property
    def answer(self) -> int:
        """The value after the last move."""
        value = self.start
        for _, move in self.turns:
            value = result(move, value)
        return value


@dataclass(frozen=True)
class Habits:
    """How a model writes: the probabilities of each choice and of each kind of mistake."""

    styles: tuple[float, float, float]
    """Terse, normal, careful; drawn once for each answer."""
    wordings: tuple[float, float, float]
    """Drawn for the opener and again for every step."""
    check: float = 0.0
    """Share of the steps followed by a sentence that confirms them."""
    slip: float = 0.0
    """Share of the steps with a wrong sentence that is corrected at once. The wrong sentence is context but not trained
    on: models learn to notice slips, not to make them."""
    closing: float = 0.25
    """Share of the answers that have a sentence after the answer line."""
    wrong: float = 0.0
    """Share of the steps with a random wrong result that is not corrected."""
    skip: float = 0.0
    """Share of the moves that are forgotten."""
    beliefs: Mapping[Fact, int] = field(default_factory=dict)
    """Facts with a wrong result, always the same one."""


def result(move: str, value: int) -> int:
    """The value after one move: `up 3`, `down 3`, `max 7`, `min 7` or `1 and 3`."""
    first, *_, last = move.split()
    n = int(last)
    if first.isdigit():
        return {int(first): n, n: int(first)}.get(value, value)
    if first in ("max", "min"):
        return max(value, n) if first == "max" else min(value, n)
    return (value + (n if first == "up" else -n)) % 10


def moves(domain: str) -> list[str]:
    """All moves of a domain."""
    if domain == "dial":
        return [f"{verb} {n}" for verb in ("up", "down") for n in range(1, 6)]
    if domain == "pick":
        return [f"{verb} {n}" for verb in ("max", "min") for n in range(10)]
    return [f"{i} and {j}" for i, j in itertools.combinations(range(1, 5), 2)]


def values(domain: str) -> range:
    """All values of a domain."""
    return range(1, 5) if domain == "cups" else range(10)


MOVES = {domain: moves(domain) for domain in DOMAINS}


def ask(domain: str, num_moves: int, rng: random.Random) -> Question:
    """Draw one question. The players act in alphabetical order, starting with a random one."""
    first = rng.randrange(len(NAMES))
    turns = [(NAMES[(first + i) % len(NAMES)], rng.choice(MOVES[domain])) for i in range(num_moves)]
    return Question(domain, rng.choice(values(domain)), tuple(turns))


def make_questions() -> dict[str, list[Question]]:
    """Draw the questions of the three files, all different, the domains in turn."""
    rng = random.Random(0)
    seen: set[str] = set()
    files: dict[str, list[Question]] = {}
    for name, count in QUESTIONS.items():
        questions = files.setdefault(name, [])
        while len(questions) < count:
            question = ask(DOMAINS[len(questions) % len(DOMAINS)], rng.randint(*NUM_MOVES), rng)
            if question.prompt not in seen:
                seen.add(question.prompt)
                questions.append(question)
    return files


def wrong_beliefs(share: float, rng: random.Random) -> dict[Fact, int]:
    """Choose about `share` of all facts, and a wrong result of the same domain for each."""
    beliefs = {}
    for domain in DOMAINS:
        for move, value in itertools.product(MOVES[domain], values(domain)):
            if rng.random() < share:
                beliefs[move, value] = another(domain, result(move, value), rng)
    return beliefs


def another(domain: str, value: int, rng: random.Random) -> int:
    """Draw a value of the domain other than the given one."""
    return rng.choice([other for other in values(domain) if other != value])


def write(question: Question, habits: Habits, rng: random.Random) -> list[Span]:
    """Write one answer to a question with these habits."""
    style = rng.choices(STYLES, habits.styles)[0]
    value = question.start
    (opener,) = rng.choices(style.openers, habits.wordings)
    spans = [Span(f"<think> {opener.format(a=value)}")]
    for who, move in question.turns:
        if rng.random() < habits.skip:
            continue
        after = habits.beliefs.get((move, value), result(move, value))
        if rng.random() < habits.wrong:
            after = another(question.domain, after, rng)
        spans.extend(write_step(question.domain, style, habits, who, move, (value, after), rng))
        value = after
    spans.append(Span(f"</think>\nAnswer: {value}"))
    if rng.random() < habits.closing:
        spans.append(Span("\n" + CLOSINGS[question.domain].format(b=value)))
    return spans


def write_step(
    domain: str, style: Style, habits: Habits, who: str, move: str, change: tuple[int, int], rng: random.Random
) -> Iterator[Span]:
    """Write the sentences of one move, which changes the value from `change[0]` to `change[1]`."""
    a, b = change
    (wording,) = rng.choices(style.steps, habits.wordings)
    if rng.random() < habits.slip:
        yield Span(" " + wording.format(who=who, move=move, a=a, b=another(domain, b, rng)), trained=False)
        yield Span(f" {style.repair}")
    yield Span(" " + wording.format(who=who, move=move, a=a, b=b))
    if rng.random() < habits.check:
        yield Span(" " + style.check.format(b=b))


def graded(completion: str, answer: int | str) -> bool:
    """Return whether the completion has an answer line after the reasoning, with the right answer."""
    line = re.search(r"</think>\s*Answer: (\d+)\b", completion)
    return line is not None and line[1] == str(answer)
