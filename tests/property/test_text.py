"""Sentence ends and repetition against the plain-Python reference, on texts made of what the rules look at."""

import json
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dasd_lite.errors import DataError
from dasd_lite.method.sentences import Ragged, repeated_ngrams, sentence_ends, text_repetition

PIECES = [
    *[
        "a",
        "word",
        "Word",
        "Dr",
        "e.g",
        "I",
        "A",
        "7",
        "3.14",
        "x!",
        "5!",
        "etc",
        "No",
        "min",
        "option",
        "by",
        "The",
        "then",
        "J. ",
        "z. ",
        "U.S",
        "p.m",
        "i.e",
        "что",
        "Т",
        "'s",
        "—",
        "、",
        "一",
        "é",
        "e\u0301",
    ],
    *[".", ". ", "!", "! ", "?", "...", "…", "… ", "。", "！", "？", "」", "』", '"', "'", ")", "]", "*", "_", "”"],
    *["।", "॥", "؟", "۔", "։", "።", "፧", "။", "។", "៕", "と", " »", "\u202f»", "« ", "“", "(", "+", "−", ";", "क", "م"],
    *[" ", "  ", "\t", "\n", "\n\n", "\r\n", "\r", "\u3000", "\u00a0", "\u2028", "\x1c"],
    *["$", "$$", "$x. y$", "\\$", "\\(", "\\)", "\\[", "\\]", "\\", "\\\\", "\\é", "\\\n"],
    *["`", "```", "````", "\n```\n", "\n```py\n", "\n  ```\n", "```\r\n", "`````````"],
    *["<think>", "</think>", "<", "\n</think>\n", "1. ", "\n2) ", "\n12.\t", "\n2024. ", "- "],
    *["🎉", "👩\u200d👩\u200d👧", "🇩🇪", "\U0010ffff"],
]
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=50).map("".join), st.text(max_size=50))


def marked_texts(name: str) -> list[tuple[str, str, set[int]]]:
    """Kind, text, and the places where a reader would start a new sentence (golden/SENTENCES.md), in bytes."""
    rows = []
    for line in (Path(__file__).parents[1] / "golden" / name).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        *parts, _ = row["text"].split("‖")
        rows.append((row["kind"], row["text"].replace("‖", ""), set(accumulate(len(part.encode()) for part in parts))))
    return rows


def counts(texts: list[tuple[str, str, set[int]]]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """By kind: ends that were found and are marked, that are not marked, and that were not found."""
    right, extra, missed = Counter[str](), Counter[str](), Counter[str]()
    for kind, text, marked in texts:
        found = set(sentence_ends(text).tolist()) - {len(text.encode())}
        right[kind] += len(found & marked)
        extra[kind] += len(found - marked)
        missed[kind] += len(marked - found)
    return right, extra, missed


@pytest.mark.parametrize(
    ("name", "num_texts", "least"), [("sentences.jsonl", 311, 0.97), ("sentences_heldout.jsonl", 120, 0.95)]
)
def test_ends_that_were_marked_by_hand(name: str, num_texts: int, least: float) -> None:
    texts = marked_texts(name)
    right, extra, missed = counts(texts)
    assert (len(right), len(texts)) == (20, num_texts)
    assert right.total() / (right.total() + extra.total()) >= least, extra  # precision
    assert right.total() / (right.total() + missed.total()) >= least, missed  # recall


def test_no_kind_of_text_is_bad() -> None:
    right, extra, missed = counts(marked_texts("sentences.jsonl"))
    assert all(extra[kind] + missed[kind] <= 0.25 * (right[kind] + missed[kind]) for kind in right), (extra, missed)


def test_no_text_is_in_both_sets() -> None:
    held_out = {text for _, text, _ in marked_texts("sentences_heldout.jsonl")}
    assert not held_out & {text for _, text, _ in marked_texts("sentences.jsonl")}


@settings(max_examples=1500, deadline=None)
@given(text=TEXTS)
@example("")
@example("`a. b` c. `d.\n` e")
@example("`" + "a" * 4094 + ". b` c. d` e")
@example("```\n\nx\n\n\n\ny\n \nz\n\n```\nafter")
@example(" \n ")
@example("```\na\n\x0b\n\nb\n```")
@example("```\na\n\n\u3000\n```\nb")
@example("$" + "a" * 4093 + ". b$ c")
@example("$" + "a" * 4094 + ". b$ c")
@example("\\(" + "é. " * 1100 + "\\) \\( b. \\) c")
def test_ends_of_the_reference(text: str) -> None:
    ends = sentence_ends(text)
    assert ends.dtype == np.int64
    assert ends.tolist() == reference.sentence_ends(text)
    assert sentence_ends(text.encode()).tolist() == ends.tolist()
    assert (np.diff(ends, prepend=0) > 0).all()
    assert (ends[-1] if len(ends) else 0) == len(text.encode())
    parts = [text.encode()[start:end].decode() for start, end in pairwise([0, *ends])]
    assert "".join(parts) == text


def test_every_word_of_the_tables_and_every_full_stop() -> None:
    words = reference.ABBREVIATIONS | reference.ENDING_ABBREVIATIONS | reference.NUMBERED
    near = {form for word in words for form in (word, word.title(), word[:-1], word + "s", "x" + word, "é" + word)}
    texts = [f"{before}{word}. {after}" for word in near for before in ("", "In “") for after in ("", "The", "x", "5")]
    texts += [f"a{mark}b{mark}" for mark in (*reference.FREE, *".!?…—、ःক")]
    column = pa.array(texts, pa.large_string())
    ends, offsets = sentence_ends(column)
    assert [ends[a:b].tolist() for a, b in pairwise(offsets)] == [reference.sentence_ends(text) for text in texts]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6), large=st.booleans(), data=st.data())
