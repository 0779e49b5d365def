"""Arrays that another thread writes to during a call: a result or a DataError, never a panic or a crash."""

import threading

import numpy as np
import pytest
from calls import CALLS

from dasd_lite import _rust
from dasd_lite.errors import DataError

NUM = 100_000
"""Elements of an input: enough for a call on the pool's threads."""


def test_every_function_that_takes_arrays_is_here() -> None:
    assert set(CALLS) == set(_rust.__all__) - {"parse_toml"}


@pytest.mark.parametrize("name", CALLS)
def test_arrays_changed_during_a_call(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, options = CALLS[name](NUM)
    call = getattr(_rust, name)
    call(*arguments, **options)
    arrays = [value for value in arguments if isinstance(value, np.ndarray)]
    good = [array.copy() for array in arrays]
    started, stop = threading.Event(), threading.Event()

    def write() -> None:
        """Overwrite a part of one array with random bits, and repair it."""
        rng = np.random.default_rng(1)
        while not stop.is_set():
            which = int(rng.integers(len(arrays)))
            start = int(rng.integers(len(arrays[which])))
            part = arrays[which][start : start + int(rng.integers(1, 1000))]
            part[:] = np.frombuffer(rng.bytes(part.nbytes), part.dtype)
            part[:] = good[which][start : start + len(part)]
            started.set()

    thread = threading.Thread(target=write)
    thread.start()
    started.wait()
    try:
        for _ in range(60):
            try:
                call(*arguments, **options)
            except DataError as error:
                assert "\n" not in str(error)
    finally:
        stop.set()
        thread.join()
    call(*arguments, **options)  # as if nothing had happened
    assert capfd.readouterr() == ("", "")
