"""Dataset folders: batches of an exact size, identities and fingerprints, what is skipped and what is refused."""

import errno
import json
import os
import random
import shutil
import sqlite3
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_lite.config.models import EXECUTION, Endpoint, Table, result_options
from dasd_lite.config.stages import PackConfig, SampleConfig, ScoreConfig
from dasd_lite.config.train import TrainConfig
from dasd_lite.data import dataset, files
from dasd_lite.data.dataset import batches, shards
from dasd_lite.data.files import run_lock
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import Identity, fingerprint, identify, read_manifest
from dasd_lite.data.writer import ShardWriter, is_finished
from dasd_lite.errors import CheckpointError, DataError

NUMBERS = pa.schema([("n", pa.int64()), ("text", pa.large_string()), ("list", pa.large_list(pa.int32()))])
ONE = Identity("stage", 1, {"a": 1, "b": {"c": 2.0}}, {"x": "hash"})
TWO = Identity("stage", 1, {"a": 1, "b": {"c": 3.0}}, {"x": "hash"})


def row(n):
    return {"n": n, "text": f"{n} é" * (n % 4), "list": list(range(n % 5))}


def make(folder, identity=ONE, sizes=(3,), shard_rows=4):
    """Write a finished folder whose table consists of batches of these sizes."""
    rows = iter([row(n) for n in range(sum(sizes))])
    with ShardWriter(folder, identity, {"numbers": NUMBERS}, shard_rows=shard_rows) as writer:
        for size in sizes:
            part = [next(rows) for _ in range(size)]
            writer.write("numbers", pa.RecordBatch.from_pylist(part, schema=NUMBERS))
        writer.publish({"rows": sum(sizes)})
    return folder


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=0, max_size=6),
    shard_rows=st.integers(1, 12),
    batch_size=st.integers(1, 11),
)
def test_batches_have_exactly_the_requested_size(tmp_path_factory, sizes, shard_rows, batch_size):
    folder = make(tmp_path_factory.mktemp("d") / "f", sizes=sizes, shard_rows=shard_rows)
    read = list(batches(folder, "numbers", batch_size=batch_size))
    assert [r for batch in read for r in batch.to_pylist()] == [row(n) for n in range(sum(sizes))]
    assert all(batch.num_rows == batch_size for batch in read[:-1])
    assert all(0 < batch.num_rows <= batch_size for batch in read[-1:])
    assert dataset.num_rows(folder, "numbers") == sum(sizes)


def test_only_some_columns_are_read(tmp_path):
    folder = make(tmp_path / "f", sizes=(5, 5))
    (batch,) = batches(folder, "numbers", ("list", "n"))
    assert set(batch.schema.names) == {"n", "list"}
    assert dataset.read_table(folder, "numbers", ("n",)).to_pydict() == {"n": list(range(10))}


def test_reading_a_folder_or_table_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match=r"gone: the folder does not exist; run its stage first"):
        list(batches(tmp_path / "gone", "numbers"))
    (tmp_path / "begun").mkdir()
    with pytest.raises(DataError, match=r"begun: the folder is unfinished; run its stage again"):
        read_manifest(tmp_path / "begun")
    folder = make(tmp_path / "f")
    with pytest.raises(DataError, match=r"f: has numbers, not 'letters'"):
        shards(folder, "letters")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(DataError, match=r"manifest.json: schema_version is 99; this version of dasd-lite reads 1"):
        read_manifest(folder)


# --- finished, unfinished, and foreign folders --------------------------------------------------------


def test_a_missing_or_empty_folder_is_not_finished(tmp_path):
    assert not is_finished(tmp_path / "f", ONE)
    assert not (tmp_path / "f").exists()
    (tmp_path / "f").mkdir()
    assert not is_finished(tmp_path / "f", ONE)


