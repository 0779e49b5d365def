"""Micro-batches made ready ahead of the computation: the same ones in the same order, and a clean end."""

import threading

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.rows import QUICK

from dasd_lite.config.train import TrainConfig
from dasd_lite.errors import TrainError
from dasd_lite.stages.train import train
from dasd_lite.training import loop
from dasd_lite.training.batches import Batches, Share

SHARES = [Share(10, (((0, 1), True), ((2,), True))), Share(5, ()), Share(7, (((3,), False),))]


def made(in_thread):
    threads = set()

    def prepare(rows, num_targets, counts):
        threads.add(threading.current_thread().name)
        return rows, num_targets, counts

    with Batches(iter(SHARES), prepare, in_thread=in_thread) as batches:
        steps = [list(batches.take(len(share.micro_batches))) for share in SHARES]
    return steps, threads


def test_a_thread_makes_the_same_micro_batches():
    wanted = [[((0, 1), 10, True), ((2,), 10, True)], [], [((3,), 7, False)]]
    assert made(False) == (wanted, {"MainThread"})
    assert made(True) == (wanted, {"batches_0"})


def test_the_next_one_is_made_while_one_computes_and_no_more():
    begun = []
    with Batches(iter(SHARES), lambda rows, *_: begun.append(rows), in_thread=True) as batches:
        taken = batches.take(2)
        next(taken)
        batches._next.result()
        assert begun == [(0, 1), (2,)]
        next(taken)
        batches._next.result()
        assert begun == [(0, 1), (2,), (3,)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_training_is_the_same_with_the_thread_and_its_errors_end_it(tiny, packed, tmp_path, monkeypatch):
    def weights(out):
        return (out / "model" / "model.safetensors").read_bytes()

    class Threaded(Batches):
        def __init__(self, shares, prepare, *, in_thread):
            assert not in_thread  # on a CPU
            super().__init__(shares, prepare, in_thread=True)

    config = TrainConfig(**QUICK)
    train(packed, tiny, config, out=tmp_path / "plain")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Batches", Threaded)
        train(packed, tiny, config, out=tmp_path / "threaded")
        assert weights(tmp_path / "threaded") == weights(tmp_path / "plain")

        def broken(self, *arguments):
            raise TrainError("row 3 cannot be read")

        patch.setattr("dasd_lite.training.job.Job.prepare", broken)
        with pytest.raises(TrainError, match="row 3 cannot be read"):
            train(packed, tiny, config, out=tmp_path / "broken")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
