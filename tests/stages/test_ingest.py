"""Rollouts that were not sampled here: what ingest accepts; which of a student's answers have room in mix."""

import json

import pyarrow.parquet as pq
import pytest
from tests.grown import grown
from tests.server import ChatServer

from dasd_lite.config.models import Endpoint, Transformers
from dasd_lite.config.stages import IngestConfig, ScoreConfig
from dasd_lite.data.dataset import read_table
from dasd_lite.data.manifest import fingerprint, read_manifest
from dasd_lite.data.seeds import digest
from dasd_lite.errors import DataError
from dasd_lite.stages import ingest, score, select
from dasd_lite.stages.mix import _teacher_chat, _with_room


@pytest.fixture
def run(tmp_path):
    """`run([row, …], [row, …])` ingests a file for each list; a row may be bytes."""

    def ingest_files(*files, out="ingest", **options):
        paths = []
        for i, rows in enumerate(files):
            paths.append(tmp_path / f"{i}.jsonl")
            lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
            paths[-1].write_bytes(b"\n".join(lines))
        ingest.ingest(config=IngestConfig(paths=paths), out=tmp_path / out, **options)
        return read_table(tmp_path / out, "rollouts").to_pylist()

    return ingest_files


def test_every_accepted_form_of_a_row(run, tmp_path):
    first, second, third = run(
        [
            {"input": "q", "output": "<think>a</think> 5", "domain": "math", "answer": 5, "finish_reason": "stop"},
            {"prompt": "r", "output": "b", "uid": 7},
        ],
        [{"messages": [{"role": "user", "content": "s"}, {"role": "assistant", "content": "c 🙂"}]}],
        system="be brief",
    )
    assert (first["completion"], first["domain"], first["answer"]) == ("<think>a</think> 5", "math", "5")
    assert (first["finish_reason"], second["finish_reason"]) == ("stop", "unknown")
    assert (second["uid"], third["completion"]) == ("7", "c 🙂")
    assert [m["content"] for m in third["messages"]] == ["be brief", "s"]
    for row in (first, second, third):
        assert row["logprobs"] is row["token_ids"] is row["token_bytes"] is None, "unknown values stay null"
        assert row["prefix_bytes"] == 0
    assert read_manifest(tmp_path / "ingest")["counts"] == {"prompts": 3, "rollouts": 3}


def test_answers_to_the_same_question_are_its_candidates(run):
    rows = run([{"input": "q", "output": str(n)} for n in range(3)], [{"input": "q", "output": "x"}])
    assert len({row["prompt_uid"] for row in rows}) == 1
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert len({row["uid"] for row in rows}) == 4


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"input": "q"}, ["has no answer", "`output`"]),
        ({"input": "q", "output": ""}, ["has no answer"]),
        ({"input": "q", "output": 5}, ["output = 5; it must be text"]),
        ({"messages": [{"role": "user", "content": "s"}]}, ["has no answer", "end with the assistant"]),
        ({"output": "x"}, ["has output; a row needs `prompt` or `messages`"]),
        (b'{"input": "q"', ["not JSON"]),
        (b'{"input": "\xff"}', ["not UTF-8"]),
    ],
)
def test_a_bad_row_is_one_line_and_the_same_call_succeeds_once_it_is_fixed(run, tmp_path, bad, words):
    good = {"input": "q", "output": "same"}
    with pytest.raises(DataError) as error:
        run([good, bad])
    assert str(error.value).startswith(f"{tmp_path}/0.jsonl:2: ")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "ingest" / "manifest.json").exists()
    assert len(run([good, {"input": "q", "output": "other"}])) == 2


def test_the_same_answer_again_is_left_out_and_counted(run, tmp_path, capsys):
    first = {"input": "q", "output": "a", "uid": "x"}
    rows = run([first, first | {"uid": "y"}, {"input": "q", "output": "b"}], [{"prompt": "q", "completion": "a"}])
    assert next((row["uid"], row["completion"], row["index"]) for row in rows) == ("x", "a", 0)
    assert [row["completion"] for row in rows] == ["a", "b"]
    counts = read_manifest(tmp_path / "ingest")["counts"]
    assert counts == {"prompts": 1, "rollouts": 2, "duplicates": 2}
    assert capsys.readouterr().err == "note: 2 left out: the same answer to the same question again\n"


