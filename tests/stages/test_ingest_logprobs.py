"""Log-probabilities that come with answers: the published pair, other sources, and a run's own rollouts."""

import json
import shutil
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.published import CASES, FINAL, THINK, Published, deepseek, write_published

from dasd_lite.config.models import Endpoint, Transformers
from dasd_lite.config.stages import IngestConfig, ScoreConfig
from dasd_lite.data.dataset import read_table
from dasd_lite.data.manifest import read_manifest
from dasd_lite.data.records import ROLLOUT
from dasd_lite.errors import CheckpointError, ConfigError, DataError
from dasd_lite.stages.ingest import ingest
from dasd_lite.stages.score import score


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Published:
    return write_published(tmp_path_factory.mktemp("published"))


def rollouts(out):
    return {row["uid"]: row for row in read_table(out, "rollouts").to_pylist()}


def config_of(published, **options):
    paths = {
        "paths": [str(published.sft)],
        "logprobs": [str(published.logprobs)],
        "tokenizer": str(published.tokenizer),
    }
    return IngestConfig(**(paths | options))


def spelled(row):
    """The text of each token."""
    raw = row["completion"].encode()
    ends = np.cumsum([len(raw) - sum(row["token_bytes"]), *row["token_bytes"]])
    return [raw[a:b].decode() for a, b in pairwise(ends)]


def test_the_published_pair_is_joined_and_aligned_or_counted_by_reason(published, tmp_path, capsys):
    result = ingest(config=config_of(published), out=tmp_path / "ingest")
    rows = rollouts(tmp_path / "ingest")
    assert len(rows) == len(CASES) == result.counts["rollouts"]
    assert result.counts["prompts"] == len(CASES) - 1, "one question occurs twice"
    for case in CASES:
        row, given = rows[published.uuid(case)], published.rows.get(published.uuid(case))
        if case.becomes != "aligned":
            assert row["token_ids"] is row["logprobs"] is row["token_bytes"] is None, case.name
            continue
        assert row["token_ids"] == given["token_ids"], case.name
        assert row["logprobs"] == given["logprobs"], case.name
        opener, text = row["completion"][:8].rstrip(THINK[0]), "".join(spelled(row))
        assert opener + text == row["completion"], case.name
        assert opener.strip() == "<think>"
        if case.end:
            assert row["token_bytes"][-1] == 0, "the end token"
    reasons = Counter(case.becomes for case in CASES)
    aligned = reasons.pop("aligned")
    assert result.counts["logprobs"] == {"aligned": aligned, "reasons": dict(reasons), "without_answer": 1}
    printed = " ".join(capsys.readouterr().err.split())
    assert f"{aligned} answers have log-probabilities, {len(CASES) - aligned} have none: " in printed
    assert "1 rows of log-probabilities belong to no answer" in printed
    assert f"{published.sft}:7: tokens spell" in printed or f"{published.sft}:7: from byte" in printed


def test_answers_without_log_probabilities_can_be_left_out(published, tmp_path):
    result = ingest(config=config_of(published, require_logprobs=True), out=tmp_path / "ingest")
    rows = rollouts(tmp_path / "ingest")
    assert set(rows) == {published.uuid(case) for case in CASES if case.becomes == "aligned"}
    assert result.counts["rollouts"] == len(rows) == result.counts["logprobs"]["aligned"]
    assert sum(result.counts["logprobs"]["reasons"].values()) == len(CASES) - len(rows)
    same_question = [
        row["index"] for row in rows.values() if row["prompt_uid"] == rows[published.uuid(CASES[0])]["prompt_uid"]
    ]
    assert same_question == [0, 1]


def test_the_order_of_the_files_and_their_kind_change_nothing(published, tmp_path):
    ingest(config=config_of(published), out=tmp_path / "shuffled")
    rows = [json.loads(line) for line in published.logprobs.read_text().splitlines()]
    rows.sort(key=lambda row: row["sample_uuid"])
    pq.write_table(pa.Table.from_pylist(rows[:4]), tmp_path / "0.parquet")
    (tmp_path / "1.jsonl").write_text("\n".join(map(json.dumps, rows[4:])))
    paths = [str(tmp_path / "0.parquet"), str(tmp_path / "1.jsonl")]
    result = ingest(config=config_of(published, logprobs=paths), out=tmp_path / "sorted")
    assert rollouts(tmp_path / "sorted") == rollouts(tmp_path / "shuffled")
    assert result.counts == read_manifest(tmp_path / "shuffled")["counts"]


