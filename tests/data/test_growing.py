"""A folder whose plan changes keeps the rows that are still asked for, and asks only for the rest."""

import shutil
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_lite.data import dataset
from dasd_lite.data import journal as journal_module
from dasd_lite.data.dataset import batches, num_rows, read_row, read_table
from dasd_lite.data.journal import Journal, read_counts
from dasd_lite.data.manifest import Identity, fingerprint, read_manifest
from dasd_lite.data.writer import is_finished
from dasd_lite.errors import CheckpointError, DataError

SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("text", pa.large_string()),
        ("answer", pa.string()),
        ("logprobs", pa.large_list(pa.float32())),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int64()),
        ("max_tokens", pa.int64()),
    ]
)
GROWS = ("config.keys", "config.limit")


def identity(keys, limit=None, **config):
    return Identity("sample", 1, {"keys": list(keys), "limit": limit, **config}, {}, grows=frozenset(GROWS))


def answer(key, limit=None, *, tokens=3, finish="stop", text=None):
    return {
        "uid": key,
        "text": f"text of {key}" if text is None else text,
        "answer": "old",
        "logprobs": [-1.0] * tokens,
        "finish_reason": finish,
        "num_tokens": tokens,
        "max_tokens": limit,
    }


def open_journal(folder, keys, limit=None, *, columns=None, shard_items=3, **config):
    return Journal(
        folder,
        identity(keys, limit, **config),
        SCHEMA,
        len(keys),
        keys=list(keys),
        limit=limit,
        columns=columns,
        shard_items=shard_items,
    )


def finish(folder, keys, limit=None, **options):
    """Answer what is missing, and return the positions that were."""
    assert not is_finished(folder, identity(keys, limit))
    with open_journal(folder, keys, limit, **options) as journal:
        missing = sorted(set(range(len(keys))) - journal.done())
        for position in missing:
            journal.commit({position: answer(keys[position], limit)}, {"prompt_tokens": 10, "completion_tokens": 3})
        journal.publish({"rows": len(keys)}, **journal.counts())
    return missing


def uids(folder):
    return [uid for batch in batches(folder, "rollouts", ["uid"], batch_size=2) for uid in batch["uid"].to_pylist()]


def test_more_rows_ask_only_for_what_is_missing(tmp_path):
    folder = tmp_path / "f"
    assert finish(folder, "abcd") == [0, 1, 2, 3]
    first = {path.name: path.read_bytes() for path in folder.glob("rollouts-*.parquet")}
    assert finish(folder, "axbcdy") == [1, 5]
    assert uids(folder) == list("axbcdy")
    assert {path.name: path.read_bytes() for path in folder.glob("rollouts-*.parquet")}.items() >= first.items()
    assert num_rows(folder, "rollouts") == 6
    assert [read_row(folder, "rollouts", n)["uid"] for n in range(6)] == list("axbcdy")
    assert read_table(folder, "rollouts", ["text"])["text"].to_pylist() == [f"text of {key}" for key in "axbcdy"]
    assert read_manifest(folder)["orders"]["rollouts"]["rows"] == 6
    assert not list(folder.glob("journal*"))
    assert not (folder / "unfinished.json").exists()


def test_what_is_no_longer_asked_for_stays_on_disk_and_is_asked_for_never_again(tmp_path):
    folder = tmp_path / "f"
    finish(folder, "abcd")
    assert finish(folder, "ca") == []
    assert uids(folder) == ["c", "a"]
    assert finish(folder, "abcd") == []
    assert uids(folder) == list("abcd")


def test_tokens_are_counted_over_all_plans(tmp_path):
    finish(tmp_path / "f", "abcd")
    finish(tmp_path / "f", "abcdef")
    with open_journal(tmp_path / "f", "abcdefg") as journal:
        assert journal.counts() == {"prompt_tokens": 60, "completion_tokens": 18}
    assert read_counts(tmp_path / "f") == {"prompt_tokens": 60, "completion_tokens": 18}