def test_a_uid_that_two_answers_have(run, tmp_path):
    with pytest.raises(DataError) as error:
        run([{"input": "q", "output": str(i), "uid": "x"} for i in range(25)])
    first, *_, last = str(error.value).replace(str(tmp_path), "").splitlines()
    assert first == "/0.jsonl:2: same uid 'x' as /0.jsonl:1, but another answer; uids must be unique"
    assert last == "/0.jsonl: and 4 more rows that cannot be read"


def test_several_answers_of_a_row(run, tmp_path):
    row = {"problem": "q", "answer": "5", "uuid": "u", "generations": ["a", "b", "c"], "messages": []}
    rows = run([row | {"is_reasoning_complete": [True, False, True]}])
    assert [(r["uid"], r["index"], r["completion"], r["answer"]) for r in rows] == [
        ("u-0", 0, "a", "5"),
        ("u-1", 1, "c", "5"),
    ]
    counts = read_manifest(tmp_path / "ingest")["counts"]
    assert counts == {"prompts": 1, "rollouts": 2, "left out: is_reasoning_complete = false": 1}
    assert len(run([row | {"is_reasoning_complete": [True, False, True]}], limit=1, out="less")) == 1


def test_rollouts_of_a_stage_are_taken_as_they_are(run, tmp_path):
    rows = run([{"input": "q", "output": str(n), "domain": "math", "answer": 5} for n in range(3)])
    ingest.ingest(tmp_path / "ingest", out=tmp_path / "again")
    assert read_table(tmp_path / "again", "rollouts").to_pylist() == rows


def test_of_a_folder_that_has_grown_the_table_is_taken_not_what_lies_in_its_shards(tmp_path):
    """A question less, another reference answer, and an answer that was cut off and made again under one uid."""
    folder = grown(tmp_path / "grown")
    assert sum(pq.read_metadata(path).num_rows for path in folder.glob("rollouts-*.parquet")) == 4
    ingest.ingest(folder, out=tmp_path / "again")
    rows = read_table(tmp_path / "again", "rollouts").to_pylist()
    assert rows == read_table(folder, "rollouts").to_pylist()
    assert [(row["uid"], row["completion"], row["answer"]) for row in rows] == [
        ("b", "<think>b</think> all of it", "new"),
        ("c", "<think>c</think> all of it", "new"),
    ]
    assert read_manifest(tmp_path / "again")["inputs"] == {"paths": digest([fingerprint(folder)])}


def test_log_probabilities_are_not_passed_over_in_silence(run, capsys):
    rows = run([{"input": "q", "output": "a", "logprobs": [-0.5]}, {"input": "r", "output": "b"}])
    assert [row["logprobs"] for row in rows] == [None, None]
    assert "1 have none: log-probabilities without tokens 1 (the first is" in " ".join(capsys.readouterr().err.split())


def test_a_format_and_a_map_are_part_of_the_identity(run):
    rows = [{"a": "q", "b": "x", "c": "y"}]
    assert run(rows, columns={"prompt": "a", "completion": "b"})[0]["completion"] == "x"
    with pytest.raises(Exception, match=r"made with another configuration \(columns\.completion: b there, c now"):
        run(rows, columns={"prompt": "a", "completion": "c", "ignore": ["b"]})


def test_files_that_are_missing_or_empty(run, tmp_path):
    with pytest.raises(DataError, match=r"ingest\.paths: .*gone\.jsonl: no such file"):
        ingest.ingest(config=IngestConfig(paths=[tmp_path / "gone.jsonl"]), out=tmp_path / "ingest")
    with pytest.raises(DataError, match=r"0\.jsonl: no rows$"):
        run([])
    assert not (tmp_path / "ingest" / "manifest.json").exists()


