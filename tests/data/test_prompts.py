"""Reading prompts: the forms that are accepted, and the one-line error for each mistake."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dasd_lite.data.prompts import Prompts, read_prompts
from dasd_lite.data.records import Prompt
from dasd_lite.data.seeds import digest
from dasd_lite.errors import ConfigError, DataError


@pytest.fixture
def write(tmp_path):
    """Write a file of prompts: `write(b"…")` or `write({"prompt": …}, …)`."""

    def written(*rows):
        path = tmp_path / "questions.jsonl"
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path.write_bytes(b"\n".join(lines))
        return path

    return written


def refusal(path, **options):
    with pytest.raises(DataError) as error:
        read_prompts(path, **options)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text.removeprefix(str(path))


def test_every_accepted_form_of_a_prompt(write):
    path = write(
        {"uid": 7, "prompt": "a", "answer": 5, "domain": "math"},
        {"input": "b", "output": "ignored here"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "c"}]},
        {"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]},
    )
    a, b, c, d = read_prompts(path, system="be brief")
    assert (a.uid, a.answer, a.domain) == ("7", "5", "math")
    assert a.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "a"})
    assert (b.domain, b.answer) == ("all", None)
    assert [m["content"] for m in c.messages] == ["s", "c"], "its own system prompt stays"
    assert [m["content"] for m in d.messages] == ["be brief", "d"], "the answer is not part of the prompt"
    assert len({b.uid, c.uid, d.uid}) == 3
    assert next(p.uid for p in read_prompts(path, limit=2)) == "7"
    assert len(read_prompts(path, limit=2)) == 2


def test_the_same_question_again_is_left_out_and_counted(write, capsys):
    prompts = read_prompts(
        write({"prompt": "a"}, {"prompt": "b", "uid": "x"}, {"prompt": "a"}, {"uid": "x", "prompt": "b"})
    )
    assert len(prompts) == 2
    assert prompts.left_out == {"duplicate questions": 2}
    assert capsys.readouterr().err.endswith("questions.jsonl: 2 left out: the same question again\n")
    assert len(read_prompts(write({"prompt": "a", "uid": "x"}, {"prompt": "a", "uid": "y"}))) == 2, (
        "with uids of their own"
    )


def test_the_name_of_a_prompt_leads_to_its_row(write):
    path = write({"prompt": "What is\n2 + 2?"}, {"prompt": "word " * 20}, {"prompt": "b", "uid": "x"})
    first, second, third = read_prompts(path)
    assert first.name == f'{path}:1 ("What is 2 + 2?")'
    assert second.name == f'{path}:2 ("word word word word word word word word …")'
    assert third.name == "x"
    bare = Prompt(digest([{"role": "user", "content": "a"}]), ({"role": "user", "content": "a"},), "all", None)
    assert bare.name == '"a"'


def test_the_fingerprint_is_that_of_the_questions(write, tmp_path):
    rows = [{"prompt": "a", "answer": 5}, {"prompt": "b"}]
    first = read_prompts(write(*rows)).fingerprint
    assert read_prompts(write(*({"source": "x"} | row for row in rows))).fingerprint == first, "a column more"
    pq.write_table(pa.Table.from_pylist([{"question": "a", "answer": "5"}, {"question": "b"}]), tmp_path / "q.parquet")
    assert read_prompts(tmp_path / "q.parquet").fingerprint == first, "another container"
    assert Prompts.of(list(read_prompts(write(*rows)))).fingerprint == first, "a list"
    assert read_prompts(write(*rows), limit=1).fingerprint == read_prompts(write(rows[0])).fingerprint != first
    assert read_prompts(write(*rows)).first(1).fingerprint == read_prompts(write(rows[0])).fingerprint
    assert read_prompts(write(rows[0], {"prompt": "b", "answer": "6"})).fingerprint != first


def test_a_map_of_columns(write):
    path = write({"problem": "a", "gold": {"value": 5}})
    (prompt,) = read_prompts(path, columns={"prompt": "problem", "answer": "gold.value"})
    assert (prompt.messages[0]["content"], prompt.answer) == ("a", "5")
    with pytest.raises(ConfigError, match=r"prompts\.colums: unknown key; did you mean 'columns'\?"):
        read_prompts(path, colums={})


def test_the_uid_of_a_prompt_depends_on_its_text_not_its_position(write):
    first = {p.messages[-1]["content"]: p.uid for p in read_prompts(write({"prompt": "a"}, {"prompt": "b"}))}
    second = {p.messages[-1]["content"]: p.uid for p in read_prompts(write({"prompt": "b"}, {"prompt": "a"}))}
    assert first == second
    assert read_prompts(write({"prompt": "a"}), system="s")[0].uid != first["a"]


def test_text_in_any_script_is_preserved(write):
    texts = ["漢字とかな", "🙂👨‍👩‍👧", "e\u0301 é", "a\r\nb", "a\u2028b", "עברית", "\x00"]
    path = write(*({"prompt": text} for text in texts))
    assert [p.messages[-1]["content"] for p in read_prompts(path)] == texts


def test_blank_lines_and_a_missing_final_newline_are_accepted(write):
    assert len(read_prompts(write(b'{"prompt": "a"}', b"", b"  ", b'{"prompt": "b"}'))) == 2


def test_parquet_and_jsonl_give_the_same_prompts(tmp_path, write):
    rows = [{"uid": "1", "prompt": "a", "answer": None}, {"uid": "2", "prompt": "b", "answer": "x"}]
    path = tmp_path / "questions.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert read_prompts(path).items == read_prompts(write(*rows)).items


@pytest.mark.parametrize(
    ("lines", "where", "words"),
    [
        ([], "", ["no prompts"]),
        ([b"", b"  "], "", ["no prompts"]),
        ([{"prompt": "a"}, b'{"prompt": "b"'], ":2", ["not JSON", "column"]),
        ([{"prompt": "a"}, b"", b"nonsense"], ":3", ["not JSON", "column 1"]),
        ([b'["prompt"]'], " row 0", ["is not a JSON object", '{"prompt": …}']),
        ([{"prompt": "a"}, b'{"prompt": "\xff"}'], ":2", ["not UTF-8", "0xff", "column 13"]),
        ([b'{"prompt": "a"}', b'{"prompt": "\\ud83d!"}'], ":2", ["not UTF-8", "\\ud83d"]),
        ([b'{"messages": [{"role": "user", "content": "\\uDE00"}]}'], ":1", ["not UTF-8", "\\ude00"]),
        ([{"prompt": "a"}, {"prompt": ""}], ":2", ["the prompt is empty", "a user's, with text"]),
        ([{"prompt": " \n\t"}], ":1", ["the prompt is empty"]),
        ([{"messages": []}], ":1", ["the prompt is empty"]),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], ":1", ["the prompt is empty"]),
        ([{"prompt": 3}], ":1", ["prompt = 3", "text"]),
        ([{"messages": "hello"}], ":1", ["messages = 'hello'", "list of {role, content}"]),
        ([{"messages": [{"role": "user"}]}], ":1", ["the prompt is empty"]),
        ([{"messages": ["user"]}], ":1", ["messages[0] = 'user'", "role and content"]),
        ([{"text": "a", "id": 3}], ":1", ["has text, id", "`prompt`"]),
        ([{}], ":1", ["has no keys", "`prompt`"]),
        (
            [{"uid": "x", "prompt": "a"}, {"prompt": "b"}, {"uid": "x", "prompt": "c"}],
            ":3",
            ["same uid 'x' as ", ":1; uids must be unique"],
        ),
        (
            [{"prompt": "a", "answer": 1}, {"prompt": "a", "answer": 2}],
            ":2",
            ["same question as ", ":1, but another answer"],
        ),
        ([{"uid": 5, "prompt": "a"}, {"uid": "5", "prompt": "b"}], ":2", ["same uid '5'"]),
    ],
)
def test_errors_name_file_line_and_value(write, lines, where, words):
    text = refusal(write(*lines))
    assert text.startswith(f"{where}:"), text
    for word in words:
        assert word in text, text


def test_files_that_cannot_be_read(tmp_path):
    assert "no such file" in refusal(tmp_path / "gone.jsonl")
    assert "no file ends in .jsonl" in refusal(tmp_path)
    assert "no file matches" in refusal(tmp_path / "*.jsonl")
    (tmp_path / "a.txt").write_text("prompt\nx\n")
    assert "ends in '.txt'; use .jsonl, .json, .csv or .parquet" in refusal(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert "not a Parquet file" in refusal(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"")
    assert "not a Parquet file" in refusal(tmp_path / "b.parquet")


def test_parquet_text_that_is_not_utf8_names_its_row(tmp_path):
    raw = pa.array([b"fine", b"\xff\xfe", b"fine"], pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"prompt": text}), tmp_path / "q.parquet")
    message = refusal(tmp_path / "q.parquet")
    assert message.startswith(" row 1: not UTF-8")


@pytest.mark.parametrize("limit", [0, -1, "3"])
def test_a_limit_is_at_least_1(write, limit):
    with pytest.raises(ConfigError, match=f"limit = {limit!r}: it must be an integer of at least 1"):
        read_prompts(write("q.jsonl", '{"prompt": "a"}'), limit=limit)


def test_reading_stops_at_the_limit(write):
    path = write({"prompt": "a"}, b"nonsense")
    assert len(read_prompts(path, limit=1)) == 1
    assert read_prompts(path, limit=1)[0].where == f"{path}:1"
