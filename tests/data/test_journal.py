"""The journal: in any order of commits, closed and reopened at any time, it holds what a dict would."""

import contextlib
import itertools
import json
import shutil
import sqlite3

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_lite.data import dataset
from dasd_lite.data.dataset import shards
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import Identity, read_manifest
from dasd_lite.data.writer import ShardWriter
from dasd_lite.errors import DataError

SCHEMA = pa.schema([("uid", pa.string()), ("values", pa.large_list(pa.float32())), ("text", pa.large_string())])
IDENTITY = Identity("stage", 1, {}, {})
ROWS = st.fixed_dictionaries(
    {
        "uid": st.text(st.characters(codec="utf-8"), max_size=8),
        "values": st.none() | st.lists(st.floats(width=32, allow_nan=False), max_size=4),
        "text": st.none() | st.text(st.characters(codec="utf-8"), max_size=20),
    }
)


def open_journal(folder, total, shard_items=3):
    return Journal(folder, IDENTITY, SCHEMA, total, table="rows", shard_items=shard_items)


def plain(n):
    return {"uid": str(n), "values": [float(n)], "text": "é" * n}


def finish(folder, rows, shard_items):
    """Commit all rows at once and in order."""
    with open_journal(folder, len(rows), shard_items) as journal:
        journal.commit(dict(enumerate(rows)))
        journal.publish({})
    return folder


@st.composite
def histories(draw):
    rows = draw(st.lists(ROWS, max_size=11))
    order = draw(st.permutations(range(len(rows))))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    groups = [order[a:b] for a, b in itertools.pairwise([0, *cuts, len(rows)])]
    return rows, groups, draw(st.lists(st.booleans(), min_size=len(groups), max_size=len(groups)))


