"""What each step reads and at which rate: pure functions of step and seed, the same for any number of processes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_lite.config.train import TrainConfig
from dasd_lite.method.ragged import offsets_of
from dasd_lite.training.schedule import Schedule

COST = (6.0 * 64, 1.0)


def schedule(num_rows, config, seed=0, **options):
    """Rows of one to four documents; those of a few long ones cost more."""
    rng = np.random.default_rng(1)
    number = rng.integers(1, 5, num_rows)
    lengths = np.concatenate([np.full(n, 1200 // n) for n in number])
    return Schedule(lengths, offsets_of(number), config, seed, COST, **options)


def test_learning_rate_is_warmup_then_cosine_to_the_floor():
    config = TrainConfig(epochs=1, learning_rate=1.0, min_learning_rate=0.2, warmup_ratio=0.1, grad_accum_steps=1)
    plan = schedule(101, config)
    rates = [plan.learning_rate(step) for step in range(plan.num_steps)]
    assert plan.num_steps == 101
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.2)
    assert rates[55] == pytest.approx(0.6)  # half of the way down
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_learning_rate_of_the_shortest_runs_is_within_its_bounds(warmup, num_rows):
    config = TrainConfig(epochs=1, warmup_ratio=warmup, grad_accum_steps=1)
    plan = schedule(num_rows, config)
    assert all(0 < plan.learning_rate(step) <= config.learning_rate for step in range(plan.num_steps))


def test_order_reads_every_row_once_an_epoch_and_depends_on_seed_and_epoch_only():
    config = TrainConfig(epochs=3, micro_batch_size=2, grad_accum_steps=2)
    plan = schedule(10, config, seed=5)
    epochs = [plan.order(epoch).tolist() for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    read = [sorted(plan.rows_of(step)) for step in range(plan.num_steps)]
    flat = [row for epoch in epochs for row in epoch]
    assert read == [sorted(flat[i : i + 4]) for i in range(0, 30, 4)]
    # However the step is cut, and wherever one begins to read.
    other = schedule(10, TrainConfig(epochs=9, micro_batch_size=1, grad_accum_steps=4), seed=5)
    assert [other.rows_of(step) for step in (6, 0)] == [plan.rows_of(step) for step in (6, 0)]
    assert schedule(10, config, seed=6).order(0).tolist() != epochs[0]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_ranks_share_the_rows_of_a_step(num_rows, micro, accum, num_ranks):
    if num_rows < micro * accum:
        return
    plan = schedule(num_rows, TrainConfig(epochs=2, micro_batch_size=micro, grad_accum_steps=accum))
    for step in range(plan.num_steps):
        shares = [plan.share(step, rank, num_ranks) for rank in range(num_ranks)]
        assert len({len(share) for share in shares}) == 1  # all do the same number of forward passes
        assert all(len(m) <= micro for share in shares for m in share)
        assert sorted(row for share in shares for m in share for row in m) == sorted(plan.rows_of(step))


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_work_equally_long(num_ranks):
    """In each turn all ranks wait for the one with the most expensive row."""
    rng = np.random.default_rng(0)
    number = rng.integers(1, 30, 4096)
    lengths = np.concatenate([np.full(n, 32768 // n) for n in number])
    plan = Schedule(lengths, offsets_of(number), TrainConfig(epochs=1, grad_accum_steps=64), 0, (6.0 * 2560, 1.0))

    def lost(share):
        turns = []
        for step in range(plan.num_steps):
            ranks = [share(step, rank) for rank in range(num_ranks)]
            turns += [[plan.costs[m].sum() for m in turn] for turn in zip(*ranks, strict=True)]
        return np.max(turns, axis=1).sum() / np.mean(turns, axis=1).sum()

    def unsorted(step, rank):
        rows = plan.order(0)[step * 64 : step * 64 + 64]
        rows = np.random.default_rng(step).permutation(rows)
        return [[row] for row in rows[rank::num_ranks]]

    assert lost(lambda step, rank: plan.share(step, rank, num_ranks)) < 1.02
    assert lost(unsorted) > 1.1


def test_a_step_is_a_mixture():
    """Rows of equal cost are grouped, but a step has several groups."""
    plan = schedule(4096, TrainConfig(epochs=1, grad_accum_steps=64))
    spread = [np.unique(plan.costs[plan.rows_of(step)]).size for step in range(plan.num_steps)]
    assert np.mean(spread) > 2.5  # of four


@pytest.mark.parametrize(
    ("epochs", "num_rows", "steps", "samples"), [(0.5, 10, 2, 5), (0.01, 10, 1, 1), (1.1, 10, 3, 11), (0.1, 30, 1, 3)]
)
def test_fractions_of_an_epoch(epochs, num_rows, steps, samples):
    plan = schedule(num_rows, TrainConfig(epochs=epochs, grad_accum_steps=4))
    assert (plan.num_steps, plan.num_samples) == (steps, samples)


def test_fewer_rows_than_a_step_reads_are_one_short_step_an_epoch():
    plan = schedule(3, TrainConfig(epochs=2, grad_accum_steps=4, micro_batch_size=2))
    assert (plan.num_steps, plan.num_samples) == (2, 6)
    for step in range(2):
        assert sorted(plan.rows_of(step)) == [0, 1, 2], "no row twice in a step"
        shares = [plan.share(step, rank, 4) for rank in range(4)]
        assert sorted(row for share in shares for rows in share for row in rows) == [0, 1, 2]
    assert schedule(3, TrainConfig(epochs=1, grad_accum_steps=4)).num_steps == 1
