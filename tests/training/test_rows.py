"""Rows as they are read, and those that must not be trained on."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import QUICK, VOCAB, make_rows, open_rows, write_rows

from dasd_lite.config.train import TrainConfig
from dasd_lite.errors import DataError, TrainError
from dasd_lite.stages.train import train


def test_rows_are_read_as_they_were_written(packed, tmp_path):
    rows = open_rows(packed, tmp_path / "mapped", vocab_size=VOCAB, max_positions=64)
    assert not (tmp_path / "mapped").exists()
    wanted = make_rows(16)
    assert len(rows) == 16
    for i in (15, 0, 7, 6):
        row = rows[i]
        assert (row.ids.tolist(), row.loss_mask.tolist()) == (wanted[i]["ids"], wanted[i]["loss_mask"])
        assert (row.doc_lengths.tolist(), list(row.uids)) == (wanted[i]["doc_lengths"], wanted[i]["uids"])
        assert rows.num_tokens[i] == len(row.ids)
        assert not row.ids.flags.owndata  # a view of the file


def changed(row, **columns):
    return {**row, **columns}


ROWS = make_rows(6)
LENGTH = len(ROWS[4]["ids"])
FIRST = ROWS[4]["doc_lengths"][0]
LONG = {"ids": [1] * 65, "loss_mask": [True] * 65, "doc_lengths": [65], "uids": ["long"]}
BAD = {
    "vocabulary": (
        changed(ROWS[4], ids=[*ROWS[4]["ids"][:-1], VOCAB]),
        r"document 3 \(r4d3\): token id 61, but the model has 61",
    ),
    "negative": (changed(ROWS[4], ids=[-1, *ROWS[4]["ids"][1:]]), r"document 0 \(r4d0\): token id -1"),
    "positions": (LONG, r"document 0 \(long\): 65 tokens, but the model has 64 positions"),
    "no target": (
        changed(ROWS[4], loss_mask=[True] + [False] * (FIRST - 1) + ROWS[4]["loss_mask"][FIRST:]),
        rf"document 0 \(r4d0\): none of its {FIRST} tokens is a target",
    ),
    "end token": (
        changed(ROWS[4], loss_mask=[*ROWS[4]["loss_mask"][:-1], False]),
        r"\(r4d3\): its last token \(\d+\), which ends",
    ),
    "one token": (
        changed(ROWS[4], doc_lengths=[FIRST - 1, 1, *ROWS[4]["doc_lengths"][1:]]),
        "1 token; a document needs",
    ),
    "lengths": (
        changed(ROWS[4], doc_lengths=ROWS[4]["doc_lengths"][:-1]),
        f"row 4: {LENGTH} ids, {LENGTH} mask entries",
    ),
    "mask": (changed(ROWS[4], loss_mask=[True]), f"row 4: {LENGTH} ids, 1 mask entries"),
    "empty": (changed(ROWS[4], ids=[], loss_mask=[], doc_lengths=[], uids=[]), "row 4: 0 ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_must_not_be_trained_on(tiny, tmp_path, case):
    row, message = BAD[case]
    folder = write_rows(tmp_path / "rows", [*ROWS[:4], row, ROWS[5]])
    with pytest.raises(TrainError, match=message) as caught:
        train(folder, tiny, TrainConfig(**QUICK), out=tmp_path / "out")
    assert str(caught.value).startswith(f"{folder}: row 4")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]  # nothing is in the way of correct rows


def test_no_rows(tiny, tmp_path):
    with pytest.raises(TrainError, match="no row to train on"):
        train(write_rows(tmp_path / "rows", []), tiny, TrainConfig(**QUICK), out=tmp_path / "out")


def test_rows_that_are_not_there(tiny, tmp_path):
    with pytest.raises(DataError, match=str(tmp_path / "rows")):
        train(tmp_path / "rows", tiny, TrainConfig(**QUICK), out=tmp_path / "out")


def test_fewer_rows_than_a_step_are_one_short_step(tiny, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows", make_rows(3))
    model = train(rows, tiny, TrainConfig(**QUICK), out=tmp_path / "out", epochs=1)
    assert (model.counts["steps"], model.counts["rows_seen"]) == (1, 3)
    said = "there are only 3 rows, fewer than the 4 of an optimizer step"
    assert said in capsys.readouterr().err