@settings(max_examples=25, deadline=None)
@given(history=histories(), shard_items=st.integers(1, 6))
def test_any_order_and_any_reopening_give_the_rows_of_a_dict(tmp_path_factory, history, shard_items):
    rows, groups, reopen = history
    base = tmp_path_factory.mktemp("j")
    model = {}
    journal = open_journal(base / "f", len(rows), shard_items)
    for group, closed in zip(groups, reopen, strict=True):
        journal.commit({position: rows[position] for position in group})
        model |= {position: rows[position] for position in group}
        assert journal.done() == set(model)
        if closed:
            journal.close()
            journal = open_journal(base / "f", len(rows), shard_items)
            assert journal.done() == set(model)
    journal.publish({"rows": len(rows)})
    stored = [row for path in shards(base / "f", "rows") for row in pa.parquet.read_table(path).to_pylist()]
    assert stored == [model[position] for position in sorted(model)]
    assert {path.name for path in (base / "f").iterdir()} == {
        "manifest.json",
        "timing.json",
        *(path.name for path in shards(base / "f", "rows")),
    }
    straight = finish(base / "g", rows, shard_items)
    for one, other in zip(shards(base / "f", "rows"), shards(straight, "rows"), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_complete_shard_is_written_and_its_items_leave_sqlite(tmp_path):
    with open_journal(tmp_path / "f", 7) as journal:
        journal.commit({0: plain(0), 2: plain(2), 3: plain(3)})
        assert not list((tmp_path / "f").glob("*.parquet"))
        journal.commit({1: plain(1)})
        assert [path.name for path in (tmp_path / "f").glob("*.parquet")] == ["rows-00000.parquet"]
        with sqlite3.connect(tmp_path / "f" / "journal.sqlite") as db:
            assert [n for (n,) in db.execute("SELECT position FROM items")] == [3]
        db.close()
        journal.commit({4: plain(4), 6: plain(6), 5: plain(5)})
        journal.publish({})
    assert [shard["rows"] for shard in read_manifest(tmp_path / "f")["tables"]["rows"]] == [3, 3, 1]


def test_an_unrecorded_shard_is_written_again(tmp_path):
    """Killed between renaming a shard and recording it: the items are still in SQLite, so the file is deleted."""
    with open_journal(tmp_path / "f", 5) as journal:
        journal.commit({3: plain(3), 0: plain(0), 1: plain(1)})
    (tmp_path / "f" / "rows-00000.parquet").write_bytes(b"no record of it")
    (tmp_path / "f" / "rows-00001.parquet.tmp").write_bytes(b"half")
    with open_journal(tmp_path / "f", 5) as journal:
        assert journal.done() == {0, 1, 3}
        assert not list((tmp_path / "f").glob("rows-*"))
        journal.commit({2: plain(2), 4: plain(4)})
        journal.publish({})
    straight = finish(tmp_path / "g", [plain(n) for n in range(5)], 3)
    for one, other in zip(shards(tmp_path / "f", "rows"), shards(straight, "rows"), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_complete_shard_that_was_not_written_is_written_when_reopened(tmp_path):
    folder = tmp_path / "f"
    with open_journal(folder, 4, shard_items=100) as journal:
        journal.commit({n: plain(n) for n in (2, 0, 1)})
    with open_journal(folder, 4, shard_items=3) as journal:  # as if the kill came before the shard
        assert [path.name for path in folder.glob("*.parquet")] == ["rows-00000.parquet"]
        assert journal.done() == {0, 1, 2}


def test_a_copy_of_the_folder_after_any_commit_can_be_resumed(tmp_path):
    """A copy is what a power failure leaves on the disk."""
    with open_journal(tmp_path / "f", 5) as journal:
        for n in (4, 1, 0, 2):
            journal.commit({n: plain(n)})
            shutil.copytree(tmp_path / "f", tmp_path / f"copy{n}")
    expected = finish(tmp_path / "g", [plain(n) for n in range(5)], 3)
    for n in (4, 1, 0, 2):
        with open_journal(tmp_path / f"copy{n}", 5) as journal:
            journal.commit({m: plain(m) for m in range(5) if m not in journal.done()})
            journal.publish({})
        assert [p.read_bytes() for p in shards(tmp_path / f"copy{n}", "rows")] == [
            p.read_bytes() for p in shards(expected, "rows")
        ]


def test_a_commit_is_all_or_nothing(tmp_path):
    with open_journal(tmp_path / "f", 4) as journal:
        journal.commit({1: plain(1)})
        with pytest.raises(sqlite3.IntegrityError):
            journal.commit({0: plain(0), 1: plain(1)})
        with pytest.raises(pa.ArrowInvalid):
            journal.commit({0: plain(0), 2: {"uid": "x", "values": ["no number"], "text": None}})
        assert journal.done() == {1}
        journal.commit({n: plain(n) for n in (0, 2, 3)})
        journal.publish({})


def test_publishing_too_early_reports_how_many_items_are_missing(tmp_path):
    with open_journal(tmp_path / "f", 7) as journal:
        journal.commit({n: plain(n) for n in range(4)})
        with pytest.raises(DataError, match=r"f: \d of 7 items are not done; run the same command to resume"):
            journal.publish({})
    assert not (tmp_path / "f" / "manifest.json").exists()


def test_a_commit_is_stored_at_once_and_survives_an_error(tmp_path):
    with open_journal(tmp_path / "f", 4) as journal, pytest.raises(KeyboardInterrupt):
        for number, stored in ((2, {2}), (0, {0, 2})):
            journal.commit({number: plain(number)})
            with contextlib.closing(sqlite3.connect(tmp_path / "f" / "journal.sqlite")) as db:
                assert {n for (n,) in db.execute("SELECT position FROM items")} == stored
        raise KeyboardInterrupt
    with open_journal(tmp_path / "f", 4) as journal:
        assert journal.done() == {0, 2}


def test_the_items_of_a_deleted_shard_are_open_again(tmp_path):
    with open_journal(tmp_path / "f", 4) as journal:
        journal.commit({n: plain(n) for n in range(4)})
    for path in (tmp_path / "f").glob("*.parquet"):
        path.unlink()
    with open_journal(tmp_path / "f", 4) as journal:
        assert journal.done() == set()


def test_an_error_while_writing_a_shard_is_passed_on(tmp_path):
    """The items of a shard that cannot be written are already committed and must not be committed again."""
    with open_journal(tmp_path / "f", 2) as journal:
        (tmp_path / "f" / "rows-00000.parquet.tmp").mkdir()
        with pytest.raises(OSError, match="rows-00000"):
            journal.commit({0: plain(0), 1: plain(1)})
    (tmp_path / "f" / "rows-00000.parquet.tmp").rmdir()
    with open_journal(tmp_path / "f", 2) as journal:
        assert journal.done() == {0, 1}
        journal.publish({})


def test_a_journal_without_items(tmp_path):
    finish(tmp_path / "f", [], 3)
    assert list(dataset.batches(tmp_path / "f", "rows")) == []


def test_the_shard_writer_starts_over_and_finishes_only_by_publishing(tmp_path):
    table = pa.RecordBatch.from_pylist([plain(1)], schema=SCHEMA)
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "f", IDENTITY, {"rows": SCHEMA}) as writer:
        writer.write("rows", table)
        raise RuntimeError
    assert not (tmp_path / "f" / "manifest.json").exists()
    with ShardWriter(tmp_path / "f", IDENTITY, {"rows": SCHEMA, "others": SCHEMA}) as writer:
        writer.write("others", table)
        writer.write("others", table.slice(0, 0))
        writer.publish({"n": 1}, tokens=3.0)
    assert dataset.read_table(tmp_path / "f", "others").to_pylist() == [plain(1)]
    assert read_manifest(tmp_path / "f")["tables"]["rows"] == []
    assert list(dataset.batches(tmp_path / "f", "rows")) == []
    assert json.loads((tmp_path / "f" / "timing.json").read_text())["tokens"] == 3.0
