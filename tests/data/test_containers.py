"""Files and where they are: the same rows from every container, every fault of a file at once, and no traceback."""

import csv
import gzip
import json
import random
import shutil
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dasd_lite.config.reading import Columns, Reading
from dasd_lite.data.formats.containers import rows_of
from dasd_lite.data.formats.read import RowFiles
from dasd_lite.data.formats.sources import find
from dasd_lite.data.manifest import fingerprint
from dasd_lite.errors import DataError

ROWS = [{"prompt": f'q{i} é漢🙂\n"x", y', "output": f"a{i}"} for i in range(600)]


def all_rows(*places, **options):
    files = RowFiles([str(place) for place in places], Reading(**options), answers=True)
    rows = list(files)
    return rows, files.finish()


def texts(*places, **options):
    return [(row.messages[-1]["content"], row.answers[0].completion) for row in all_rows(*places, **options)[0]]


def refusal(place, **options):
    with pytest.raises(DataError) as error:
        all_rows(place, **options)
    return str(error.value).replace(str(place), "F").splitlines()


def write(path, rows=ROWS):
    """Write rows as the name of the file says."""
    first = path.name.split(".")[1]
    if first == "jsonl":
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    elif first == "json":
        content = json.dumps(rows, indent=1).encode()
    elif first in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if first == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        content = path.read_bytes()
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=250)
        content = path.read_bytes()
    if path.suffix == ".gz":
        half = len(content) // 2
        content = gzip.compress(content[:half]) + gzip.compress(content[half:])  # as `cat a.gz b.gz` makes
    elif path.suffix == ".zst":
        half = len(content) // 2
        content = b"".join(pa.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_the_same_rows_from_every_container(tmp_path, kind, compression):
    path = write(tmp_path / f"f.{kind}{compression}")
    assert texts(path) == [(row["prompt"], row["output"]) for row in ROWS]


def test_where_a_row_is(tmp_path):
    rows = ROWS[:3]
    wheres = {}
    for kind in ("jsonl", "json", "csv", "parquet"):
        path = write(tmp_path / f"f.{kind}", rows)
        wheres[kind] = [row.where.removeprefix(str(path)) for row in all_rows(path)[0]]
    assert wheres["jsonl"] == [":1", ":2", ":3"]
    assert wheres["json"] == wheres["parquet"] == [" row 0", " row 1", " row 2"]
    assert wheres["csv"] == [":2", ":4", ":6"], "a cell has a line break"


def test_names_in_capitals_and_a_byte_order_mark(tmp_path):
    (tmp_path / "F.JSONL").write_bytes(
        b'\xef\xbb\xbf{"prompt": "q", "output": "a"}\r\n\r\n{"prompt": "r", "output": "b"}'
    )
    assert texts(tmp_path / "F.JSONL") == [("q", "a"), ("r", "b")]


def test_an_array_in_a_file_of_lines_and_lines_in_a_file_of_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('[{"prompt": "q", "output": "a"},\n {"prompt": "r", "output": "b"}]\n')
    (tmp_path / "b.json").write_text('{"prompt": "q", "output": "a"}\n{"prompt": "r", "output": "b"}\n')
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "b.json") == [("q", "a"), ("r", "b")]


# --- places ---------------------------------------------------------------------------------------------


