"""Arrays that another thread writes to during a call: a result or a DataError, never a panic or a crash."""

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from dasd_lite import _rust
from dasd_lite.errors import DataError
from dasd_lite.method.ragged import offsets_of

Arguments: TypeAlias = tuple[list[Any], dict[str, Any]]

RNG = np.random.default_rng(0)
ROWS = 2_000
"""Rows of each input: enough for a call on the pool's threads."""


def column(dtype: Any, low: int, high: int, num: int) -> NDArray[Any]:
    return RNG.integers(low, high, num).astype(dtype)


def rows() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lengths of rows, and their offsets."""
    lengths = RNG.integers(1, 100, ROWS)
    return lengths, offsets_of(lengths)


def packing() -> Arguments:
    lengths = column(np.int64, 1, 500, 100_000)
    return [lengths], {"seq_len": 500, "alignment": 1, "method": "best_fit", "drop_overlong": True}


def balancing() -> Arguments:
    items, offsets = np.arange(100_000, dtype=np.uint32), np.arange(0, 100_001, 4)
    options = {"num_ranks": 4, "micro_steps": 1, "window": 64, "cost": (1.0, 1.0), "seed": 0}
    return [items, offsets, column(np.int32, 1, 500, 100_000)], options


def layout() -> Arguments:
    _, offsets = rows()
    items, item_offsets = np.arange(ROWS, dtype=np.uint32), np.arange(ROWS + 1)
    rows_asked = RNG.integers(0, ROWS, 100_000)
    return [offsets, items, item_offsets, rows_asked], {"seq_len": 100, "alignment": 1}


def gathering() -> Arguments:
    _, offsets = rows()
    tokens = column(np.uint32, 0, 2**31, offsets[-1])
    buffers = {name: np.zeros(len(tokens), np.int32) for name in ("ids", "position_ids", "labels")}
    inputs = [tokens, offsets, column(np.uint8, 0, 2, len(tokens)), np.arange(ROWS, dtype=np.uint32)]
    return [*inputs, offsets.astype(np.int32)], {"pad_id": 0, "reused": True, **buffers}


def texts() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    pieces = ["One. ", "Two! ", "é。", "$1. 2$ ", "\n", "<think>", "```\n", "word “end.” "]
    parts = ["".join(RNG.choice(pieces, 20)).encode() for _ in range(ROWS)]
    return np.frombuffer(bytearray(b"".join(parts)), np.uint8), offsets_of([len(part) for part in parts])


def splitting() -> Arguments:
    return list(texts()), {}


def repetition_of_texts() -> Arguments:
    text, offsets = texts()
    return [text, offsets, *_rust.sentence_ends(text, offsets)], {}


def repetition_of_ids() -> Arguments:
    _, offsets = rows()
    return [column(np.int32, 0, 3, offsets[-1]), offsets, 4], {}


def spans() -> Arguments:
    lengths, offsets = rows()
    ends = np.concatenate([np.unique([length // 2 + 1, length]) for length in lengths])
    end_offsets = offsets_of([len(np.unique([length // 2 + 1, length])) for length in lengths])
    return [np.ones(offsets[-1], np.int32), offsets, ends, end_offsets, np.zeros(ROWS, np.int64)], {}


def statistics() -> Arguments:
    _, sentences = rows()
    teacher, student = (-RNG.random(sentences[-1], np.float32) for _ in range(2))
    return [teacher, sentences, student, sentences.copy(), np.arange(0, ROWS + 1, 10), 0.1], {}


def classifying() -> Arguments:
    return [RNG.random(200_000, np.float32), RNG.random(200_000, np.float32), 0.1], {}


def counting() -> Arguments:
    return [column(np.int8, -1, 3, 200_000), np.arange(0, 200_001, 100)], {}


PREPARED: dict[str, Callable[[], Arguments]] = {
    "pack": packing,
    "balance_rows": balancing,
    "gather_layout": layout,
    "gather_rows": gathering,
    "sentence_ends": splitting,
    "text_repetition": repetition_of_texts,
    "repeated_ngrams": repetition_of_ids,
    "sentence_spans": spans,
    "sentence_stats": statistics,
    "classify": classifying,
    "class_counts": counting,
}


def garbage(array: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Any values at all: every bit at random."""
    return np.frombuffer(rng.bytes(array.nbytes), array.dtype)


def test_every_function_that_takes_arrays_is_here() -> None:
    assert set(PREPARED) == set(_rust.__all__) - {"parse_toml"}


@pytest.mark.parametrize("name", PREPARED)
def test_arrays_changed_during_a_call(name: str) -> None:
    arguments, options = PREPARED[name]()
    call = getattr(_rust, name)
    call(*arguments, **options)
    arrays = [value for value in arguments if isinstance(value, np.ndarray)]
    good = [array.copy() for array in arrays]
    started, stop = threading.Event(), threading.Event()

    def write() -> None:
        """Damage a part of one array, and repair it: at no moment is more than that wrong."""
        rng = np.random.default_rng(1)
        while not stop.is_set():
            which = int(rng.integers(len(arrays)))
            start = int(rng.integers(len(arrays[which])))
            part = slice(start, start + int(rng.integers(1, 1000)))
            arrays[which][part] = garbage(arrays[which][part], rng)
            arrays[which][part] = good[which][part]
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