def test_the_same_identity_is_finished_and_left_alone(tmp_path):
    folder = make(tmp_path / "f")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert is_finished(folder, ONE)
    assert is_finished(folder, ONE, force=True), "force replaces only what differs"
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_another_identity_is_refused_by_name_and_replaced_by_force(tmp_path):
    folder = make(tmp_path / "f")
    with pytest.raises(CheckpointError) as error:
        is_finished(folder, TWO)
    assert str(error.value) == (
        f"{folder}: made with another configuration (b.c: 2.0 there, 3.0 now); use another out folder or --force"
    )
    assert is_finished(folder, ONE), "a refusal changes nothing"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not is_finished(folder, TWO, force=True)
    assert not folder.exists()
    aside = tmp_path / "f.replaced-1"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before, "nothing is deleted"


def test_a_journal_of_another_identity_is_refused_too(tmp_path):
    with Journal(tmp_path / "f", ONE, NUMBERS, 3) as journal:
        journal.commit({1: row(1)})
    assert not is_finished(tmp_path / "f", ONE)
    with pytest.raises(CheckpointError, match=r"b\.c: 2\.0 there, 3\.0 now"):
        is_finished(tmp_path / "f", TWO)
    with Journal(tmp_path / "f", ONE, NUMBERS, 3) as journal:
        assert journal.done() == {1}
    assert not is_finished(tmp_path / "f", TWO, force=True)
    assert not (tmp_path / "f").exists()


def test_an_unfinished_short_stage_is_replaced_without_force(tmp_path):
    """Its input was wrong and has been fixed. There is nothing to resume, so no reason to ask."""
    with ShardWriter(tmp_path / "f", ONE, {"numbers": NUMBERS}) as writer:
        writer.write("numbers", pa.RecordBatch.from_pylist([row(1)], schema=NUMBERS))
    assert not is_finished(tmp_path / "f", TWO)
    assert is_finished(make(tmp_path / "f", TWO), TWO)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_other_files_is_refused(tmp_path, force):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"f: has files that dasd-lite did not write"):
        is_finished(tmp_path / "f", ONE, force=force)
    assert (tmp_path / "f" / "thesis.tex").exists()


def test_an_empty_journal_is_nothing_to_lose(tmp_path):
    """A call that failed before its first answer does not block the corrected one."""
    Journal(tmp_path / "f", ONE, NUMBERS, total=3, table="numbers").close()
    assert not is_finished(tmp_path / "f", TWO)
    assert not (tmp_path / "f").exists()
    journal = Journal(tmp_path / "f", ONE, NUMBERS, total=3, table="numbers")
    journal.commit({0: row(1)})
    journal.close()
    with pytest.raises(CheckpointError, match="made with another configuration"):
        is_finished(tmp_path / "f", TWO)


@pytest.mark.parametrize(
    ("name", "what"), [("file", "a file"), ("file/below", "a file"), ("link", "a link to nothing")]
)
def test_a_place_where_no_folder_can_be(tmp_path, name, what):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"{name}: \S+ is {what}; choose another folder"):
        is_finished(tmp_path / name, ONE, force=True)


def test_a_folder_killed_before_its_first_rename_is_ours(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "unfinished.json.tmp").write_text('{"half')
    assert not is_finished(tmp_path / "f", ONE)


def test_differences_list_changed_added_and_removed_options():
    manifest = {"version": 1, "stage": "s", "config": {"old": 1, "same": 2}, "inputs": {"model": "aa"}, "packages": {}}
    now = Identity("s", 2, {"new": [1], "same": 2}, {"model": "bb"})
    assert now.differences(manifest) == [
        "new: not set there, [1] now",
        "old: 1 there, not set now",
        "model: aa there, bb now",
        "written by another version of dasd-lite, s version 1 there, 2 now",
    ]
    assert now.differences(json.loads(json.dumps({"version": 2, "config": now.config, "inputs": now.inputs}))) == []


