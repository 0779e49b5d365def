"""Log-probabilities in files of their own: found by uuid, whatever their order, and read once."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dasd_lite.data.formats.sources import SourceFile
from dasd_lite.data.logprobs import Partners, read_tokens
from dasd_lite.errors import DataError


def rows(number):
    return [
        {"sample_uuid": f"u{n}", "token_ids": [n, n + 1, 200_002], "logprobs": [-0.5 * n, -1.0, 0.0]}
        for n in range(number)
    ]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceFile(path, str(path))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("order", ["same", "reversed", "shuffled"])
def test_each_answer_gets_its_row_whatever_the_order(tmp_path, form, order):
    theirs = rows(200)
    if order == "reversed":
        theirs.reverse()
    if order == "shuffled":
        random.Random(0).shuffle(theirs)
    files = [write(tmp_path / f"{i}.{form}", theirs[i * 100 : i * 100 + 100]) for i in range(2)]
    with Partners(files, tmp_path) as partners:
        for n in range(200):
            tokens = partners.take(f"u{n}")
            assert tokens["token_ids"].tolist() == [n, n + 1, 200_002]
            assert tokens["logprobs"].tolist() == [-0.5 * n, -1.0, 0.0]
            assert (tokens["token_ids"].dtype, tokens["logprobs"].dtype) == (np.int32, np.float32)
        assert (tmp_path / "logprobs.tmp").exists() == (order != "same"), "in the same order nothing has to wait"
        assert partners.num_left() == 0 and partners.num_read == 200
    assert not (tmp_path / "logprobs.tmp").exists()


def test_rows_without_an_answer_and_answers_without_a_row(tmp_path):
    with Partners([write(tmp_path / "a.jsonl", rows(10))], tmp_path) as partners:
        assert partners.take("u3") is not None
        assert partners.take("nobody") is None
        assert partners.take("u3") is None, "a row belongs to one answer"
        assert partners.take("u1") is not None
        assert partners.num_left() == 8


def test_a_uuid_that_occurs_twice_is_given_out_twice_in_order(tmp_path):
    twice = [{**row, "sample_uuid": "u"} for row in rows(3)]
    with Partners([write(tmp_path / "a.jsonl", [*rows(1), *twice])], tmp_path) as partners:
        assert partners.take("nobody") is None
        assert [partners.take("u")["token_ids"][0] for _ in range(3)] == [0, 1, 2]
        assert partners.take("u") is None
        assert partners.num_left() == 1


def test_whoever_stops_early_has_not_read_the_rest(tmp_path):
    with Partners([write(tmp_path / "a.jsonl", rows(100))], tmp_path) as partners:
        partners.take("u4")
        assert partners.num_read == 5


@pytest.mark.parametrize("key", ["sample_uuid", "uuid", "uid", "id"])
def test_names_of_the_uuid(tmp_path, key):
    path = write(tmp_path / "a.jsonl", [{key: 7, "logprobs": [-1.0]}])
    assert [uuid for uuid, _ in read_tokens(path)] == ["7"]


def test_what_is_no_list_of_numbers_is_kept_for_who_judges_it(tmp_path):
    given = [
        {"logprobs": [-1.0, None], "token_ids": [1 << 40]},
        {"logprobs": {"content": []}, "token_ids": [1.5]},
        {"logprobs": [[-1.0], [-1.0, -2.0]], "token_ids": []},
        {"logprobs": "none"},
    ]
    file = write(tmp_path / "a.jsonl", [{"uuid": "u", **row} for row in given])
    assert [tokens for _, tokens in read_tokens(file)] == given
    file.path.write_text('{"uuid": "u", "logprobs": [NaN, -1e300]}\n')
    ((_, tokens),) = read_tokens(file)
    assert np.isnan(tokens["logprobs"][0]) and np.isneginf(tokens["logprobs"][1])


def test_null_cells_of_a_parquet_file(tmp_path):
    given = [{"uuid": "a", "token_ids": [1, 2], "logprobs": None}, {"uuid": "b", "token_ids": None, "logprobs": [-1.0]}]
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "a.parquet")
    (a, first), (b, second) = read_tokens(SourceFile(tmp_path / "a.parquet", "a.parquet"))
    assert (a, list(first), first["token_ids"].tolist()) == ("a", ["token_ids"], [1, 2])
    assert (b, list(second), second["logprobs"].tolist()) == ("b", ["logprobs"], [-1.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"sample_uuid": "u"}\n{"token_ids": [1]}\n', r"a\.jsonl:2: has token_ids; .* needs 'sample_uuid'"),
        (b'{"sample_uuid": "u"}\n\n{"token_ids": [1\n', r"a\.jsonl:3: not JSON"),
        (b"1\n", r"a\.jsonl:1: '1' is not a JSON object"),
        (b'{"uuid": "\xff"}\n', r"a\.jsonl:1: not UTF-8: byte 0xff"),
    ],
)
def test_a_bad_row_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with (
        pytest.raises(DataError, match=message),
        Partners([SourceFile(tmp_path / "a.jsonl", "a.jsonl")], tmp_path) as partners,
    ):
        partners.take("nobody")
    assert not (tmp_path / "logprobs.tmp").exists()


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file"):
        list(read_tokens(SourceFile(tmp_path / "a.parquet", "a.parquet")))
