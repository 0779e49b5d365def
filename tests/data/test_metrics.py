"""metrics.jsonl: what is read of it, and what a restart cuts off."""

import json

import pytest

from dasd_lite.data.metrics import read_metrics, truncate_metrics
from dasd_lite.errors import CheckpointError, DataError


def steps(number):
    return [{"step": i + 1, "loss": 1.0 / (i + 1), "learning_rate": 1e-4, "grad_norm": None} for i in range(number)]


@pytest.fixture
def path(tmp_path):
    """A file of three steps, and a fourth that is being written."""
    text = "".join(json.dumps(step) + "\n" for step in steps(3))
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "lo')
    return tmp_path / "metrics.jsonl"


def test_complete_lines_are_read(path):
    assert list(read_metrics(path)) == steps(3)


def test_a_missing_file_has_no_steps(tmp_path):
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == []


@pytest.mark.parametrize("line", ["{", "[]", "3", "{}", '{"step": 2}', "\x00", '{"step": 2, "loss": null}', "\udcff"])
def test_a_damaged_line_is_named(path, line):
    lines = path.read_text().splitlines(keepends=True)
    path.write_bytes("".join([lines[0], line + "\n", *lines[2:]]).encode(errors="surrogateescape"))
    read = read_metrics(path)
    assert next(read) == steps(1)[0]
    with pytest.raises(DataError) as caught:
        next(read)
    assert str(caught.value).startswith(f"{path}:2: damaged (")
    assert str(caught.value).endswith(f"; remove {path.parent} to train from scratch")
    (path.parent / "manifest.json").touch()
    with pytest.raises(DataError, match=r"delete the line$"):
        list(read_metrics(path))


def test_steps_after_the_checkpoint_are_cut_off(path):
    truncate_metrics(path, 3)
    assert list(read_metrics(path)) == steps(3)
    truncate_metrics(path, 2)
    assert path.read_text().splitlines() == [json.dumps(step) for step in steps(2)]
    truncate_metrics(path, 0)
    assert path.read_bytes() == b""


def test_fewer_steps_than_the_checkpoint_has_are_refused(path):
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"has 3 steps, the checkpoint has 5; remove .* to train from scratch$"):
        truncate_metrics(path, 5)
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(CheckpointError, match="has 0 steps, the checkpoint has 1"):
        truncate_metrics(path, 1)
    truncate_metrics(path, 0)
    assert not path.exists()
