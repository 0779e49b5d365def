r"""The final answer of a text: where it is looked for, where it ends, and how long that takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dasd_lite.data.formats.final_answer import conclusion, final_answer, last_box, marked, reference_answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        # boxes
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{7} hmm, so \boxed{8}", "8"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed 5", "5"),
        (r"$\fbox{5}$", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{8}. Put answers in \boxed{...}, not in \boxed{}", "8"),
        (r"\boxed{4} Answer: 5", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"$x=\boxed{7}$ or $x=\boxed{8}$", "7, 8"),
        (r"\boxed{4", None),
        (r"The answer is \boxed{4", None),
        (r"Answer: 7. Final answer: \boxed{4", None),
        (r"It is not \boxed{4}.", None),
        (r"(a) $\boxed{3}$ (b) $\boxed{5}$", "3, 5"),
        (r"$x=\boxed{3}$, no, $x=\boxed{5}$", "5"),
        (r"**\boxed{4}**", "4"),
        (r"<b>\boxed{4}</b>", "4"),
        (r"> \boxed{4}!", "4"),
        (r"} } \boxed{4} {", "4"),
        (r"\\boxed{4}", "4"),
        # the order of marks
        ("<answer>42</answer> Answer: 5", "42"),
        ("The answer is 5.\n#### 42", "42"),
        ("<answer>7</answer>\n#### 42", "7"),
        ("#### Step 1\nWe add.\n#### Step 2\nThe answer is 7", "7"),
        # words
        ("Answer: 2", "2"),
        ("The answer is 7.", "7"),
        ("The answer is: 42", "42"),
        ("the final answer is **12**", "12"),
        ("**Answer:** 12", "12"),
        ("**Answer**: 12", "12"),
        ("Answer = 3.5.", "3.5"),
        ("Answer: 5. The rest is prose.", "5"),
        ("Answer: 1\nNo, wait.\nAnswer: 2", "2"),
        ("Answer: `x = 3`", "x = 3"),
        ("Answer: $12$", "12"),
        ("**Final Answer**\n42", "42"),
        ("#### Final Answer\n\n42", "42"),
        ("Answer: \\[\n5\n\\]", "5"),
        ("The answer is $x=2$ or $x=3$.", "x=2, x=3"),
        ("The answers are 4 and 5", "4 and 5"),
        ("The answers are **4** and **5**.", "4 and 5"),
        ("The answer is $5$ thousand dollars.", "5 thousand dollars"),
        ("The answer is $5$ (see above).", "5"),
        ("Final answer:\n* x = 5\n* y = 6", "x = 5, y = 6"),
        (r"**Final Answer:** The total is \(18\).", "18"),
        ("**Answer**: 18 ✅", "18"),
        ("Answer: 42 because 6*7=42", "42"),
        ("The answer is 12 cm, as shown", "12 cm"),
        ("The answer is U.S. Grant.", "U.S. Grant"),
        ("The answer is 5!", "5!"),
        ("Hence x = 5.", "x = 5"),
        ("42", "42"),
        # no answer
        ("", None),
        ("I do not know.", None),
        ("Answer:", None),
        ("The answer is correct.", None),
        ("Let me know if this answer is helpful!", None),
        (r"Put it in \boxed{your answer}.", None),
    ],
)
def test_the_answer_that_a_completion_states(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"),
        ("<thinking>", "</thinking>"),
        ("<thought>", "</thought>"),
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("<seed:think>", "</seed:think>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<think >", "</think>"),
        ("<mm:think>", "</mm:think>"),
        ("<start_working_out>", "<end_working_out>"),
        ("<|inner_prefix|>", "<|inner_suffix|>"),
        ("<unused94>thought", "<unused95>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_only_what_follows_the_thinking_counts(opening, closing):
    inside, after = r"It is \boxed{1}.", r"It is \boxed{2}."
    assert final_answer(f"{opening}{inside}{closing}{after}") == "2"
    assert final_answer(f"{inside}{closing}{after}") == "2", "the template may have opened it"
    assert final_answer(f"{opening}{inside}{closing}") is None
    assert final_answer(f"{opening}{inside}") is None, "cut off"
    assert final_answer(f"{opening}a{closing}b{opening}{inside}") is None, "the second one is open"


def test_a_closing_tag_of_another_kind_closes_nothing():
    assert conclusion(r"<think>so </thinking> \boxed{5}") is None


def test_what_is_opened_inside_of_a_thinking_ends_with_it():
    assert conclusion(r"<think>A <reason> and an <analysis>.</think> \boxed{5}") == r" \boxed{5}"


@pytest.mark.parametrize("begin", ["analysiswe ", "analysis We", "analysis\n\n", "analysis2+3", "analysis**"])
def test_channels_without_their_special_tokens(begin):
    assert final_answer(begin + r" get \boxed{1}") is None
    assert final_answer(begin + r" get \boxed{1}assistantfinalNo idea.") is None
    assert final_answer(begin + r" get \boxed{1}assistantfinalIt is \boxed{2}.") == "2"


def test_a_text_without_thinking_is_a_conclusion():
    assert conclusion("It is 5.") == "It is 5."


formulas = st.recursive(
    st.text(alphabet="xy01", min_size=1, max_size=5),
    lambda inner: st.builds(r"\frac{{{}}}{{{}}}".format, inner, inner) | st.builds(r"\{{{},{}\}}".format, inner, inner),
    max_leaves=12,
)


@given(st.lists(formulas, min_size=1, max_size=4), st.text(alphabet="ab {}$\n", max_size=30))
def test_the_last_box_is_found_whatever_is_in_it(contents, prose):
    text = " then ".join(rf"\boxed{{{content}}}" for content in contents)
    assert last_box(f"{prose} {text} {prose.replace('{', '')}") == contents[-1]


@given(st.text(alphabet=r"\boxedfra{}[]()$#*answerAnswer: is\n.123<>/think答案", max_size=200))
def test_any_text_is_read(text):
    for read in (final_answer, reference_answer, marked, last_box):
        assert read(text) is None or read(text).strip()


LONG = {
    "line breaks": "Answer:" + "\n" * 500_000,
    "boxes that never close": r"\boxed{" * 100_000,
    "boxes in boxes": r"\boxed{" * 50_000 + "}" * 50_000,
    "empty boxes": r"\boxed{}" * 100_000,
    "boxes side by side": r"\boxed{1}," * 100_000,
    "round brackets": "(" * 1_000_000,
    "braces": "{" * 1_000_000,
    "backslashes": "\\" * 1_000_000,
    "answer is": "answer is " * 50_000,
    "is": "answer " + "is " * 300_000,
    "answer for": ("answer for" + " " * 50) * 20_000,
    "answer of": "answer of " * 50_000,
    "answer, dots": "answer: ...\n" * 50_000,
    "open displays": r"answer: \[ " * 50_000,
    "spaces": "answer" + " " * 1_000_000,
    "opened thinking": "<think>" * 100_000,
    "thinking of all kinds": "<think><cot><mm:think></cot>" * 30_000,
    "boxes that are denied": r"not \boxed{1} " * 50_000,
    "boxes with labels": r"(a) \boxed{1} (b) \boxed{2} " * 50_000,
    "boxes and answers": r"\boxed{1} The answer is $5$ and so on. " * 30_000,
    "ornaments": "<answer>" + "✅" * 300_000 + "5</answer>",
    "spaces in a statement": ("Answer: ." + " " * 1_900 + "\n") * 200,
    "points": "Answer:\n* 1" + "\n* 1" * 100_000,
    "many points": "Answer:\n* 1\n* 2\n" * 50_000,
    "answer tags": "<answer>" * 100_000,
    "closing tags": "</answer>" * 100_000,
    "hashes": "#### \n" * 100_000,
    "channels": "<|channel|>final" * 100_000,
    "Chinese": "答案" * 300_000,
    "dollars": "answer: $" * 100_000,
}


@pytest.mark.timeout(
    300
)  # each takes a second at most; if the time grew with the square of the length, it would be hours
@pytest.mark.parametrize("name", LONG)
def test_the_time_is_linear_in_the_length(name):
    final_answer(LONG[name])
    reference_answer(LONG[name])