def test_an_answer_serves_every_limit_that_it_fits_and_one_that_was_cut_off_only_its_own(tmp_path):
    folder = tmp_path / "f"
    with open_journal(folder, "abcd", 5) as journal:
        journal.commit(
            {
                0: answer("a", 5, tokens=3),
                1: answer("b", 5, tokens=5, finish="length"),
                2: answer("c", 5, tokens=5),
                3: answer("d", 5, tokens=0, finish="error"),
            }
        )
        journal.publish({})

    def missing(limit):
        copy = tmp_path / f"copy{limit}"
        shutil.copytree(folder, copy)
        with open_journal(copy, "abcde", limit) as journal:
            return set(range(5)) - journal.done()

    assert missing(5) == {3, 4}, "an answer that was left out after errors is asked for again"
    assert missing(6) == {1, 3, 4}
    assert missing(4) == {1, 2, 3, 4}
    assert missing(3) == {1, 2, 3, 4}
    assert missing(2) == {0, 1, 2, 3, 4}


def test_the_longer_answer_takes_the_place_of_the_one_that_was_cut_off(tmp_path):
    folder = tmp_path / "f"
    with open_journal(folder, "ab", 5) as journal:
        journal.commit({0: answer("a", 5, finish="length", text="cut"), 1: answer("b", 5)})
        journal.publish({})
    assert finish(folder, "ab", 9) == [0]
    assert read_table(folder, "rollouts")["text"].to_pylist() == ["text of a", "text of b"]
    assert finish(folder, "ab", 5) == [], "under the old limit both serve"


def test_columns_that_the_key_does_not_decide_are_the_newest(tmp_path):
    folder = tmp_path / "f"
    finish(folder, "abc")
    with open_journal(folder, "bcx", columns=lambda at: {"answer": f"new {at}"}) as journal:
        journal.commit({2: answer("x") | {"answer": "new 2"}})
        assert journal.num_kept == 2
        journal.publish({})
    assert read_table(folder, "rollouts", ["answer", "uid"]).to_pylist() == [
        {"uid": "b", "answer": "new 0"},
        {"uid": "c", "answer": "new 1"},
        {"uid": "x", "answer": "new 2"},
    ]
    assert read_row(folder, "rollouts", 1)["answer"] == "new 1"


def test_another_plan_in_the_middle_loses_nothing(tmp_path):
    """Stopped with rows in SQLite and in a shard; then the list of questions changes, twice."""
    folder = tmp_path / "f"
    with open_journal(folder, "abcdefgh") as journal:
        journal.commit({n: answer("abcdefgh"[n]) for n in (3, 4, 5, 0, 7)})
    assert not is_finished(folder, identity("xhgfedcba"))
    with open_journal(folder, "xhgfedcba") as journal:
        assert journal.done() == {"xhgfedcba".index(key) for key in "defah"}
        with sqlite3.connect(folder / "journal.sqlite") as db:
            assert db.execute("SELECT count(*) FROM items").fetchone() == (0,)
        db.close()
        journal.commit({0: answer("x"), 6: answer("c")})
    assert finish(folder, "abcx") == [1]
    assert uids(folder) == list("abcx")


