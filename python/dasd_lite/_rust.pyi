"""The Rust core: thin functions over numpy arrays. Use `dasd_lite.method`, which checks dtypes and shapes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "balance_rows",
    "class_counts",
    "classify",
    "gather_layout",
    "gather_rows",
    "pack",
    "parse_toml",
    "repeated_ngrams",
    "sentence_ends",
    "sentence_spans",
    "sentence_stats",
    "text_repetition",
]

def pack(
    lengths: NDArray[np.int32] | NDArray[np.uint32] | NDArray[np.int64],
    *,
    seq_len: int,
    alignment: int,
    method: str,
    drop_overlong: bool,
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint32], int]: ...
def balance_rows(
    items: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int32] | NDArray[np.uint32] | NDArray[np.int64],
    *,
    num_ranks: int,
    micro_steps: int,
    window: int,
    cost: tuple[float, float],
    seed: int,
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]: ...
def gather_layout(
    offsets: NDArray[np.int64],
    items: NDArray[np.uint32],
    item_offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    *,
    seq_len: int,
    alignment: int,
) -> tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.int64]]: ...
def gather_rows(
    tokens: NDArray[np.int32] | NDArray[np.uint32],
    offsets: NDArray[np.int64],
    loss_mask: NDArray[np.uint8] | None,
    sequences: NDArray[np.uint32],
    cu_seqlens: NDArray[np.int32],
    *,
    pad_id: int,
    ids: NDArray[np.int32],
    position_ids: NDArray[np.int32] | None,
    labels: NDArray[np.int32] | None,
    reused: bool,
) -> None: ...
def sentence_ends(
    text: NDArray[np.uint8], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def text_repetition(
    text: NDArray[np.uint8], offsets: NDArray[np.int64], ends: NDArray[np.int64], end_offsets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def repeated_ngrams(
    ids: NDArray[np.int32] | NDArray[np.uint32], offsets: NDArray[np.int64], n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def sentence_spans(
    text: NDArray[np.uint8],
    text_offsets: NDArray[np.int64],
    token_bytes: NDArray[np.int32],
    token_offsets: NDArray[np.int64],
    ends: NDArray[np.int64],
    end_offsets: NDArray[np.int64],
    first_bytes: NDArray[np.int64] | None,
) -> NDArray[np.int64]: ...
def sentence_stats(
    teacher_logprobs: NDArray[np.float32],
    teacher_spans: NDArray[np.int64],
    student_logprobs: NDArray[np.float32],
    student_spans: NDArray[np.int64],
    response_offsets: NDArray[np.int64],
    beta: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int8], NDArray[np.int64]]: ...
def classify(p_teacher: NDArray[np.float32], p_student: NDArray[np.float32], beta: float) -> NDArray[np.int8]: ...
def class_counts(classes: NDArray[np.int8], offsets: NDArray[np.int64]) -> NDArray[np.int64]: ...
def parse_toml(text: str) -> tuple[dict[str, Any], dict[tuple[str | int, ...], int]]:
    """Parse a TOML document.

    Returns:
        The values as `tomllib` gives them, and for the path of every key and array element the line where it is first
        written, from 1.

    Raises:
        ConfigError: `LINE:COLUMN: what is wrong`; also for dates and times, integers of more than 128 bits, more than
            64 keys and brackets inside each other, and texts of more than 1 MiB.
    """
