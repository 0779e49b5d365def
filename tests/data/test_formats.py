"""What a row of a user's file means, in every format: the right value stands beside each row."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_lite.config.reading import Columns, Reading, Role, parse_path
from dasd_lite.data.formats.layout import KNOWN
from dasd_lite.data.formats.meaning import Meaning
from dasd_lite.data.formats.presets import PRESETS
from dasd_lite.data.formats.read import RowFiles
from dasd_lite.data.formats.row import Fault, LeftOut
from dasd_lite.data.formats.thinking import join, rewrite
from dasd_lite.data.prompts import read_prompts
from dasd_lite.errors import ConfigError, DataError


@pytest.fixture
def read(tmp_path):
    """`read(row, …, format=…, columns=…)` → the rows that they mean, and the notes."""

    def reader(*rows, answers=True, tokens=False, system=None, **options):
        path = tmp_path / "f.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        files = RowFiles([str(path)], Reading(**options), answers=answers, tokens=tokens, system=system)
        read_rows = list(files)
        return read_rows, [line.replace(str(path), "f") for line in files.finish()]

    return reader


@pytest.fixture
def fault(read, tmp_path):
    """`fault(row)` → what is wrong with it, without its place."""

    def refused(*rows, **options):
        with pytest.raises(DataError) as error:
            read(*rows, **options)
        (line,) = str(error.value).splitlines()
        assert line.startswith(f"{tmp_path}/f.jsonl:{len(rows)}: "), line
        return line.removeprefix(f"{tmp_path}/f.jsonl:{len(rows)}: ")

    return refused


def question(row):
    return [(m["role"], m["content"]) for m in row.messages]


def completions(row):
    return [answer.completion for answer in row.answers]


ASK = [("user", "1+1?")]
THOUGHT = "<think>\none and one\n</think>\n\n2"
OPENAI = [{"role": "user", "content": "1+1?"}]


# --- formats that are found by the names of their columns -----------------------------------------------

FORMS = {
    "prompt and completion": ({"prompt": "1+1?", "completion": "2"}, ASK, ["2"]),
    "prompt and response": ({"prompt": "1+1?", "response": "2"}, ASK, ["2"]),
    "input and output": ({"input": "1+1?", "output": "2"}, ASK, ["2"]),
    "question and response": ({"question": "1+1?", "response": "2"}, ASK, ["2"]),
    "problem and generation": ({"problem": "1+1?", "generation": "2"}, ASK, ["2"]),
    "TRL, conversational": (
        {"prompt": OPENAI, "completion": [{"role": "assistant", "content": "2"}]},
        ASK,
        ["2"],
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1, 1", "output": "2"}, [("user", "Add.\n\n1, 1")], ["2"]),
    "Alpaca without input": ({"instruction": "1+1?", "input": "", "output": "2"}, ASK, ["2"]),
    "Alpaca with system": (
        {"instruction": "1+1?", "input": "", "output": "2", "system": "Be brief."},
        [("system", "Be brief."), *ASK],
        ["2"],
    ),
    "messages": ({"messages": [*OPENAI, {"role": "assistant", "content": "2"}]}, ASK, ["2"]),
    "messages with content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
            ]
        },
        ASK,
        ["2"],
    ),
    "content parts with thinking": (
        {
            "messages": [
                *OPENAI,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": [{"type": "text", "text": "one and one"}]},
                        {"type": "text", "text": "2"},
                    ],
                },
            ]
        },
        ASK,
        [THOUGHT],
    ),
    "reasoning_content": (
        {"messages": [*OPENAI, {"role": "assistant", "reasoning_content": "one and one", "content": "2"}]},
        ASK,
        [THOUGHT],
    ),
    "reasoning": (
        {"messages": [*OPENAI, {"role": "assistant", "reasoning": "\none and one\n", "content": "\n\n2"}]},
        ASK,
        [THOUGHT],
    ),
    "thinking": (
        {"messages": [*OPENAI, {"role": "assistant", "thinking": "one and one", "content": "2"}]},
        ASK,
        [THOUGHT],
    ),
    "reasoning_content of a row": (
        {"prompt": "1+1?", "output": "2", "reasoning_content": "one and one"},
        ASK,
        [THOUGHT],
    ),
    "reasoning of a row": ({"prompt": "1+1?", "output": "2", "reasoning": "one and one"}, ASK, [THOUGHT]),
    "thinking without an answer": (
        {"messages": [*OPENAI, {"role": "assistant", "reasoning_content": "one and", "content": None}]},
        ASK,
        ["<think>\none and"],
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, *OPENAI, {"role": "assistant", "content": "2"}]},
        [("system", "Be brief."), *ASK],
        ["2"],
    ),
    "several turns": (
        {
            "messages": [
                *OPENAI,
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "And 2+2?"},
                {"role": "assistant", "content": "4"},
            ]
        },
        [*ASK, ("assistant", "2"), ("user", "And 2+2?")],
        ["4"],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        ASK,
        ["2"],
    ),
    "ShareGPT, model": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "user", "value": "1+1?"},
                {"from": "model", "value": "2"},
            ]
        },
        [("system", "Be brief."), *ASK],
        ["2"],
    ),
    "ShareGPT with a system column": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "1+1?"}, {"from": "assistant", "value": "2"}],
        },
        [("system", "Be brief."), *ASK],
        ["2"],
    ),
    "several answers": ({"prompt": "1+1?", "generations": ["2", "3"]}, ASK, ["2", "3"]),
    "the same question twice": (
        {"prompt": "1+1?", "messages": [*OPENAI, {"role": "assistant", "content": "2"}]},
        ASK,
        ["2"],
    ),
    "the same answer twice": (
        {"messages": [*OPENAI, {"role": "assistant", "content": "2"}], "response": "2"},
        ASK,
        ["2"],
    ),
    "a union of both, with nulls": (
        {
            "messages": [
                {"role": "user", "content": "1+1?", "from": None, "value": None},
                {"role": None, "content": None, "from": "gpt", "value": "2"},
            ]
        },
        ASK,
        ["2"],
    ),
    "reasoning and nothing else": (
        {"messages": [*OPENAI, {"role": "assistant", "reasoning": "one and"}]},
        ASK,
        ["<think>\none and"],
    ),
    "null in place of a column": (
        {"prompt": None, "messages": [], "input": "1+1?", "output": "2", "tools": []},
        ASK,
        ["2"],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_read_by_the_names_of_its_columns(read, form):
    row, asked, answered = FORMS[form]
    ((found,), _) = read(row)
    assert question(found) == asked
    assert completions(found) == answered
    ((only_asked,), _) = read(row, answers=False)
    assert question(only_asked) == asked and only_asked.answers == ()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>a</think> 5", "<think>a</think> 5"),
        ("<think>\n\n</think>\n\n5", "<think>\n\n</think>\n\n5"),
        ("plain <answer>5</answer>", "plain <answer>5</answer>"),
        ("<answer>5</answer>", "<answer>5</answer>"),
        ("<think>a</think> <answer>5</answer>", "<think>a</think> 5"),
        ("<think>a</think>\n<answer>\n5 \n</answer>\n", "<think>a</think>\n5"),
        ("<think>a</think>\n<final>5", "<think>a</think>\n5"),
        ("<think>a</think>\n<b>5</b>", "<think>a</think>\n<b>5</b>"),
        ("<think>a <answer>5</answer> b", "<think>a <answer>5</answer> b"),
        (
            "<|begin_of_thought|>\n\na\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n5\n\n<|end_of_solution|>",
            "<think>\na\n</think>\n\n5",
        ),
        ("<|begin_of_thought|>a<|end_of_thought|> 5", "<think>\na\n</think>\n\n5"),
        ("<|begin_of_thought|> a and", "<think>\na and"),
        ("[THINK]a[/THINK]5", "<think>\na\n</think>\n\n5"),
        ("[THINK]a", "<think>\na"),
        ("Say [THINK]a[/THINK]", "Say [THINK]a[/THINK]"),
        ("<think>a</think> <answer>4</answer> more", "<think>a</think> <answer>4</answer> more"),
        ("<think>a</think><final>4</final><final>5</final>", "<think>a</think><final>4</final><final>5</final>"),
        (
            "<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>4<|end_of_solution|> trailing",
            "<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>4<|end_of_solution|> trailing",
        ),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>4", "<think>\na\n</think>\n\n4"),
    ],
)
def test_tags_of_other_tools_become_think(text, right):
    assert rewrite(text)[0] == right
    assert bool(rewrite(text)[1]) == (text != right), "what was rewritten is counted"
    assert rewrite(right) == (right, "")


CHANNELS = json.loads((Path(__file__).parents[1] / "golden" / "harmony.json").read_text(encoding="utf-8"))
WHOLE = [case for case in CHANNELS if not case["prefix"] and not str(case["tokens"]).count("hex:")]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case["name"])
def test_channels_as_text_become_what_the_sampled_tokens_do(case):
    """The golden files of chat/harmony.py; what a model may write there and text may not is refused by name."""
    text = "".join(token for token, _ in case["tokens"])
    if case["finish_reason"] in ("tool_calls", "malformed"):
        if text.startswith(("<|channel|>", "<|start|>assistant")):
            with pytest.raises(Fault, match="channels of gpt-oss that are not valid, or call a tool, at character "):
                rewrite(text)
        return
    right = "".join(spelled for _, spelled in case["tokens"])
    assert rewrite(text) == (right, "<|channel|>")
    behind = "\n" if text.endswith("|>") else ""  # white space behind an end token is no part of the answer
    assert rewrite(f"<|start|>assistant{text}{behind}") == (right, "<|channel|>")
    assert rewrite(right) == (right, "")


def test_channels_are_counted_and_joined_with_a_thinking_apart(read, fault):
    final = "<|channel|>final<|message|>2<|return|>"
    rows, notes = read(
        {"prompt": "1+1?", "output": f"<|channel|>analysis<|message|>one and one<|end|><|start|>assistant{final}"},
        {"prompt": "1+1?", "output": final, "reasoning": "one and one"},
        {"prompt": "1+1?", "output": "Write <|channel|>final<|message|>."},
    )
    assert [completions(row) for row in rows] == [[THOUGHT], [THOUGHT], ["Write <|channel|>final<|message|>."]]
    assert notes == ["f: <|channel|> became <think> or was removed in 2 answers"]
    call = "<|channel|>commentary to=functions.add<|message|>{}<|call|>"
    assert fault({"prompt": "q", "output": call}).startswith(
        "has channels of gpt-oss that are not valid, or call a tool, at character 0: '<|channel|>commentary to="
    )


def test_thinking_beside_an_answer_is_joined_as_replies_of_servers_are():
    from dasd_lite.inference.endpoint.replies import Choice, ReplyMessage, answer_text

    for thinking, content in (("a\n", "\n5"), ("a", "5"), ("a", None), ("", "5")):
        reply = answer_text(Choice(message=ReplyMessage(content=content, reasoning_content=thinking)))[0]
        assert join(thinking, content or "")[0] == reply
    assert join("a", "<think>a</think>5") == ("<think>a</think>5", "")
    assert join("a", "<answer>5</answer>") == ("<think>\na\n</think>\n\n5", "<answer>")
    assert join("a", "<answer>5</answer> b") == ("<think>\na\n</think>\n\n<answer>5</answer> b", "")


def test_what_else_a_row_says(read):
    row = {"prompt": "q", "output": "a", "uid": 7, "domain": "math", "answer": 5, "finish_reason": "length"}
    ((found,), notes) = read(row)
    assert (found.uid, found.domain, found.answer, found.answers[0].finish_reason) == ("7", "math", "5", "length")
    assert notes == []
    ((bare,), _) = read({"prompt": "q", "output": "a"})
    assert (bare.uid, bare.domain, bare.answer, bare.answers[0].finish_reason) == (None, None, None, "unknown")
    assert bare.where.endswith("f.jsonl:1")


def test_the_system_message_of_the_recipe_is_for_rows_without_one(read):
    rows, _ = read({"prompt": "q"}, {"prompt": "q", "system": "own"}, answers=False, system="be brief")
    assert [row.messages[0]["content"] for row in rows] == ["be brief", "own"]


def test_fields_for_tokens_are_handed_over_untouched_or_named(read):
    logprobs = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97]}]}
    row = {"prompt": "q", "output": "a", "logprobs": logprobs, "token_ids": [1]}
    ((found,), notes) = read(row, tokens=True)
    assert found.answers[0].tokens == {"logprobs": logprobs, "token_ids": [1]}
    assert notes == []
    ((found,), notes) = read(row)
    assert found.answers[0].tokens == {}
    assert notes == ["f: not read: logprobs, token_ids, of 1 rows"]
    _, notes = read({"prompt": "q", "generations": ["a", "b"], "token_ids": [[1], [2]]}, tokens=True)
    assert notes == ["f: not read: token_ids of rows with several answers, of 1 rows"]


# --- what changes the meaning is read, refused by name, or counted ---------------------------------------

CALLS = {"role": "assistant", "content": "I call.", "tool_calls": [{"id": "1"}]}
REFUSED = {
    "two answers in a row": (
        {"messages": [*OPENAI, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "messages[1] and messages[2] are both the assistant's; one answer follows a question",
    ),
    "calls of tools": ({"messages": [*OPENAI, CALLS]}, "messages[1] has tool_calls, which are not read"),
    "results of tools": (
        {"messages": [*OPENAI, {"role": "tool", "content": "x"}]},
        "messages[1]: role = 'tool'; calls of tools are not read",
    ),
    "tools of a row": (
        {"prompt": "q", "output": "a", "tools": [{"name": "x"}]},
        "has tools, which changes what the row means and is not read; map what you need, or pass it over with"
        " columns = { ignore = ['tools'] }",
    ),
    "history": (
        {"instruction": "q", "output": "a", "history": [["x", "y"]]},
        "has history, which changes what the row means",
    ),
    "a text that the question is about": (
        {"question": "q", "context": "Once.", "output": "a"},
        "has context, which changes what the row means and is not read; map what you need, or pass it over with"
        " columns = { ignore = ['context'] }",
    ),
    "answers to choose from": (
        {"question": "q", "options": ["1", "2"], "choices": {"A": "1", "B": "2"}, "output": "a"},
        "has options, which changes what the row means",
    ),
    "preferences": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "has chosen, rejected, which change what"),
    "another question": (
        {"prompt": "the prompt", "messages": [{"role": "user", "content": "other"}], "output": "a"},
        "has different questions in messages and prompt; name the one to read: columns = { prompt = 'messages' }",
    ),
    "another answer": (
        {"prompt": "q", "completion": "a", "response": "b"},
        "has different answers in completion and response; name the one to read: columns = { completion ="
        " 'completion' }",
    ),
    "another answer at the end": (
        {"messages": [*OPENAI, {"role": "assistant", "content": "2"}], "generations": ["3", "4"]},
        "has different answers in messages and generations; name the one to read",
    ),
    "another system message": (
        {"system": "x", "messages": [{"role": "system", "content": "y"}, *OPENAI], "output": "a"},
        "system is another system message than that of messages",
    ),
    "two thinkings": (
        {"messages": [*OPENAI, {"role": "assistant", "content": "<think>b</think>2", "reasoning": "a"}]},
        "its thinking is in a field of its own and, another one, in <think> of the answer",
    ),
    "two fields of thinking": (
        {"messages": [*OPENAI, {"role": "assistant", "content": "2", "reasoning": "a", "thinking": "b"}]},
        "messages[1] has two fields with different thinking",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content has a part of type 'image_url'; only text and thinking are read",
    ),
    "half a weight": (
        {"messages": [*OPENAI, {"role": "assistant", "content": "2", "weight": 0.5}]},
        "messages[1].weight = 0.5; only 0 and 1 are read",
    ),
    "a weight of a row": ({"prompt": "q", "output": "a", "weight": 2}, "weight = 2; only 0 and 1 are read"),
    "an unknown role": ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0]: role = 'critic'; should be"),
    "an answer that is a list": (
        {"prompt": "q", "output": "a", "answer": ["1", "2"]},
        "answer = ['1', '2']; it must be text or a number",
    ),
    "an answer that is true": ({"prompt": "q", "output": "a", "answer": True}, "answer = True; it must be text"),
    "an answer that is NaN": ({"prompt": "q", "output": "a", "answer": float("nan")}, "answer = nan; it must be text"),
    "a question that is a number": ({"prompt": 5, "output": "a"}, "prompt = 5; it must be text"),
    "an empty answer": ({"prompt": "q", "completion": " "}, "has an empty answer"),
    "no answer": ({"prompt": "q"}, "has no answer; a row needs `completion`, `output` or `response`"),
    "the reference for the answer": ({"question": "q", "answer": "a"}, "has no answer; a row needs `completion`"),
    "text where messages are due": ({"messages": "hello"}, "messages = 'hello'; it must be a list of {role, content}"),
    "one message without a list": (
        {"messages": {"role": "assistant", "content": "hello"}},
        "messages = {'role': 'assistant', 'content': 'hello'}; it must be a list of {role, content}",
    ),
    "a message for a text": (
        {"prompt": {"role": "assistant", "content": "x"}, "output": "a"},
        "prompt = {'role': 'assis",
    ),
    "the question elsewhere": ({"input": "-", "output": "a"}, "input = '-': the question is in another data set"),
    "thousands of columns": ({f"c{i}\n": 1 for i in range(2000)}, "has 'c0\\n', 'c1\\n', "),
    "a string among messages": ({"messages": ["hello"]}, "messages[0] = 'hello'; a message has role and content"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_the_meaning_is_refused_by_name(fault, case):
    row, message = REFUSED[case]
    refused = fault(row)
    assert refused.startswith(message)
    assert len(refused) < 600


def test_what_may_be_passed_over_is(read):
    row = {"category": "math", "reasoning": "on", "generator": "g", "tools": ["x"], "messages": OPENAI, "uuid": "u"}
    ((found,), notes) = read(row, columns=Columns(ignore=["tools"]), answers=False)
    assert found.uid == "u", "what the format passes over stays passed over"
    ((found,), notes) = read({"prompt": "q", "output": "a", "tools": ["x"]}, columns=Columns(ignore=["tools"]))
    assert completions(found) == ["a"] and notes == []


def test_an_answer_of_weight_0_is_left_out_and_counted(read):
    skipped = {"messages": [*OPENAI, {"role": "assistant", "content": "2", "weight": 0}]}
    context = {
        "messages": [
            *skipped["messages"],
            {"role": "user", "content": "And 2+2?"},
            {"role": "assistant", "content": "4"},
        ]
    }
    rows, notes = read(skipped, {"prompt": "q", "output": "a", "weight": 0}, context)
    assert [completions(row) for row in rows] == [["4"]]
    assert notes == [
        "f: earlier answers are part of the question in 1 rows",
        "f: 2 left out: weight = 0",
    ]


def test_what_is_not_read_is_one_line_of_a_file(read):
    _, notes = read(
        {"prompt": "q", "output": "a", "source": "x", "difficulty": 3},
        {"prompt": "r", "output": "b", "source": "x"},
        {
            "messages": [
                {"role": "user", "content": "s", "info": {}, "name": "Ann"},
                {"role": "assistant", "content": "c"},
            ]
        },
    )
    of_messages = "messages[user].info (1 rows), messages[user].name (1 rows)"
    assert notes == [f"f: not read: {of_messages}, source (2 rows), difficulty (1 rows), of 3 rows"]


def test_an_answer_in_a_file_of_questions_is_named(read):
    (row,), notes = read({"messages": [*OPENAI, {"role": "assistant", "content": "2"}]}, answers=False)
    assert question(row) == ASK
    assert notes == ["f: not read: the answer at the end of the conversation, of 1 rows"]
    _, notes = read({"prompt": "q", "output": "a", "tool_calls": [1]}, answers=False)
    assert notes == ["f: not read: output, tool_calls, of 1 rows"], "they change nothing of a question"


# --- maps --------------------------------------------------------------------------------------------------


def test_paths_into_a_row():
    assert parse_path("a.b[0].c") == ("a", "b", 0, "c")
    assert parse_path("messages[user].info") == ("messages", "user", "info")
    assert isinstance(parse_path("messages[user]")[1], Role)
    assert parse_path("my column[-1]") == ("my column", -1)
    for path in ("", ".a", "a..b", "a.", "[0]", "a[0]b", "a]", "a[", "a[x y]"):
        with pytest.raises(ValueError, match="should be a path like"):
            parse_path(path)


def test_a_map_of_columns(read):
    row = {"problem": "1+1?", "trace": "one and one", "attempt": "2", "solution": "2.", "meta": {"id": [5]}, "x": 1}
    columns = {
        "prompt": "problem",
        "thinking": "trace",
        "completion": "attempt",
        "answer": "solution",
        "uid": "meta.id[0]",
    }
    ((found,), notes) = read(row, columns=Columns(**columns))
    assert (question(found), completions(found), found.answer, found.uid) == (ASK, [THOUGHT], "2.", "5")
    assert notes == ["f: not read: x, of 1 rows"]


def test_a_map_can_take_messages_apart(read):
    row = {"chat": [{"role": "user", "content": "1+1?", "info": {"gold": 2}}, {"role": "assistant", "content": "2"}]}
    columns = Columns(prompt="chat[user]", completion="chat[assistant]", answer="chat[human].info.gold")
    ((found,), _) = read(row, columns=columns)
    assert (question(found), completions(found), found.answer) == (ASK, ["2"], "2")
    row["chat"].insert(0, row["chat"][0])
    with pytest.raises(DataError, match=r"chat\[user\]: 2 messages are of this role; name one by its position, \[0\]"):
        read(row, columns=columns)


def test_what_changes_the_question_is_a_fault_of_a_question_too_unless_it_is_mapped_or_passed_over(read, fault):
    row = {"question": "q", "context": "Once."}
    assert fault(row, answers=False).startswith("has context, which changes what the row means")
    ((found,), notes) = read(row, answers=False, columns=Columns(prompt=["context", "question"]))
    assert (question(found), notes) == ([("user", "Once.\n\nq")], [])
    ((found,), notes) = read(row | {"context": ""}, answers=False)
    assert (question(found), notes) == ([("user", "q")], [])
    ((found,), notes) = read(row, answers=False, columns=Columns(ignore=["context"]))
    assert (question(found), notes) == ([("user", "q")], [])


def test_positions_of_a_list_that_the_map_does_not_name_are_not_read(read):
    row = {"q": "1+1?", "choices": [{"text": "2"}, {"text": "3"}, {"text": "4"}]}
    for paths, note in (
        (["choices[0].text"], ["f: not read: choices but for [0], of 1 rows"]),
        (["choices[0].text", "choices[-1].text"], ["f: not read: choices but for [-1], [0], of 1 rows"]),
        (["choices[0].text", "choices[1].text", "choices[-1].text"], []),
    ):
        ((found,), notes) = read(row, columns=Columns(prompt="q", completion=paths))
        assert (len(found.answers), notes) == (len(paths), note)
        assert read(row, columns=Columns(prompt="q", completion=paths), answers=False)[1] == []


def test_what_the_map_reads_of_a_message_is_read(read):
    chat = [
        {"role": "user", "content": "1+1?", "info": {"gold": 2}, "id": 7},
        {"role": "assistant", "content": "2", "info": {}},
    ]
    for path in ("messages[human].info.gold", "messages[0].info.gold"):
        ((found,), notes) = read({"messages": chat}, columns=Columns(prompt="messages", answer=path))
        assert found.answer == "2"
        assert notes == ["f: not read: messages[user].id, messages[assistant].info, of 1 rows"]


def test_a_map_beside_names_that_are_known_changes_only_its_part(read):
    row = {"prompt": "1+1?", "output": "2", "gold": "two", "tags": {"kind": "sums"}}
    ((found,), notes) = read(row, columns=Columns(answer="gold", domain="tags.kind"))
    assert (completions(found), found.answer, found.domain, notes) == (["2"], "two", "sums", [])
    ((found,), _) = read(
        {"problem": "q", "answer": "5", "generations": ["a"], "is_reasoning_complete": [True], "correctness": [False]},
        format="openr1-math",
        columns=Columns(keep="is_reasoning_complete"),
    )
    assert completions(found) == ["a"]


def test_several_answers_with_flags_and_reasons(read):
    row = {
        "q": "1+1?",
        "texts": ["2", "3", "", "4"],
        "ok": [True, False, True, None],
        "why": ["stop", "x", None, "length"],
    }
    columns = Columns(prompt="q", completion="texts", keep="ok", finish_reason="why")
    ((found,), notes) = read(row, columns=columns)
    assert [(a.completion, a.finish_reason) for a in found.answers] == [("2", "stop"), ("4", "length")]
    assert notes == ["f: 1 left out: ok = false", "f: 1 left out: empty answers"]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"q": "x", "a": ["1"], "ok": [True, False]}, {"keep": "ok"}, "ok has 2 values for 1 answers"),
        ({"q": "x", "a": ["1"], "ok": ["yes"]}, {"keep": "ok"}, "ok = 'yes'; it must be true or false"),
        ({"q": "x", "a": ["1"], "t": ["2", "3"]}, {"thinking": "t"}, "has 1 answers, but 2 thinkings"),
        ({"q": "x", "a": "1", "m": "text"}, {"answer": "m.gold"}, "m.gold: 'text' has no 'gold'"),
        ({"q": "x", "a": "1", "m": {"b": 1}}, {"answer": "m[0]"}, "m[0]: {'b': 1} is no list"),
        ({"q": "x", "a": "1", "reasoning": "r"}, {}, "has reasoning, which changes what the row means"),
    ],
)
def test_maps_that_do_not_fit_a_row(fault, row, columns, message):
    assert fault(row, columns=Columns(prompt="q", completion="a", **columns)).startswith(message)


def test_a_map_that_names_a_column_that_no_row_has(read, tmp_path):
    for name in ("answer", "domain", "keep", "prompt"):
        with pytest.raises(DataError) as error:
            read(
                {"q": "x", "a": "1"},
                columns=Columns(**{"prompt": "q", "completion": "a", name: "anwser"}),
                max_faulty=9,
            )
        assert f"{tmp_path}/f.jsonl: columns name 'anwser', which no row has; rows have a, q" in str(error.value)


def test_only_some_rows(read):
    rows = [
        {"prompt": "q", "output": str(i), "kind": kind, "calls": calls}
        for i, (kind, calls) in enumerate([("a", None), ("b", []), ("a", ["x"]), ("a", "")])
    ]
    found, notes = read(*rows, columns=Columns(only={"kind": "a", "calls": ""}))
    assert [completions(row) for row in found] == [["0"], ["3"]]
    assert notes == ["f: 1 left out: kind is not 'a'", "f: 1 left out: calls is not ''"]


def test_wrong_options_are_one_line_each():
    for options, message in (
        ({"format": "openr1"}, "Reading.format = 'openr1': did you mean 'openr1-math'?"),
        ({"format": "xyz"}, "Reading.format = 'xyz': should be 'auto', 'messages', "),
        ({"columns": {"prompt": "a..b"}}, "Reading.columns.prompt = 'a..b': should be a path like 'problem', "),
        ({"columns": {"completion": ["a", 3]}}, "Reading.columns.completion[1] = 3: should be a valid string"),
        ({"columns": {"promt": "a"}}, "Reading.columns.promt: unknown key; did you mean 'prompt'?"),
        ({"columns": {"only": {"a": [1]}}}, "Reading.columns.only: a = [1]: should be text, a number, true or false"),
        ({"max_faulty": -1}, "Reading.max_faulty = -1: should be greater than or equal to 0"),
    ):
        with pytest.raises(ConfigError) as error:
            Reading(**options)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


# --- any row at all ------------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "q", "<think>a</think>b", "user"])
)
MESSAGE_KEYS = st.sampled_from(
    ["role", "content", "from", "value", "reasoning", "thinking", "weight", "tool_calls", "type", "text", "info"]
)
MESSAGES = st.dictionaries(MESSAGE_KEYS, SCALARS | st.sampled_from(["assistant", "gpt", "system", "text"]), max_size=4)
VALUES = st.recursive(
    SCALARS | MESSAGES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(MESSAGE_KEYS, inner)
)
ANY_ROW = st.dictionaries(
    st.sampled_from(sorted(KNOWN | {column for p in PRESETS.values() for column in p.signature})), VALUES, max_size=6
)


@settings(max_examples=200, deadline=None)
@given(row=ANY_ROW, name=st.sampled_from(["auto", *PRESETS]), answers=st.booleans())
def test_any_row_is_read_or_a_fault_of_one_line(row, name, answers):
    meaning = Meaning(Reading(format=name), answers=answers, tokens=True, system="s")
    try:
        found = meaning.read("f:1", row)
    except Fault as fault:
        assert str(fault) and "\n" not in str(fault)
        return
    except LeftOut:
        assert meaning.left_out
        return
    assert found.messages[-1]["role"] == "user" and found.messages[-1]["content"].strip()
    assert all(isinstance(m[key], str) for m in found.messages for key in ("role", "content"))
    assert bool(found.answers) == answers
    assert all(isinstance(answer.completion, str) and answer.completion.strip() for answer in found.answers)
    assert all(isinstance(value, str | None) for value in (found.uid, found.domain, found.answer))


def test_a_path_of_the_map_that_leads_nowhere_in_any_row_is_a_fault(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "a", "meta": {"gold": 1}}\n{"prompt": "b", "meta": {}}\n')
    assert [p.answer for p in read_prompts(file, columns={"answer": "meta.gold"})] == ["1", None]
    with pytest.raises(DataError, match=r"q\.jsonl: columns name 'meta\.nope', which no row has"):
        read_prompts(file, columns={"answer": "meta.nope"})