def test_folders_and_patterns(tmp_path):
    (tmp_path / "data" / "b").mkdir(parents=True)
    for name in ("data/2.jsonl", "data/1.jsonl", "data/b/3.jsonl"):
        write(tmp_path / name, [{"prompt": name, "output": "a"}])
    (tmp_path / "data" / "README.md").write_text("# mine")
    (tmp_path / "data" / ".cache.jsonl").write_text("nonsense")

    def names(place):
        return [file.path.relative_to(tmp_path).as_posix() for file in find(str(tmp_path / place)).files]

    assert names("data") == ["data/1.jsonl", "data/2.jsonl", "data/b/3.jsonl"]
    assert names("data/*.jsonl") == ["data/1.jsonl", "data/2.jsonl"]
    assert names("data/**/*.jsonl") == ["data/1.jsonl", "data/2.jsonl", "data/b/3.jsonl"]
    assert names("data/[12].jsonl") == ["data/1.jsonl", "data/2.jsonl"]
    (tmp_path / "odd[1].jsonl").write_text('{"prompt": "q", "output": "a"}')
    assert names("odd[1].jsonl") == ["odd[1].jsonl"], "a file's own name is no pattern"
    write(tmp_path / "data" / "x.parquet")
    for place, words in (
        ("data/*.csv", "data/*.csv: no file matches"),
        ("gone.jsonl", "gone.jsonl: no such file"),
        ("data", "data: has files that end in .jsonl, .parquet; name one kind, as "),
    ):
        with pytest.raises(DataError) as error:
            find(str(tmp_path / place))
        assert words in str(error.value)


def test_places_are_all_looked_at_before_any_is_read(tmp_path):
    with pytest.raises(DataError) as error:
        RowFiles([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], Reading(), answers=True)
    assert [line.rpartition("/")[2] for line in str(error.value).splitlines()] == [
        "a.jsonl: no such file",
        "b.jsonl: no such file",
    ]


def test_the_fingerprint_of_a_place_is_that_of_its_files(tmp_path):
    a, b = write(tmp_path / "1.jsonl", ROWS[:1]), write(tmp_path / "2.jsonl", ROWS[1:2])
    both = find(str(tmp_path)).fingerprint
    assert both == find(f"{tmp_path}/*.jsonl").fingerprint
    assert len({both, find(str(a)).fingerprint, find(str(b)).fingerprint}) == 3
    write(b, ROWS[2:3])
    assert find(str(tmp_path)).fingerprint != both


def test_a_folder_that_a_stage_wrote_is_one_place(finished, tmp_path):
    low = finished / "run" / "low"
    source = find(str(low / "sample"))
    assert [file.path for file in source.files] == [low / "sample"]
    assert source.fingerprint == fingerprint(low / "sample")
    with pytest.raises(DataError, match=r"low/select: has kept, rejected; name the folder of sample, ingest or mix"):
        find(str(low / "select"))
    shutil.copytree(low / "sample", tmp_path / "sample")
    shard = tmp_path / "sample" / "rollouts-00000.parquet"
    assert texts(shard) == texts(tmp_path / "sample")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "rollouts-00000.parquet: has " in refusal(tmp_path / "sample")[0]
    shard.unlink()
    assert "rollouts-00000.parquet: is missing; the manifest says " in refusal(tmp_path / "sample")[0]
    (tmp_path / "sample" / "manifest.json").rename(tmp_path / "sample" / "unfinished.json")
    with pytest.raises(DataError, match="sample: the folder is unfinished; run its stage again"):
        find(str(tmp_path / "sample"))


def test_a_manifest_of_another_kind_makes_no_folder_of_a_stage(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"name": "mine"}')
    write(tmp_path / "data" / "rollouts-1.jsonl", [{"prompt": "q", "output": "a"}])
    with pytest.raises(DataError, match=r"data: has files that end in \.json, \.jsonl; name one kind"):
        find(str(tmp_path / "data"))
    assert texts(tmp_path / "data" / "*.jsonl") == [("q", "a")]


# --- faults ---------------------------------------------------------------------------------------------


def test_all_faults_of_a_file_at_once(tmp_path):
    lines = ['{"prompt": "q", "output": "a"}', "nonsense", '{"prompt": 5, "output": "a"}'] * 50
    (tmp_path / "f.jsonl").write_text("\n".join(lines))
    refused = refusal(tmp_path / "f.jsonl")
    assert refused[:3] == [
        "F:2: not JSON: Expecting value at column 1",
        "F:3: prompt = 5; it must be text",
        "F:5: not JSON: Expecting value at column 1",
    ]
    assert len(refused) == 21
    assert refused[-1] == "F: and 80 more rows that cannot be read"