def test_more_rows_than_a_batch(run):
    rows = run([{"input": f"q{n}", "output": "a"} for n in range(600)])
    assert [row["messages"][0]["content"] for row in rows] == [f"q{n}" for n in range(600)]


def test_a_changed_file_is_read_again(run):
    assert len(run([{"input": "q", "output": "a"}])) == 1
    rows = run([{"input": "q", "output": "a"}, {"input": "q", "output": "b"}])
    assert [row["completion"] for row in rows] == ["a", "b"]


def test_scoring_without_log_probabilities_names_the_alternatives(run, tmp_path, demo):
    run([{"input": "q", "output": "a", "uid": "the one"}])
    student = Transformers(model=str(demo / "student"))
    with pytest.raises(
        DataError, match=r"ingest: rollout the one has no teacher log-probabilities.*'likelihood'.*'random' or 'all'"
    ):
        score.score(tmp_path / "ingest", student, ScoreConfig(), out=tmp_path / "score")
    assert not (tmp_path / "score" / "manifest.json").exists()


def test_rules_that_need_the_student_alone_take_answers_without_log_probabilities(run, tmp_path, demo):
    run([{"input": f"q{n}", "output": f"<think> {n} </think> {m}"} for n in range(4) for m in ("4", "xyz zyx")])
    student = Transformers(model=str(demo / "student"))
    scores = score.score(tmp_path / "ingest", student, out=tmp_path / "score", student_alone=True)
    rows = scores.to_table().to_pylist()
    assert {row["teacher_mean_logprob"] for row in rows} == {None}
    assert all(row["rank_sum"] > 0 and row["surprisal_sum"] > 0 and row["student_mean_logprob"] < 0 for row in rows)
    chosen = {}
    for rule in ("likelihood", "rsr"):
        kept = select.select(tmp_path / "ingest", student, out=tmp_path / rule, scores=scores, rule=rule)
        chosen[rule] = {row["uid"]: row["score"] for row in kept.to_table().to_pylist()}
    pairs = [(rows[i], rows[i + 1]) for i in range(0, len(rows), 2)]
    best = [max(pair, key=lambda row: row["student_mean_logprob"]) for pair in pairs]
    assert chosen["likelihood"] == {row["uid"]: pytest.approx(row["student_mean_logprob"]) for row in best}
    ratio = [min(pair, key=lambda row: row["rank_sum"] / row["surprisal_sum"]) for pair in pairs]
    assert chosen["rsr"] == {row["uid"]: pytest.approx(-row["rank_sum"] / row["surprisal_sum"]) for row in ratio}
    with pytest.raises(DataError, match=r"8 of 8 rollouts were scored by the student alone, the first is .*'count'"):
        select.select(tmp_path / "ingest", student, out=tmp_path / "count", scores=scores, rule="count")


# --- mix ----------------------------------------------------------------------------------------------


def test_a_server_that_later_reports_another_context_does_not_change_the_plan(demo, tmp_path):
    """Positions in the journal must mean the same rollouts when the command resumes, even without the server."""
    cut = [({"messages": [{"role": "user", "content": "Zq? " * n}]}, "<think> 1") for n in range(1, 20)]
    with ChatServer(habits=["vllm"]) as server:
        server.context = 60
        teacher = Endpoint(kind="endpoint", model="teacher", base_urls=[server.url], tokenizer=str(demo / "teacher"))
        first = _with_room(cut, teacher, _teacher_chat(teacher), tmp_path)
    assert 0 < len(first) < len(cut)
    assert _with_room(cut, teacher, _teacher_chat(teacher), tmp_path) == first
    (tmp_path / "new").mkdir()
    assert len(_with_room(cut, teacher, _teacher_chat(teacher), tmp_path / "new")) > len(first), (
        "without the stored context"
    )


def test_when_every_row_is_left_out_the_reasons_are_said(run):
    silent = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    with pytest.raises(DataError, match=r"every row is left out: .*weight.* 2$"):
        run([silent, silent])