def test_a_kill_between_the_steps_of_taking_a_folder_up_changes_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "f"
    finish(folder, "abcd")

    def killed(*args):
        raise KeyboardInterrupt

    for place in ("dasd_lite.data.journal.write_atomic", "pathlib.Path.unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                open_journal(folder, "abcde")
        assert uids(folder) == list("abcd"), "still what it was"
        assert is_finished(folder, identity("abcd"))
    assert finish(folder, "abcde") == [4]


def test_a_folder_can_be_closed_as_it_is_and_grow_later(tmp_path):
    folder = tmp_path / "f"
    with open_journal(folder, "abcde") as journal:
        journal.commit({n: answer("abcde"[n]) for n in (0, 2, 4)})
    with open_journal(folder, "abcde") as journal:
        assert journal.close_as_it_is() == 3
        journal.publish({"rows": 3})
    assert uids(folder) == ["a", "c", "e"]
    assert read_manifest(folder)["counts"] == {"rows": 3, "missing": 2}
    assert is_finished(folder, identity("abcde")), "the run goes on with what is there"
    closed = fingerprint(folder)
    assert closed != identity("abcde").fingerprint, "stages behind it are made again once it is complete"
    assert not is_finished(folder, identity("abcde"), reopen=True)
    with open_journal(folder, "abcde") as journal:
        assert journal.done() == {0, 2, 4}
        journal.commit({1: answer("b"), 3: answer("d")})
        journal.publish({"rows": 5})
    assert uids(folder) == list("abcde")
    assert fingerprint(folder) == identity("abcde").fingerprint
    assert is_finished(folder, identity("abcde"), reopen=True)


def test_a_folder_without_an_answer_cannot_be_closed(tmp_path):
    with open_journal(tmp_path / "f", "abc") as journal, pytest.raises(DataError, match="no answer yet"):
        journal.close_as_it_is()


def test_rows_of_another_folder_are_taken_over(tmp_path):
    finish(tmp_path / "one", "abcdefg")
    with open_journal(tmp_path / "two", "xyz") as journal:  # unfinished: one row in SQLite
        journal.commit({1: answer("y")})
    with open_journal(tmp_path / "f", "gyaq", columns=lambda at: {"answer": f"now {at}"}) as journal:
        assert journal.take_over([tmp_path / "one", tmp_path / "two", tmp_path / "f"]) == 3
        assert journal.done() == {0, 1, 2}
        journal.commit({3: answer("q")})
        assert journal.take_over([tmp_path / "one"]) == 0
        journal.publish({})
    rows = read_table(tmp_path / "f", "rollouts").to_pylist()
    assert [(row["uid"], row["answer"]) for row in rows] == [
        ("g", "now 0"),
        ("y", "now 1"),
        ("a", "now 2"),
        ("q", "old"),
    ]
    assert rows[0] == answer("g") | {"answer": "now 0"}
    assert uids(tmp_path / "one") == list("abcdefg")


def test_only_the_plan_may_change_without_force(tmp_path):
    folder = tmp_path / "f"
    finish(folder, "abc")
    hot = Identity("sample", 1, {"keys": list("abcd"), "limit": None, "temperature": 1.0}, {}, grows=frozenset(GROWS))
    with pytest.raises(CheckpointError, match=r"temperature: not set there, 1\.0 now"):
        is_finished(folder, hot)
    assert uids(folder) == list("abc")
    assert not is_finished(folder, hot, force=True)
    assert uids(tmp_path / "f.replaced-1") == list("abc")


def test_a_damaged_shard_is_named(tmp_path):
    finish(tmp_path / "f", "abcd")
    path = tmp_path / "f" / "rollouts-00000.parquet"
    path.write_bytes(b"PAR1" + path.read_bytes()[50:])
    with pytest.raises(DataError, match=r"rollouts-00000\.parquet: damaged"):
        open_journal(tmp_path / "f", "abcde")


PLANS = st.lists(st.lists(st.sampled_from("abcdefghijkl"), unique=True, min_size=1), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(plans=PLANS, shard_items=st.integers(1, 4), stops=st.lists(st.integers(0, 6), min_size=5, max_size=5))
def test_any_plans_one_after_the_other_ask_for_each_key_once(tmp_path_factory, plans, shard_items, stops):
    """Some plans are finished, others are left after a few answers; a set of keys is the twin."""
    folder = tmp_path_factory.mktemp("g") / "f"
    asked = set()
    for keys, stop in zip(plans, stops, strict=False):
        if is_finished(folder, identity(keys)):
            assert set(keys) <= asked
        else:
            with open_journal(folder, keys, shard_items=shard_items) as journal:
                missing = sorted(set(range(len(keys))) - journal.done())
                assert {keys[at] for at in missing} == set(keys) - asked
                for position in missing[:stop]:
                    journal.commit({position: answer(keys[position])})
                    asked.add(keys[position])
                if len(missing) <= stop:
                    journal.publish({})
        if (folder / "manifest.json").exists():
            assert uids(folder) == keys
            assert [row["uid"] for row in dataset.read_table(folder, "rollouts").to_pylist()] == keys


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("closes", [True, False], ids=["--finish", "another plan"])
def test_a_kill_behind_the_rest_of_a_plan_leaves_every_answer_with_its_own_question(tmp_path, monkeypatch, closes):
    """What was there so far fills no shard; killed once it is in one, the old plan goes on."""
    folder, keys = tmp_path / "f", "abcdefgh"
    with open_journal(folder, keys) as journal:
        for position in (2, 5, 7):
            journal.commit({position: answer(keys[position])})
    written = journal_module._write_shard

    def killed(*args, **options):
        written(*args, **options)
        raise Killed

    monkeypatch.setattr(journal_module, "_write_shard", killed)
    with pytest.raises(Killed):
        if closes:
            open_journal(folder, keys).close_as_it_is()
        else:
            open_journal(folder, keys + "xy")
    monkeypatch.undo()
    assert finish(folder, keys) == [0, 1, 3, 4, 6]
    assert uids(folder) == list(keys)


def test_a_shard_of_an_earlier_plan_that_was_removed_moves_no_other_answer(tmp_path):
    folder, keys = tmp_path / "f", "abcdefghi"
    finish(folder, "abc")
    with open_journal(folder, keys) as journal:
        for position in (3, 4, 5):
            journal.commit({position: answer(keys[position])})
    (folder / "rollouts-00000.parquet").unlink()
    columns = {"columns": lambda position: {"answer": f"of {keys[position]}"}}
    assert finish(folder, keys, **columns) == [0, 1, 2, 6, 7, 8]
    rows = read_table(folder, "rollouts").to_pylist()
    assert [(row["uid"], row["answer"]) for row in rows] == [(key, f"of {key}") for key in keys]


def test_rows_of_one_key_are_taken_over_once_for_each_position(tmp_path):
    """Two answers that are the same have the same scores; an unfinished folder may hold both."""
    schema = pa.schema([("uid", pa.string()), ("key", pa.string())])
    keys = ["same", *(f"other {i}" for i in range(100)), "same", "missing"]

    def scores(folder):
        identity = Identity("score", 1, {}, {})
        columns = {"columns": lambda position: {"uid": str(position)}}
        return Journal(tmp_path / folder, identity, schema, len(keys), keys=keys, key="key", table="scores", **columns)

    with scores("one") as one:
        for position in range(102):
            one.commit({position: {"uid": str(position), "key": keys[position]}})
    with scores("two") as two:
        assert two.take_over([tmp_path / "one"]) == 102
        two.commit({102: {"uid": "102", "key": "missing"}})
        two.publish({})
    rows = read_table(tmp_path / "two", "scores").to_pylist()
    assert rows == [{"uid": str(position), "key": key} for position, key in enumerate(keys)]


def test_a_damaged_shard_of_another_folder_is_named(tmp_path):
    finish(tmp_path / "one", "abc")
    (tmp_path / "one" / "rollouts-00000.parquet").write_bytes(b"PAR1 and no more")
    with (
        open_journal(tmp_path / "two", "abcd") as journal,
        pytest.raises(DataError, match=r"one/rollouts-00000\.parquet: damaged"),
    ):
        journal.take_over([tmp_path / "one"])


def test_a_table_that_grew_many_times_reads_each_row_group_once(tmp_path, monkeypatch):
    """One candidate more each time: neighbors lie in different shards."""
    folder, opened = tmp_path / "f", 0
    for number in range(1, 8):
        finish(folder, [f"{question}-{i}" for question in range(20) for i in range(number)], shard_items=100)
    read = pq.ParquetFile.read_row_group

    def counted(*args, **options):
        nonlocal opened
        opened += 1
        return read(*args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    whole = pa.Table.from_batches(batches(folder, "rollouts", ["uid"], batch_size=140))
    assert whole["uid"].to_pylist() == [f"{question}-{i}" for question in range(20) for i in range(7)]
    assert opened == 7
