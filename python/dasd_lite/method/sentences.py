"""Sentences of texts, and how much a text repeats itself.

Input: texts as `str`, `bytes` or an Arrow column. Output: sentence ends as byte offsets into the UTF-8 text.
Invariant: the ends of a text strictly increase, the last is the number of its bytes, and none lies inside a character;
an empty text has none. So sentences cover a text without gaps, and byte offsets work for any two tokenizers.

The rules are in Rust (`rust/core/src/segment.rs`, `repeat.rs`, `stretch.rs`) and run without the GIL; Ctrl-C stops
them. Columns go to Rust without a copy.
"""

from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dasd_lite import _rust
from dasd_lite.errors import DataError
from dasd_lite.method.ragged import Ragged, check_array, check_int

TextColumn: TypeAlias = "pa.Array[Any] | pa.ChunkedArray[Any]"  # quoted: they are generic for type checkers only


class TextRepetition(NamedTuple):
    """Share of each text's bytes in repeated lines and sentences.

    Attributes:
        lines: Bytes of repeated lines ÷ bytes of the text, 0 to 1; float64 `[num_texts]`.
        sentences: The same for sentences.
    """

    lines: NDArray[np.float64]
    sentences: NDArray[np.float64]


@overload
def sentence_ends(text: str | bytes) -> NDArray[np.int64]: ...
@overload
def sentence_ends(text: TextColumn) -> Ragged: ...
def sentence_ends(text: "str | bytes | TextColumn") -> NDArray[np.int64] | Ragged:
    r"""Split texts into sentences.

    A sentence ends after a line break; after `. ! ? …` (and closing quotes and brackets) before white space, but
    not in decimals, after abbreviations, initials and numbers of list items, or where an ellipsis runs on; after
    the full stops of scripts that have their own (Chinese, Hindi, Urdu, Khmer, …), whatever follows. `<think>` and
    `</think>` are sentences by themselves. A fenced block of code is apart from the text around it, and ends a
    sentence at each empty line. Nothing ends inside `$…$`, `$$…$$`, `\(…\)`, `\[…\]` and between two backticks.
    White space belongs to the sentence before it. docs/selection.md has the rules and how well they do.

    Args:
        text: One text, or an Arrow column of texts (string or large_string; the chunks of a chunked one are joined).

    Returns:
        For one text its sentence ends as byte offsets, int64 `[num_sentences]`; for a column those of all texts,
        concatenated, with int64 offsets `[num_texts + 1]`.

    Raises:
        DataError: A text is not UTF-8, or missing (null); names its index.
        TypeError: `text` is something else.

    Source: the splitter is ours, since the DASD report (arXiv 2601.09088, §4) does not describe one.
    """
    ends, offsets = _rust.sentence_ends(*text_column(text))
    return ends if isinstance(text, str | bytes) else Ragged(ends, offsets)


def text_repetition(texts: TextColumn, sentences: Ragged | None = None) -> TextRepetition:
    """Return how much of each text is in lines, and in sentences, that it contains earlier already.

    White space around a line or sentence is ignored, both in comparisons and in the number of bytes; those of at most 8
    bytes are skipped; the first of several equal ones is not a repetition. An empty text has shares of 0.

    Args:
        texts: An Arrow column.
        sentences: `sentence_ends(texts)`, if already known.

    Returns:
        Two shares per text.

    Raises:
        DataError: As `sentence_ends`; or `sentences` does not fit the texts.
        TypeError: `texts` is not a column of texts.

    Source: duplicate-line fractions of Gopher (arXiv 2112.11446, table A1); the DASD report (arXiv 2601.09088, §6.3)
    filters repeated sentences and paragraphs.
    """
    text, offsets = text_column(texts)
    ends, end_offsets = _rust.sentence_ends(text, offsets) if sentences is None else sentences
    return TextRepetition(*_rust.text_repetition(text, offsets, ends, end_offsets))


class NgramRepetition(NamedTuple):
    """How much of each sequence of ids is repeated.

    Attributes:
        num_repeated: Number of positions whose n-gram also begins at an earlier position; int64 `[num_sequences]`.
        longest_stretch: Length in ids of the longest stretch of back-to-back copies: at least three, and at least 3n
            ids together; a last copy may be cut short. 0 if there is none; int64 `[num_sequences]`.
    """

    num_repeated: NDArray[np.int64]
    longest_stretch: NDArray[np.int64]


def repeated_ngrams(ids: NDArray[np.integer[Any]], offsets: NDArray[np.int64], n: int) -> NgramRepetition:
    """Count the repeated n-grams of token ids within each sequence, and find the longest loop, exactly.

    Args:
        ids: Token ids; any integer dtype `[num_ids]`, read without a copy if contiguous int32 or uint32.
        offsets: Sequence s is `ids[offsets[s]:offsets[s + 1]]`; int64 `[num_sequences + 1]`.
        n: Length of an n-gram in ids, at least 1. A sequence of L ids has max(0, L - n + 1) n-grams.

    Returns:
        Two numbers per sequence.

    Raises:
        DataError: The offsets do not fit, or an id of a dtype other than these two is negative or at least 2^31; names
            index and value.
        TypeError: A wrong dtype.
        ValueError: `n` is below 1, or an array is not one-dimensional.

    Source: n-gram repetition as a filter: DASD report (arXiv 2601.09088, §6.3).
    """
    n = check_int("n", n, 1, 2**63 - 1)
    ids, offsets = np.asarray(ids), check_array("offsets", offsets, np.int64)
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"ids have dtype {ids.dtype}; they must be integers")
    if ids.dtype not in (np.int32, np.uint32):
        bad = np.flatnonzero((ids < 0) | (ids >= 2**31))
        if len(bad):
            raise DataError(f"ids[{bad[0]}] is {ids[bad[0]]}; an id is from 0 to 2147483647")
        ids = ids.astype(np.int32)
    return NgramRepetition(*_rust.repeated_ngrams(check_array("ids", ids, np.int32, np.uint32), offsets, n))


def text_column(text: "str | bytes | TextColumn") -> Ragged:
    """Return the bytes of one text or of a column, the latter without a copy, and their 64-bit offsets from 0."""
    if not isinstance(text, str | bytes):
        return _column(text)
    try:
        encoded = text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise DataError(f"the text is not UTF-8: a lone surrogate at character {error.start}") from None
    return Ragged(np.frombuffer(encoded, np.uint8), np.array([0, len(encoded)], np.int64))


def _column(texts: TextColumn) -> Ragged:
    array: Any = texts
    if isinstance(texts, pa.ChunkedArray):
        array = texts.chunk(0) if texts.num_chunks == 1 else texts.combine_chunks()
    if not isinstance(array, pa.StringArray | pa.LargeStringArray):
        raise TypeError(f"texts are {type(array).__name__}; they must be an Arrow column of string or large_string")
    if array.null_count:
        index = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"text {index} is missing (null)")
    if len(array) == 0:
        return Ragged(np.empty(0, np.uint8), np.zeros(1, np.int64))
    _, offset_buffer, byte_buffer = (None if buffer is None else memoryview(buffer) for buffer in array.buffers())
    assert offset_buffer is not None, "an Arrow column with rows has offsets"
    dtype = np.dtype(np.int64 if isinstance(array, pa.LargeStringArray) else np.int32)
    offsets = np.frombuffer(offset_buffer, dtype)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    text = np.empty(0, np.uint8) if byte_buffer is None else np.frombuffer(byte_buffer, np.uint8)
    return Ragged(text[offsets[0] : offsets[-1]], offsets - offsets[0])