def test_inputs_that_were_made_again_are_followed_but_not_models_that_the_user_chooses(tmp_path):
    """A folder of another stage, made again, is no other configuration; another teacher is, whoever wrote it."""
    for name in ("rows", "teacher"):
        make(tmp_path / name)
    folders = {"rows": tmp_path / "rows", "teacher": tmp_path / "teacher"}

    def now(stage):
        return identify(stage, 1, {}, folders, brought=("teacher",))

    for stage in ("pack", "train"):
        make(tmp_path / stage, now(stage))
    shutil.rmtree(tmp_path / "rows")
    make(tmp_path / "rows", TWO)
    assert not is_finished(tmp_path / "pack", now("pack")) and not (tmp_path / "pack").exists(), "quick: deleted"
    assert not is_finished(tmp_path / "train", now("train"), keep=True)
    assert (tmp_path / "train").exists(), "nothing is changed yet"
    assert not is_finished(tmp_path / "train", now("train"))
    assert (tmp_path / "train.replaced-1" / "manifest.json").exists(), "slow: set aside"
    make(tmp_path / "train", now("train"))
    shutil.rmtree(tmp_path / "teacher")
    make(tmp_path / "teacher", TWO)
    with pytest.raises(CheckpointError, match=r"\(teacher: \S+/teacher has changed\)"):
        is_finished(tmp_path / "train", now("train"))


def test_a_stage_never_writes_into_a_folder_that_it_reads(tmp_path):
    make(tmp_path / "rows")
    with pytest.raises(DataError, match=r"rows: pack reads this folder; choose another one"):
        is_finished(tmp_path / "rows", identify("pack", 1, {}, {"rows": tmp_path / "rows"}), force=True)
    assert list(batches(tmp_path / "rows", "numbers"))


# --- identities and fingerprints --------------------------------------------------------------------


def test_the_identity_depends_on_each_part():
    base = ("stage", 1, {"a": 1}, {"x": "h"})
    same = Identity("stage", 1, {"a": 1}, {"x": "h"})
    others = [("other", *base[1:]), ("stage", 2, *base[2:]), (*base[:2], {"a": 2}, {"x": "h"}), (*base[:3], {"x": "i"})]
    assert Identity(*base).fingerprint == same.fingerprint
    assert len({Identity(*parts).fingerprint for parts in [base, *others]}) == 5


def test_execution_options_are_not_part_of_the_identity():
    assert identify("s", 1, ScoreConfig(), {}) == identify("s", 1, ScoreConfig(batch_tokens=3, chunk_tokens=5), {})
    train = TrainConfig(checkpoint_every=3, gradient_checkpointing="on")
    assert result_options(train) == result_options(TrainConfig())
    assert result_options(TrainConfig(epochs=1)) != result_options(TrainConfig())
    assert result_options(SampleConfig(temperature=1)) == result_options(SampleConfig(temperature=1.0))
    assert result_options(PackConfig(seq_len=8)) != result_options(PackConfig(seq_len=9))
    urls = [Endpoint(kind="endpoint", model="m", base_urls=[url], concurrency=n) for url, n in (("a", 1), ("b", 2))]
    assert result_options(urls[0]) == result_options(urls[1])


def test_execution_options_are_left_out_at_any_depth():
    class Inner(Table):
        kept: int = 1
        speed: Annotated[int, EXECUTION] = 2

    class Outer(Table):
        inner: Inner = Inner()

    assert result_options(Outer()) == {"inner": {"kept": 1}}


def test_a_fingerprint_depends_on_content_only(tmp_path):
    file = tmp_path / "file"
    file.write_text("a")
    first = fingerprint(file)
    file.write_text("b")
    assert fingerprint(file) != first
    file.write_text("a")
    os.utime(file, (0, 0))
    assert fingerprint(file) == first, "the content counts, not the time"
    with pytest.raises(DataError, match="gone: no such file or folder"):
        fingerprint(tmp_path / "gone")


