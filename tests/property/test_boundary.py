"""Long calls into Rust let other threads run, and Ctrl-C stops them."""

import signal
import threading
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from dasd_lite.text import repeated_ngrams


def slow_ids() -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Random bits repeat everywhere but nowhere for long, which is the most work for the search."""
    ids = np.random.default_rng(0).integers(0, 2, 4_000_000, np.int32)
    return ids, np.arange(0, len(ids) + 1, 100_000)


def test_other_threads_run_meanwhile() -> None:
    ids, offsets = slow_ids()
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.005):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    repeated_ngrams(ids[:2_000_000], offsets[:21], 8)
    end = time.perf_counter()
    stop.set()
    thread.join()
    during = [at for at in ticks if start < at < end]
    assert end - start > 0.1, "too short to tell"
    assert len(during) > (end - start) / 0.1


def test_ctrl_c_stops_a_long_call() -> None:
    ids, offsets = slow_ids()
    raised_at: list[float] = []

    def press() -> None:
        raised_at.append(time.perf_counter())
        signal.raise_signal(signal.SIGINT)

    timer = threading.Timer(0.1, press)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(20):
            repeated_ngrams(ids, offsets, 8)
    stopped_at = time.perf_counter()
    timer.join()
    assert stopped_at - raised_at[0] < 0.5, "0.2 s, and as much again for a busy machine"


def test_the_next_call_is_as_if_nothing_had_happened() -> None:
    ids, offsets = slow_ids()
    found = repeated_ngrams(ids[:100_000], offsets[:2], 8)
    assert found.num_repeated[0] == 100_000 - 8 + 1 - 256