def test_with_a_limit_the_rest_of_the_log_probabilities_is_not_read(published, tmp_path):
    result = ingest(config=config_of(published, limit=2), out=tmp_path / "ingest")
    assert result.counts["logprobs"] == {"aligned": 2, "reasons": {}, "without_answer": 0}


def test_the_tokenizer_is_the_teacher_s_unless_another_is_named(published, tmp_path):
    without = {"paths": [str(published.sft)], "logprobs": [str(published.logprobs)]}
    result = ingest(config=IngestConfig(**without), out=tmp_path / "none")
    assert result.counts["logprobs"]["reasons"]["token ids without a tokenizer"] == len(published.rows)
    for number, teacher in enumerate(
        (
            Transformers(model=str(published.tokenizer)),
            Endpoint(
                kind="endpoint", model="t", base_urls=["http://localhost:1/v1"], tokenizer=str(published.tokenizer)
            ),
        )
    ):
        result = ingest(config=IngestConfig(**without), out=tmp_path / str(number), teacher=teacher)
        assert result.counts["logprobs"]["aligned"] == 6
        assert "tokenizer" in result.manifest["inputs"]
    with pytest.raises(ConfigError, match=r"ingest\.tokenizer: model = 'gone': no such folder"):
        ingest(config=config_of(published, tokenizer="gone"), out=tmp_path / "gone")
    with pytest.raises(DataError, match=r"ingest\.logprobs: .*gone: no such file"):
        ingest(config=config_of(published, logprobs=[str(tmp_path / "gone")]), out=tmp_path / "gone")


def test_changed_log_probabilities_are_read_again_and_another_tokenizer_is_refused(published, tmp_path):
    paths = {"logprobs": [str(tmp_path / "l.jsonl")]}
    (tmp_path / "l.jsonl").write_text(published.logprobs.read_text())
    ingest(config=config_of(published, **paths), out=tmp_path / "ingest")
    uuid = published.uuid(CASES[0])
    changed = published.rows[uuid] | {"logprobs": [-0.125] * len(published.rows[uuid]["logprobs"])}
    (tmp_path / "l.jsonl").write_text(json.dumps(changed))
    result = ingest(config=config_of(published, **paths), out=tmp_path / "ingest")
    assert rollouts(tmp_path / "ingest")[uuid]["logprobs"] == changed["logprobs"]
    assert (result.counts["logprobs"]["aligned"], result.counts["rollouts"]) == (1, len(CASES))
    (tmp_path / "a.jsonl").write_text(published.sft.read_text().replace(FINAL, "The sum is 8."))
    assert ingest(config=config_of(published, paths=[str(tmp_path / "a.jsonl")], **paths), out=tmp_path / "ingest")
    assert rollouts(tmp_path / "ingest")[uuid]["completion"] == CASES[0].output.replace(FINAL, "The sum is 8.")
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(published.tokenizer, tokenizer)
    given = json.loads((tokenizer / "tokenizer.json").read_text())
    given["model"]["merges"].pop()
    (tokenizer / "tokenizer.json").write_text(json.dumps(given))
    with pytest.raises(CheckpointError, match="tokenizer has changed"):
        ingest(config=config_of(published, tokenizer=str(tokenizer), **paths), out=tmp_path / "ingest")


def entries(pieces):
    return [{"token": piece, "logprob": -0.5, "bytes": list(piece.encode())} for piece in pieces]


