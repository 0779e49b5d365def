"""A call of each Rust function that takes arrays, in any size, for tests of the boundary.

Most inputs are zeros, which take no memory until they are written to.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dasd_lite import _rust
from dasd_lite.method.ragged import offsets_of

Arguments: TypeAlias = tuple[list[Any], dict[str, Any]]


def column(dtype: Any, low: int, high: int, num: int) -> NDArray[Any]:
    return np.random.default_rng(0).integers(low, high, num).astype(dtype)


def packing(num: int) -> Arguments:
    return [column(np.int64, 1, 500, num)], options_of_packing("tight")


def options_of_packing(method: str, seq_len: int = 500, alignment: int = 1) -> dict[str, Any]:
    return {"seq_len": seq_len, "alignment": alignment, "method": method, "drop_overlong": True}


def one_long_move(num: int) -> Arguments:
    return [np.full(num, 7, np.int32)], options_of_packing("best_fit")


def tiny_sequences(num: int) -> Arguments:
    return [column(np.int32, 1, 3, num)], options_of_packing("tight", seq_len=1 << 24, alignment=2)


def balancing(num: int) -> Arguments:
    items, offsets = np.arange(num, dtype=np.uint32), np.arange(0, num + 1, 4)
    options = {"num_ranks": 4, "micro_steps": 1, "window": 64, "cost": (1.0, 1.0), "seed": 0}
    return [items, offsets, column(np.int32, 1, 500, num)], options


def layout(num: int) -> Arguments:
    items, edges = np.arange(1_000, dtype=np.uint32), np.arange(1_001)
    offsets = offsets_of(column(np.int64, 1, 100, 1_000))
    return [offsets, items, edges, column(np.int64, 0, 1_000, num)], {"seq_len": 100, "alignment": 1}


def gathering(num: int) -> Arguments:
    offsets = np.arange(0, num + 1, 100)
    tokens, mask = np.zeros(num, np.uint32), np.zeros(num, np.uint8)
    buffers = {name: np.zeros(num, np.int32) for name in ("ids", "position_ids", "labels")}
    sequences = np.arange(len(offsets) - 1, dtype=np.uint32)
    return [tokens, offsets, mask, sequences, offsets.astype(np.int32)], {"pad_id": 0, "reused": True, **buffers}


def texts(num: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """About `num` bytes in texts that the scanner has to examine closely."""
    pieces = ["One. ", "Two! ", "é。", "$1. 2$ ", "\n", "<think>", "```\n", "word “end.” "]
    text = "".join(np.random.default_rng(0).choice(pieces, 20_000)).encode()
    number = max(num // len(text), 1)
    return np.frombuffer(bytearray(number * text), np.uint8), np.arange(0, number * len(text) + 1, len(text))


def splitting(num: int) -> Arguments:
    return list(texts(num)), {}


def an_open_fence(num: int) -> Arguments:
    text = "```\n" + "a line of code\n" * (num // 15)
    return [np.frombuffer(text.encode(), np.uint8), np.array([0, len(text)])], {}


def repetition_of_texts(num: int) -> Arguments:
    text, offsets = texts(num)
    return [text, offsets, *_rust.sentence_ends(text, offsets)], {}


def repetition_of_ids(num: int) -> Arguments:
    """Random bits repeat everywhere but nowhere for long, which is the most work for the search."""
    return [column(np.int32, 0, 2, num), np.array([0, num]), 8], {}


def spans(num: int) -> Arguments:
    edges = np.arange(0, num + 1, 100)
    ends = np.tile([20, 50, 100], len(edges) - 1)
    end_offsets = np.arange(0, len(ends) + 1, 3)
    text, token_bytes = np.full(edges[-1], ord("a"), np.uint8), np.ones(edges[-1], np.int32)
    first_bytes = np.zeros(len(edges) - 1, np.int64)
    return [text, edges, token_bytes, edges, ends, end_offsets, first_bytes], {}


def statistics(num: int) -> Arguments:
    sentences = np.arange(0, num + 1, 20)
    teacher, student = (np.zeros(sentences[-1], np.float32) for _ in range(2))
    responses = np.arange(0, len(sentences), 10)
    responses[-1] = len(sentences) - 1
    return [teacher, sentences, student, sentences.copy(), responses, 0.1], {}


def classifying(num: int) -> Arguments:
    return [np.zeros(num, np.float32), np.zeros(num, np.float32), 0.1], {}


def counting(num: int) -> Arguments:
    return [np.zeros(num, np.int8), np.arange(0, num + 1, 100)], {}


CALLS: dict[str, Callable[[int], Arguments]] = {
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