def test_the_fingerprint_of_a_model_covers_its_files(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (model / name).write_text(name)
    first = fingerprint(model)
    seen = {first}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (model / name).write_text("changed")
        seen.add(fingerprint(model))
        (model / name).write_text(name)
    assert len(seen) == 5
    (model / "README.md").write_text("not part of the model")
    (model / "notes").mkdir()
    assert fingerprint(model) == first
    model.rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == first


def test_every_byte_of_a_large_file_counts(tmp_path):
    def sparse(name, position=None):
        with (tmp_path / name).open("wb") as file:
            file.truncate(100 << 20)
            if position is not None:
                file.seek(position)
                file.write(b"x")
        return fingerprint(tmp_path / name)

    prints = [sparse("a"), sparse("b", 0), sparse("c", 50 << 20), sparse("d", (100 << 20) - 1)]
    assert len(set(prints)) == 4
    assert sparse("e") == prints[0]


def test_the_fingerprint_of_a_trained_model_depends_on_its_training(tmp_path):
    make(tmp_path / "one", ONE)
    make(tmp_path / "two", TWO)
    for name in ("one", "two"):
        (tmp_path / name / "model").mkdir()
        (tmp_path / name / "model" / "config.json").write_text("{}")
    assert fingerprint(tmp_path / "one" / "model") != fingerprint(tmp_path / "two" / "model")


def test_the_fingerprint_of_a_dataset_is_its_identity(tmp_path):
    assert fingerprint(make(tmp_path / "f", ONE)) == ONE.fingerprint
    assert fingerprint(make(tmp_path / "g", TWO)) == TWO.fingerprint


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("f", "g"):
        make(tmp_path / name, sizes=(7, 2, 9), shard_rows=6)
    files = sorted(path.name for path in (tmp_path / "f").iterdir() if path.name != "timing.json")
    assert len(files) == 3
    for name in files:
        assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "g" / name).read_bytes(), name


# --- locks and full disks ---------------------------------------------------------------------------


def test_only_one_process_may_use_a_run_folder(tmp_path):
    with run_lock(tmp_path / "run"):
        with pytest.raises(DataError) as error, run_lock(tmp_path / "run"):
            pass
        assert f"in use by process {os.getpid()}; wait for it to end, or stop it" in str(error.value)
        with run_lock(tmp_path / "other"):
            pass
    with run_lock(tmp_path / "run"):
        pass


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_run_folder_that_cannot_be_created(tmp_path, out):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(DataError, match=rf"out = .*{out}: cannot create this folder .*; choose another"),
        run_lock(tmp_path / out),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        sqlite3.OperationalError("database or disk is full"),
        pa.ArrowInvalid("IOError: [Errno 28] Error writing bytes to file. No space left on device"),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, error):
    message = "no space left on the device; finished work is kept; free some space and run the same command to resume"
    with pytest.raises(DataError, match=message), files.disk_errors(tmp_path):
        raise error


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "I/O error"), ValueError("No space left"), pa.ArrowInvalid("bad")]
)
def test_other_errors_pass_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as caught, files.disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_a_full_shard_is_followed_by_another(tmp_path):
    folder = make(tmp_path / "f", sizes=(2, 2, 2, 2, 1), shard_rows=4)
    assert [pq.read_metadata(path).num_rows for path in shards(folder, "numbers")] == [4, 4, 1]
    last = read_manifest(folder)["tables"]["numbers"][2]
    assert (last["file"], last["rows"]) == ("numbers-00002.parquet", 1)
    assert last["bytes"] == (folder / last["file"]).stat().st_size


def test_batches_of_two_tables_cover_the_same_rows(tmp_path):
    rng = random.Random(0)
    for name in ("f", "g"):
        make(tmp_path / name, sizes=[rng.randint(1, 9) for _ in range(9)] + [50], shard_rows=7)
    for one, other in zip(batches(tmp_path / "f", "numbers"), batches(tmp_path / "g", "numbers"), strict=False):
        shared = min(one.num_rows, other.num_rows)
        assert np.array_equal(one["n"][:shared], other["n"][:shared])


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_shard_is_named(tmp_path, damage):
    folder = make(tmp_path / "f", ONE)
    path = next(iter(sorted(folder.glob("*.parquet"))))
    table = path.name.rsplit("-", 1)[0]
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        DataError, match=rf"{path.name}: (is missing|has \d+ bytes); the manifest says \d+ bytes; remove .*f and run"
    ):
        shards(folder, table)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_manifest_is_one_line(tmp_path, text):
    folder = make(tmp_path / "f", ONE)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest.json: damaged .*; remove .*f and run its stage again"):
        is_finished(folder, ONE)
