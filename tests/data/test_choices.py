"""Options of a question: how they are shown, and in which order each answer sees them."""

from collections import Counter
from itertools import permutations

import pytest

from dasd_lite.data.choices import options_block, shuffled, with_order
from dasd_lite.data.formats.options import read_options, right_option
from dasd_lite.data.formats.row import Fault
from dasd_lite.data.records import Prompt
from dasd_lite.data.references import LETTERS, Choices, read_choices
from dasd_lite.errors import DataError

FOUR = Choices(("a", "b", "c", "d"), 2)


def question(choices, text="Which?", **more):
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": text + options_block(choices.options)})
    return Prompt("q", messages, "science", choices.encode(), **more)


def test_options_are_shown_with_their_letters():
    assert options_block(("5 m", "two\nlines")) == "\n\nA) 5 m\nB) two\nlines"


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_every_order_is_seen_once_before_any_is_seen_twice(number):
    choices = Choices(tuple(LETTERS[:number]), 0)
    every = set(permutations(choices.options))
    for start in (0, len(every)):
        seen = [shuffled(choices, "q", start + i, 0).options for i in range(len(every))]
        assert set(seen) == every and len(seen) == len(every)


@pytest.mark.parametrize("number", [4, 7, 10])
def test_each_option_stands_once_at_each_letter_in_as_many_answers_as_there_are_options(number):
    choices = Choices(tuple(LETTERS[:number]), 1)
    for start in (0, number, 5 * number):
        letters = [shuffled(choices, "q", start + i, 3).letter for i in range(number)]
        assert sorted(letters) == list(LETTERS[:number])


def test_64_answers_see_the_orders_about_equally():
    orders = Counter(shuffled(FOUR, "q", i, 7).options for i in range(64))
    assert len(orders) == 24
    assert set(orders.values()) <= {2, 3}
    assert Counter(shuffled(FOUR, "q", i, 7).letter for i in range(64)) == dict.fromkeys("ABCD", 16)


def test_the_right_option_stays_the_right_one():
    for index in range(24):
        choices = shuffled(FOUR, "q", index, 1)
        assert choices.options[choices.right] == "c"


def test_the_order_depends_on_question_number_and_seed_and_on_nothing_else():
    def orders(question, seed):
        return [shuffled(FOUR, question, i, seed).options for i in range(24)]

    assert orders("q", 0) == orders("q", 0)
    assert orders("q", 0) != orders("other", 0)
    assert orders("q", 0) != orders("q", 1)
    late = shuffled(FOUR, "q", 20, 0)
    orders("other", 5)
    assert shuffled(FOUR, "q", 20, 0) == late, "what was asked before does not matter"
    assert orders("other", 0)[3:5] == [("c", "d", "a", "b"), ("a", "c", "b", "d")], "the same on every machine"
    first = Counter(shuffled(FOUR, f"q{i}", 0, 0).letter for i in range(400))
    assert min(first.values()) > 70, "answer 0 of many questions sees the right option anywhere"


def test_a_question_gets_its_options_in_another_order_and_back():
    asked = question(FOUR, where="f.jsonl:1")
    turned = with_order(asked, shuffled(FOUR, "q", 3, 0))
    choices = read_choices(turned.answer)
    assert turned.messages[-1]["content"] == "Which?" + options_block(choices.options)
    assert turned.messages[0] == asked.messages[0]
    assert (choices.options[choices.right], turned.uid, turned.where) == ("c", "q", "f.jsonl:1")
    assert with_order(turned, FOUR) == asked
    assert with_order(asked, FOUR) == asked


def test_only_options_at_the_end_of_a_question_can_be_reordered():
    plain = Prompt("q", ({"role": "user", "content": "1+1?"},), "all", "2")
    with pytest.raises(DataError, match="question q has no options"):
        with_order(plain, FOUR)
    with pytest.raises(DataError, match="question q has other options"):
        with_order(question(FOUR), Choices(("a", "b"), 0))
    elsewhere = Prompt("q", ({"role": "user", "content": "Which of a, b, c, d?"},), "all", FOUR.encode())
    with pytest.raises(DataError, match="question q does not end with its options"):
        with_order(elsewhere, FOUR)


# --- options as files have them -----------------------------------------------------------------------


def test_letters_that_options_bring_are_taken_off():
    labels, options = read_options(["A) iron", "B) neon", "C) gold"], "choices")
    assert options == ("iron", "neon", "gold")
    for answer in ("B", "B) neon", "neon", 1):
        assert right_option(labels, options, answer, "answer").right == 1
    for kept in (["A) iron", "neon"], ["B) iron", "A) neon"], ["A. Smith", "C. Jones"]):
        assert read_options(kept, "choices")[1] == tuple(kept), "only where all have the letter of their place"


@pytest.mark.parametrize(
    ("options", "answer", "message"),
    [
        ([1, 2, 3], 2, "may be two of the options"),
        (["x", "y", "y"], "B", "the right option 'y' is there twice"),
        (["x"] * 30, "A", "choices has 30 options; it must have 2 to 26"),
    ],
)
def test_options_that_are_not_clear(options, answer, message):
    with pytest.raises(Fault, match=message):
        labels, texts = read_options(options, "choices")
        right_option(labels, texts, answer, "answer")
