"""Multiple choice: which option a completion states. The table is tests/golden/choices.jsonl, labeled by hand."""

import json
from pathlib import Path

import pytest

from dasd_lite.data.references import LETTERS, Choices, read_choices
from dasd_lite.grading.choice import fault, grade, vote

TABLE = Path(__file__).parents[1] / "golden" / "choices.jsonl"
ROWS = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
REFERENCE = Choices(("first", "second", "third", "fourth"), 1).encode()


@pytest.mark.parametrize("row", ROWS, ids=[f"{i}-{row['family']}" for i, row in enumerate(ROWS)])
def test_what_a_completion_states(row):
    found = grade(row["completion"], row["reference"])
    assert found.verdict == row["verdict"], found
    if row["extracted"] is not None:
        assert found.extracted == row["extracted"]


def test_the_table_is_large_enough_and_says_each_thing_once():
    assert len(ROWS) >= 80
    assert len({(row["completion"], row["reference"]) for row in ROWS}) == len(ROWS)


def test_a_completion_is_right_for_one_letter_at_most():
    """Whichever option is the right one, only the stated letter is right; a text with none or several never is."""
    for row in ROWS:
        if not row["reference"].startswith("{"):
            continue
        options = read_choices(row["reference"]).options
        verdicts = [grade(row["completion"], Choices(options, right).encode()).verdict for right in range(len(options))]
        stated = row["extracted"] if row["extracted"] in tuple(LETTERS) else None
        expected = ["right" if letter == stated else row["verdict"] for letter in LETTERS[: len(options)]]
        if row["verdict"] in ("right", "wrong"):
            expected = ["right" if letter == stated else "wrong" for letter in LETTERS[: len(options)]]
        assert verdicts == expected, row


def test_why_an_answer_is_not_right_is_said_where_the_verdict_does_not():
    assert grade("Answer: A and C", REFERENCE).reason == "states several options"
    assert grade(r"\boxed{42}", REFERENCE) == grade(r"So $x = \boxed{ 42 }$", REFERENCE)
    assert grade(r"\boxed{42}", REFERENCE).reason == "states no option"
    assert grade(r"\boxed{42}", REFERENCE).extracted == "42"


@pytest.mark.parametrize("letter", ["B", "(B)", "b", r"\text{B}", "$B$", "B.", "（Ｂ）", "**B**"])
def test_a_reference_may_be_a_letter_alone(letter):
    assert fault(letter) is None
    assert grade(r"\boxed{\text{(B)}}", letter).verdict == "right"
    assert grade("Answer: A", letter).verdict == "wrong"


@pytest.mark.parametrize("reference", ["", "AB", "42", "Paris", "second", "A and B"])
def test_a_reference_that_is_no_letter_is_a_fault_and_never_right(reference):
    assert fault(reference) == "is not the letter of an option"
    assert grade(rf"\boxed{{{reference}}}", reference).verdict == "unparseable"


@pytest.mark.parametrize(
    "reference",
    [
        '{"choices": ["a", "b"], "answer": "C"}',
        '{"choices": ["a", "b"]}',
        '{"choices": [1, 2], "answer": "A"}',
        '{"choices": ["a", "b"], "answer": "A"',
        '{"choices": 5, "answer": "A"}',
        '{"choices": ["a", "b"], "answer": 0}',
    ],
)
def test_options_in_another_form_are_a_fault_and_never_right(reference):
    assert fault(reference) == "is no list of options with the letter of the right one"
    assert grade("Answer: A", reference).verdict == "unparseable"


def test_answers_to_the_same_option_vote_for_the_same_in_every_order():
    first = Choices(("3", "5", "8"), 1).encode()
    second = Choices(("8", "3", "5"), 2).encode()
    assert (vote("C", first), vote("A", second)) == ("8", "8")
    assert vote("A, C", first) == "A, C"
    assert vote("B", "B") == "B"


LONG = 100_000
TEXTS = {
    "line breaks": "Answer:" + "\n" * LONG,
    "spaces": "The answer " + " " * LONG + "\n",
    "answers": "answer " * LONG,
    "open boxes": r"\boxed{" * LONG,
    "boxes in boxes": r"\boxed{" * LONG + "}" * LONG,
    "boxes": r"\boxed{x}" * LONG,
    "letters": "Answer: " + "A and " * LONG,
    "stars": "answer" + "* " * LONG,
    "sentences": "So A is the " * LONG,
    "tags": "<think></think>" * LONG,
    "wide": "ﷺ" * LONG,
}


@pytest.mark.timeout(240)  # a tenth of that is enough on any machine if the time is linear; else it is hours
@pytest.mark.parametrize("name", TEXTS)
def test_a_long_text_takes_no_longer_than_it_is_long(name):
    assert grade(TEXTS[name], REFERENCE).verdict != "right"