def test_a_column_is_its_texts(texts: list[str], large: bool, data: st.DataObject) -> None:
    array = pa.array(texts, pa.large_string() if large else pa.string())
    start = data.draw(st.integers(0, len(texts)))
    stop = data.draw(st.integers(start, len(texts)))
    whole = pa.chunked_array([array[:start], array[start:]])
    for column, expected in ((array[start:stop], texts[start:stop]), (whole, texts)):
        ends, offsets = sentence_ends(column)
        assert offsets.dtype == np.int64
        rows = [ends[a:b].tolist() for a, b in pairwise(offsets)]
        assert rows == [sentence_ends(text).tolist() for text in expected]


SENTENCES = [
    "A sentence of some length. ",
    "Short. ",
    "Another, rather long one! ",
    "一个很长的句子。",
    "\n",
    " \n",
    "  ",
]


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(SENTENCES), max_size=25).map("".join), max_size=4))
def test_repetition_of_the_reference(texts: list[str]) -> None:
    column = pa.array(texts, pa.large_string())
    repetition = text_repetition(column)
    given_ends = text_repetition(column, sentence_ends(column))
    for row, text in enumerate(texts):
        data = text.encode()
        ends = reference.sentence_ends(text)
        sentences = [data[start:end] for start, end in pairwise([0, *ends])]
        assert repetition.lines[row] == given_ends.lines[row] == reference.repeated_share(data.split(b"\n"), len(data))
        assert repetition.sentences[row] == given_ends.sentences[row] == reference.repeated_share(sentences, len(data))


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.lists(st.integers(1, 4).flatmap(lambda most: st.lists(st.integers(0, most), max_size=40)), max_size=5),
    n=st.integers(1, 6),
    dtype=st.sampled_from([np.int32, np.uint32, np.int64, np.uint8]),
)
def test_ngrams_of_the_reference(sequences: list[list[int]], n: int, dtype: Any) -> None:
    offsets = np.cumsum([0, *map(len, sequences)])
    repetition = repeated_ngrams(np.array([token for ids in sequences for token in ids], dtype), offsets, n)
    expected = [reference.repeated_ngrams(ids, n) for ids in sequences]
    assert list(zip(repetition.num_repeated.tolist(), repetition.longest_stretch.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (b"ab\xff", DataError, "text 0 is not UTF-8 at its byte 2"),
        ("ab\ud800", DataError, "the text is not UTF-8: a lone surrogate at character 2"),
        (pa.array(["a", None]), DataError, r"text 1 is missing \(null\)"),
        (pa.array([1]), TypeError, "texts are Int64Array; they must be an Arrow column of string"),
        (["a"], TypeError, "texts are list; they must be"),
    ],
)
def test_bad_text(text: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sentence_ends(text)


def test_a_column_with_a_text_that_is_not_utf8() -> None:
    offsets, text = pa.py_buffer(np.array([0, 1, 3], np.int32).tobytes()), pa.py_buffer(b"a\xc3(")
    with pytest.raises(DataError, match="text 1 is not UTF-8 at its byte 0"):
        sentence_ends(pa.StringArray.from_buffers(2, offsets, text))


def test_sentences_of_another_column() -> None:
    sentences = Ragged(np.array([3]), np.array([0, 1]))
    with pytest.raises(DataError, match="response 0: the last sentence ends at byte 3, the text has 2 bytes"):
        text_repetition(pa.array(["ab"]), sentences)
    with pytest.raises(DataError, match="offsets has 3 elements and end_offsets 2; they must be equally many"):
        text_repetition(pa.array(["ab", "c"]), sentences)


@pytest.mark.parametrize(
    ("ids", "offsets", "n", "error", "message"),
    [
        ([1, 2], [0, 3], 2, DataError, r"offsets\[1\] is 3, but there are 2 values; the last offset is their number"),
        ([1, 2], [0, 2, 1, 2], 2, DataError, r"offsets\[2\] is 1, less than the 2 before it; offsets never decrease"),
        ([1, 2], [1, 2], 2, DataError, r"offsets\[0\] is 1; offsets start at 0"),
        ([1, 2], [0, 2], 0, ValueError, "n is 0; it must be from 1 to"),
        ([1, 2**31], [0, 2], 1, DataError, r"ids\[1\] is 2147483648; an id is from 0 to 2147483647"),
        ([1.0], [0, 1], 1, TypeError, "ids have dtype float64; they must be integers"),
        ([1], [0.0, 1.0], 1, TypeError, "offsets has dtype float64; it must be int64"),
        ([[1]], [0, 1], 1, ValueError, r"ids has shape \[1, 1\]; it must be one-dimensional"),
    ],
)
def test_bad_ids(ids: Any, offsets: Any, n: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        repeated_ngrams(np.array(ids), np.array(offsets), n)