def test_log_probabilities_beside_the_answer(tmp_path):
    chat = deepseek(tmp_path / "tokenizer")
    ids = chat.encode(FINAL).tolist()
    pieces = ["We", " try", ".", "\n", "</think>", "\n\n", "It", " is", " 7", ".", "<|im_end|>"]
    message = {"role": "assistant", "reasoning_content": "We try.", "content": "It is 7."}
    rows = [
        {"prompt": "a", "output": FINAL, "token_ids": ids, "logprobs": [-0.25] * len(ids)},
        {"prompt": "b", "output": FINAL, "token_ids": ids, "token_logprobs": [-0.25] * len(ids)},
        {"messages": [{"role": "user", "content": "c"}, message], "logprobs": {"content": entries(pieces)}},
        {"prompt": "d", "output": "So 7", "logprobs": [-0.5, -0.25], "token_bytes": [2, 2]},
        {"prompt": "e", "output": "So 7", "logprobs": [-0.5, 0.25], "token_bytes": [2, 2]},
        {"prompt": "f", "output": "So 7"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    result = ingest(path, out=tmp_path / "ingest", tokenizer=str(tmp_path / "tokenizer"))
    assert result.counts["logprobs"] == {"aligned": 4, "reasons": {"a log-probability above 0": 1}}
    a, b, c, d, e, f = read_table(tmp_path / "ingest", "rollouts").to_pylist()
    for row in (a, b):
        assert (row["token_ids"], row["logprobs"]) == (ids, [-0.25] * len(ids))
        assert spelled(row) == [chat.piece(i).decode() for i in ids]
    assert c["token_ids"] is None
    assert spelled(c) == [*pieces[:-1], ""]
    assert (d["token_bytes"], d["logprobs"]) == ([2, 2], [-0.5, -0.25])
    assert e["logprobs"] is f["logprobs"] is None


def test_an_answer_in_channels_is_aligned_with_its_tokens(tmp_path):
    between = ["<|end|>", "<|start|>", "assistant", "<|channel|>", "final", "<|message|>"]
    pieces = ["<|channel|>", "analysis", "<|message|>", "We", " try.", *between, "It is", " 7.", "<|return|>"]
    row = {"prompt": "q", "output": "".join(pieces), "logprobs": {"content": entries(pieces)}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    ingest(tmp_path / "a.jsonl", out=tmp_path / "ingest")
    (found,) = read_table(tmp_path / "ingest", "rollouts").to_pylist()
    assert found["completion"] == "<think>\nWe try.\n</think>\n\nIt is 7."
    right = ["", "", "<think>\n", "We", " try.", "", "", "", "", "", "\n</think>\n\n", "It is", " 7.", ""]
    assert spelled(found) == right


def test_a_run_s_own_rollouts_come_back_unchanged_and_score_the_same(finished, demo, tmp_path):
    """Ids, log-probabilities and bytes are those that sample wrote; so are all numbers that score makes of them."""
    sampled = finished / "run" / "low" / "sample"
    result = ingest(sampled, out=tmp_path / "ingest")
    before, after = (read_table(folder, "rollouts").to_pylist() for folder in (sampled, tmp_path / "ingest"))
    assert after == before
    assert result.counts["logprobs"] == {"aligned": len(before), "reasons": {}}
    student = Transformers(model=str(demo / "student"))
    for name, folder in (("before", sampled), ("after", tmp_path / "ingest")):
        score(folder, student, ScoreConfig(), out=tmp_path / name)
    scores = [read_table(tmp_path / name, "scores").to_pylist() for name in ("before", "after")]
    np.testing.assert_equal(scores[1], scores[0])


def test_mixed_answers_of_a_run_come_back_unchanged_the_student_s_part_as_the_student_s(finished, tmp_path):
    mixed = finished / "run" / "mixed" / "mix"
    result = ingest(mixed, out=tmp_path / "ingest")
    before, after = (read_table(folder, "rollouts").to_pylist() for folder in (mixed, tmp_path / "ingest"))
    assert after == before
    assert all(row["prefix_bytes"] > 0 and row["num_tokens"] and row["max_tokens"] for row in after)
    assert result.counts["logprobs"] == {"aligned": len(before), "reasons": {}}


OWN = {
    "prompt_uid": "q",
    "messages": [{"role": "user", "content": "q"}],
    "domain": "all",
    "answer": None,
    "completion": "<think>So</think> 7",
    "finish_reason": "stop",
    "prefix_bytes": 0,
    "num_tokens": 3,
    "max_tokens": 9,
    "token_ids": None,
    "logprobs": None,
    "token_bytes": None,
}


def write_own(path, *rows):
    own = [OWN | {"uid": str(n), "index": n} | row for n, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(own, schema=ROLLOUT), path)
    return own


def test_whatever_a_stage_writes_comes_back_unchanged(tmp_path):
    """Tags as they are, the same text twice, answers that were left out after errors, tokens without some columns."""
    left_out = {"completion": "", "finish_reason": "error", "num_tokens": None, "logprobs": [], "token_bytes": []}
    rows = write_own(
        tmp_path / "a.parquet",
        {"completion": "<think>a</think> <answer>4</answer>"},
        {"index": 5},
        {"uid": "twice"},
        left_out,
        left_out,
        {"completion": "é🙂ü", "prefix_bytes": 6, "logprobs": [-0.5, -0.25], "token_bytes": [2, 0]},
        {"completion": "é🙂ü", "prefix_bytes": 2, "token_ids": [4]},
        {"completion": " 7", "prefix_bytes": 2, "logprobs": [-0.5], "token_bytes": [0], "token_ids": [1]},
    )
    result = ingest(tmp_path / "a.parquet", out=tmp_path / "ingest")
    assert read_table(tmp_path / "ingest", "rollouts").to_pylist() == rows
    assert "duplicates" not in result.counts
    twice = ingest([tmp_path / "a.parquet"] * 2, out=tmp_path / "twice")
    assert (twice.counts["rollouts"], twice.counts["duplicates"]) == (len(rows), len(rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prefix_bytes": 20}, "prefix_bytes = 20; it must be where a character of the 19 bytes ends"),
        ({"completion": "é", "prefix_bytes": 1}, "prefix_bytes = 1; it must be where a character of the 2 bytes ends"),
        ({"max_tokens": -1}, "max_tokens = -1; it must be a whole number of at least 0"),
    ],
)
def test_a_prefix_that_cannot_be_one_is_a_fault(tmp_path, row, message):
    write_own(tmp_path / "a.parquet", row)
    with pytest.raises(DataError) as error:
        ingest(tmp_path / "a.parquet", out=tmp_path / "ingest")
    assert str(error.value).endswith(f"a.parquet row 0: {message}")


def test_tokens_that_do_not_begin_right_behind_the_prefix_are_counted(tmp_path):
    """An opener that a template writes is at the beginning of an answer; behind a prefix no byte may be missing."""
    tokens = {"logprobs": [-0.5], "token_bytes": [2]}
    rows = {"completion": "ab cd", "prefix_bytes": 2}, {"completion": " cd"}
    write_own(tmp_path / "a.parquet", *(tokens | row for row in rows))
    result = ingest(tmp_path / "a.parquet", out=tmp_path / "ingest")
    assert result.counts["logprobs"] == {"aligned": 1, "reasons": {"the tokens spell another text": 1}}
    wrong, right = read_table(tmp_path / "ingest", "rollouts").to_pylist()
    assert (wrong["logprobs"], right["logprobs"], wrong["prefix_bytes"]) == (None, [-0.5], 2)


def test_score_says_what_to_do_about_answers_without_log_probabilities(published, demo, tmp_path):
    ingest(config=config_of(published), out=tmp_path / "ingest")
    student = Transformers(model=str(demo / "student"))
    with pytest.raises(DataError, match=r"has no teacher log-probabilities.*ingest\.require_logprobs = true"):
        score(tmp_path / "ingest", student, ScoreConfig(), out=tmp_path / "score")


def test_a_teacher_that_scores_ingested_answers_reads_their_text_not_their_ids(finished, demo, tmp_path):
    """The ids may be another model's, or begin behind a header; their log-probabilities would be wrong in silence."""
    rows = read_table(finished / "run" / "low" / "sample", "rollouts").to_pylist()[:4]
    for name, shift in (("right", 0), ("wrong", 1)):
        given = [{**row, "token_ids": [max(3, i - shift) for i in row["token_ids"]]} for row in rows]
        pq.write_table(pa.Table.from_pylist(given), tmp_path / f"{name}.parquet")
        ingest(tmp_path / f"{name}.parquet", out=tmp_path / name / "ingest")
        student, teacher = (Transformers(model=str(demo / who)) for who in ("student", "teacher"))
        config = ScoreConfig(by="teacher")
        score(tmp_path / name / "ingest", student, config, out=tmp_path / name / "score", teacher=teacher)
    right, wrong = (read_table(tmp_path / name / "score", "scores").to_pylist() for name in ("right", "wrong"))
    keys = [[row.pop("key") for row in rows] for rows in (right, wrong)]
    assert all(one != other for one, other in zip(*keys, strict=True)), "a key is a hash of the ids too"
    np.testing.assert_equal(wrong, right)
