"""Bad losses and gradients: caught before they reach the weights, with the rollouts that caused them."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import QUICK, VOCAB, make_rows, schedule_of, write_rows

from dasd_lite.config.train import TrainConfig
from dasd_lite.errors import TrainError
from dasd_lite.model.row import Row
from dasd_lite.stages.train import train
from dasd_lite.training.guard import StepStats, check_step, worst_rollouts
from dasd_lite.training.job import Job
from dasd_lite.training.objectives import sft
from dasd_lite.training.schedule import Schedule


def test_what_is_a_bad_step():
    usual = [1.0, 1.2, 0.9, 1.1] * 8
    assert check_step(1.0, 1.0, usual, 2.0, None) is None
    assert check_step(float("nan"), 1.0, [], 2.0, None) == "the loss is nan"
    assert check_step(1.0, float("inf"), [], 2.0, None) == "the gradient is inf, the loss 1"
    problem = "the loss jumped to 3.2 from 1.05, by more than train.max_loss_jump = 2; lower train.learning_rate, or"
    assert problem in check_step(3.2, 1.0, usual, 2.0, None)
    assert check_step(3.2, 1.0, usual, 2.5, None) is None
    # The median of fewer than 8 steps means little, so it is compared with the highest of them.
    assert check_step(30.0, 1.0, [], 2.0, None) is None
    assert check_step(3.1, 1.0, usual[:7], 2.0, None) is None
    assert "the loss jumped to 3.3 from 1.2" in check_step(3.3, 1.0, usual[:2], 2.0, None)
    assert check_step(3.0, 1.0, [9.0] * 90 + [0.5] * 32, 2.0, None) is not None  # the last ones count
    # In float16 a gradient that overflows lowers the loss scale; one that always does teaches nothing.
    assert check_step(1.0, float("inf"), [], 2.0, 3) is None
    assert check_step(1.0, float("nan"), [], 2.0, 24) == "the gradient is nan for 25 steps, the loss 1"


def test_a_jump_of_the_loss_keeps_the_weights_before_it_and_a_larger_limit_resumes(tiny, tmp_path):
    rows = make_rows(40)
    odd = np.random.default_rng(0)
    rows[7]["ids"] = odd.integers(0, VOCAB, len(rows[7]["ids"])).tolist()  # unlike the rest
    folder = write_rows(tmp_path / "rows", rows)
    config = {
        "epochs": 6,
        "learning_rate": 3e-2,
        "min_learning_rate": 1e-2,
        "grad_accum_steps": 1,
        "checkpoint_every": 5,
    }
    with pytest.raises(TrainError, match=r"step \d+: the loss jumped to .* with the highest loss: r7d0, ") as caught:
        train(folder, tiny, TrainConfig(**config, max_loss_jump=1.0), out=tmp_path / "out")
    step = int(str(caught.value).split()[1].rstrip(":"))
    kept = (step - 2) // 5 * 5  # not that of the step just before, whose weights may be the cause
    assert str(caught.value).endswith(f"the checkpoint of step {kept} is kept, and the same command resumes from it")
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step-{kept:08d}"]
    with pytest.raises(TrainError, match=f"step {step}: the loss jumped"):  # it happens again
        train(folder, tiny, TrainConfig(**config, max_loss_jump=1.0), out=tmp_path / "out")
    model = train(folder, tiny, TrainConfig(**config, max_loss_jump=50.0), out=tmp_path / "out")
    assert model.counts["steps"] == 240


def test_weights_that_went_bad_are_not_kept(tiny, packed, tmp_path, monkeypatch):
    """The loss of a step shows what the step before did."""
    clip, calls = Job.clip, []

    def broken(job, trained):
        calls.append(1)
        norm = clip(job, trained)
        if len(calls) == 6:
            for p in trained:
                p.grad.fill_(1e30)  # finite, but the weights are not after the step
        return norm

    monkeypatch.setattr(Job, "clip", broken)
    monkeypatch.setattr(Schedule, "learning_rate", lambda schedule, step: 1e38 if step == 5 else 1e-3)
    config = TrainConfig(**QUICK | {"checkpoint_every": 2})
    with pytest.raises(TrainError, match=r"step 7: the loss is nan.*the checkpoint of step 4 is kept"):
        train(packed, tiny, config, out=tmp_path / "out")
    monkeypatch.undo()
    assert np.isfinite(train(packed, tiny, config, out=tmp_path / "out").counts["last_step_loss"])


def test_a_loss_that_is_nan_names_step_and_rollouts(tiny, packed, tmp_path, monkeypatch):
    correct, calls = sft.loss, []

    def broken(per_token_N, targets):
        calls.append(1)
        loss, metrics = correct(per_token_N, targets)
        factor = math.nan if len(calls) == 6 else 1
        return loss * factor, {"loss": metrics["loss"] * factor}

    monkeypatch.setattr(sft, "loss", broken)
    config = TrainConfig(**QUICK | {"checkpoint_every": 1})
    bad = schedule_of(make_rows(16), config).rows_of(2)[2:]  # the sixth forward pass: third step, second micro-batch
    rows = make_rows(16)
    named = ", ".join(rows[bad[0]]["uids"])
    with pytest.raises(TrainError, match=f"step 3: the loss is nan; rollouts: {named}, .*checkpoint of step 1 is kept"):
        train(packed, tiny, config, out=tmp_path / "out")
    # That of step 2 has the weights that led to the bad loss, so they may be bad themselves.
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001"]


def test_the_worst_micro_batch_is_that_of_the_highest_loss_per_token():
    long = Row(np.zeros(10_000, int), np.ones(10_000, bool), np.array([10_000]), ("long",))
    short = Row(np.zeros(500, int), np.ones(500, bool), np.array([500]), ("short",))
    stats = StepStats.of([{"loss": 5000.0}, {"loss": 4500.0}], [long, short], False, 0)
    assert "short" in worst_rollouts([stats], 1.0) and stats.sums == {"loss": 9500.0}