def test_the_faults_of_all_files_at_once(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("nonsense\n" * 30)
    refused = refusal(f"{tmp_path}/*.jsonl")
    assert len(refused) == 42
    assert sum("and 10 more rows" in line for line in refused) == 2


def test_faulty_rows_that_may_be_left_out_are_counted(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "q", "output": "a"}\nnonsense\n{"prompt": "r", "output": null}')
    rows, notes = all_rows(path, max_faulty=2)
    assert len(rows) == 1
    first, second = [note.replace(str(path), "F") for note in notes]
    assert first == "left out: F:2: not JSON: Expecting value at column 1"
    assert second.startswith("left out: F:3: has no answer; a row needs `completion`, `output` or `response`, or ")
    assert len(refusal(path, max_faulty=1)) == 2


BAD_LINES = {
    "a number of 5,000 digits": (
        b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}",
        "a number has more than 4,300 digits",
    ),
    "brackets 100,000 deep": (b'{"prompt": "a", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than"),
    "an open bracket 100,000 times": (b"[" * 100_000, "nested more than"),
    "an infinite answer": (b'{"prompt": "q", "output": "a", "answer": Infinity}', None),
    "a bare NUL": (b'{"prompt": "a\x00"}', "Invalid control character"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8: byte 0xff at column 1"),
    "a number": (b"5", "'5' is not a JSON object"),
    "null": (b"null", "'None' is not a JSON object"),
    "a string": (b'"x"', "'x' is not a JSON object"),
    "an object that goes on": (b'{\n"prompt": "a"}', "a file of JSON has one object on each line, or one list"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_one_line(tmp_path, case):
    line, words = BAD_LINES[case]
    (tmp_path / "f.jsonl").write_bytes(line)
    if words is None:
        assert texts(tmp_path / "f.jsonl") == [("q", "a")]
        return
    first = refusal(tmp_path / "f.jsonl")[0]
    assert first.startswith("F") and words in first, first


def test_nan_and_large_numbers_where_nothing_is_read(tmp_path):
    (tmp_path / "f.jsonl").write_text(
        '{"prompt": "q", "output": "a", "x": NaN, "y": 1e999, "z": 123456789012345678901234}'
    )
    assert texts(tmp_path / "f.jsonl") == [("q", "a")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,a\n1,2\n", "F:1: the header has 'a', 'a'; each needs its own name"),
        ("prompt,output\nq,a\nq\n", "F:3: has 1 cells, but the header has 2"),
        ("prompt,output\nq,a\nq,a,b\n", "F:3: has 3 cells, but the header has 2"),
        ('prompt,output\nq,a\n"q,a\n', "F:3: not CSV: unexpected end of data"),
        ("prompt,output\nq,\n", "F:2: has no answer"),
        (b"prompt,output\nq,\xff\n", "F:2: output: not UTF-8: byte 0xff"),
    ],
)
def test_faults_of_csv(tmp_path, content, message):
    (tmp_path / "f.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(tmp_path / "f.csv")[0].startswith(message)


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.jsonl.zst", "f.csv.gz", "f.json.zst", "f.parquet", "f.parquet.gz"])
def test_files_that_are_cut_off_or_of_another_kind(tmp_path, name):
    path = write(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert refusal(path)[-1].startswith("F")
    path.write_bytes(b"no such container" * 100)
    assert refusal(path)[0].startswith("F: ")


def test_flipped_bits_are_a_line_or_change_a_text(tmp_path):
    """No bit makes a traceback, whatever container it is in."""
    rng = random.Random(0)
    for name in ("f.jsonl", "f.json", "f.csv", "f.parquet", "f.jsonl.gz", "f.jsonl.zst"):
        path = write(tmp_path / name, ROWS[:40])
        whole = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(rng.choice((1, 1, 8))):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                all_rows(path)
            except DataError as error:
                assert all(line.startswith(str(path)) for line in str(error).splitlines())


# --- Parquet --------------------------------------------------------------------------------------------


def test_only_the_columns_that_are_read_are_read(tmp_path):
    odd = {
        "when": pa.array([10**18 * 9, 1], pa.timestamp("ns")),
        "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
        "big": pa.array([b"\xff", None], pa.binary()),
        "empty": pa.nulls(2),
        "dictionary": pa.array(["x", "y"]).dictionary_encode(),
        "decimal": pa.array([None, Decimal("1.25")]),
    }
    pq.write_table(pa.table({"prompt": ["q", "r"], "output": ["a", "b"], **odd}), tmp_path / "f.parquet")
    seen = []

    def wanted(names):
        seen.extend(names)
        return ["prompt", "output"]

    rows = [row for _, row in rows_of(tmp_path / "f.parquet", "f", wanted)]
    assert rows == [{**dict.fromkeys(odd), "prompt": p, "output": o} for p, o in (("q", "a"), ("r", "b"))]
    assert set(seen) == {"prompt", "output", *odd}
    _, notes = all_rows(tmp_path / "f.parquet")
    assert notes[0].endswith("not read: when, map, big, empty, dictionary, decimal, of 2 rows")


def test_types_of_parquet_columns_that_are_read(tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["q", "r"]).dictionary_encode(),
            "output": pa.array([b"a", b"b"], pa.large_binary()),
            "answer": pa.array([4.0, None]),
            "uid": pa.array([7, 8], pa.int16()),
        }
    )
    pq.write_table(table, tmp_path / "f.parquet")
    first, second = all_rows(tmp_path / "f.parquet")[0]
    assert (first.answers[0].completion, first.answer, first.uid) == ("a", "4.0", "7")
    assert (second.answer, second.uid) == (None, "8")


def test_a_column_of_a_type_that_means_nothing_there(tmp_path):
    when = pa.array([10**18, None], pa.timestamp("ns"))
    pq.write_table(pa.table({"prompt": ["q", "r"], "output": ["a", "b"], "answer": when}), tmp_path / "f.parquet")
    (line,) = refusal(tmp_path / "f.parquet")
    assert line.startswith("F row 0: answer")
    pq.write_table(pa.table({"prompt": [1, 2], "output": ["a", "b"]}), tmp_path / "f.parquet")
    assert refusal(tmp_path / "f.parquet") == [f"F row {i}: prompt = {i + 1}; it must be text" for i in (0, 1)]


def test_numbers_for_tokens_stay_arrays(tmp_path):
    schema = pa.schema([("prompt", pa.string()), ("output", pa.string()), ("logprobs", pa.list_(pa.float32()))])
    rows = [{"prompt": "q", "output": "a", "logprobs": [-0.5, None]}, {"prompt": "r", "output": "b", "logprobs": None}]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "f.parquet")
    files = RowFiles([str(tmp_path / "f.parquet")], Reading(), answers=True, tokens=True)
    first, second = files
    values = first.answers[0].tokens["logprobs"]
    assert values.dtype == np.float32 and values[0] == -0.5 and np.isnan(values[1])
    assert second.answers[0].tokens == {}
    assert files.finish() == []


def test_a_map_reads_its_columns_of_parquet(tmp_path):
    rows = [{"a": {"b": [{"c": "q"}, {"c": "x"}]}, "d": "text", "e": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    ((row,), notes) = all_rows(tmp_path / "f.parquet", columns=Columns(prompt="a.b[0].c", completion="d"))
    assert (row.messages[0]["content"], row.answers[0].completion) == ("q", "text")
    assert notes[0].endswith("not read: a.b but for [0], e, of 1 rows")
