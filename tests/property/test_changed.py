"""Arrays that another thread writes to during a call: a result or a DataError, never a panic or a crash."""

import mmap
import os
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


def test_an_index_that_changes_between_two_reads() -> None:
    """The call itself overwrites the indices that it has yet to read: its output lies one element behind its input."""
    num = 1_000
    file = os.memfd_create("shared")
    os.ftruncate(file, 4 * (num + 1))
    sequences, ids = (np.frombuffer(mmap.mmap(file, 0), dtype) for dtype in (np.uint32, np.int32))
    sequences[:] = np.arange(num + 1)
    tokens, edges = np.full(num, 2_000_000_000, np.uint32), np.arange(num + 1)
    arguments = [tokens, edges, np.ones(num, np.uint8), sequences[:-1], edges.astype(np.int32)]
    with pytest.raises(DataError, match=r"sequences\[1\] is 2000000000; it must be from 0 and below 1000"):
        _rust.gather_rows(*arguments, pad_id=0, reused=True, ids=ids[1:], position_ids=None, labels=None)
