"""Which bytes of a text each token has that spells it.

Input: an answer in our form (`<think>`, thinking, `</think>`, answer), and what each token spells. Output: how many
bytes of the answer each token has. Invariant: nothing is fitted by guess; the tokens spell the text byte by byte, and
what they do not spell is one of these:

* The beginning of the text, if it is `<think>` or white space: a chat template wrote it, and no token has it.
* The separator `</think>` with the white space around it. In the channels of gpt-oss it stands where the tokens have
  `<|end|><|start|>assistant<|channel|>final<|message|>`. Its bytes belong to the last token of this header, as in
  harmony.py, or of the special tokens that a source writes in its place; the other tokens there have no bytes. If the
  tokens go from the thinking to the answer without any in between, the last token of the thinking has these bytes,
  as in a server's reply.
* The end: special tokens after the text have no bytes, like an end token that was sampled.

What tokens may spell although the text has it not: special tokens, white space at the ends of thinking and answer, and
tags that readers of files rewrite or remove, as `<answer>`. A text with U+FFFD for bytes that are not UTF-8 is compared
with what a decoder makes of the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dasd_lite.chat import harmony
from dasd_lite.chat.spelling import ByteLengths, replace_invalid

Edges = npt.NDArray[np.int64]

_OPEN, _CLOSE = b"<think>", b"</think>"
_WHITE = b" \t\n\r\f\v"
# Tags that readers of files rewrite to <think> and </think>, or remove: see data/formats/thinking.py.
_TAG = re.compile(
    rb"</?think>|\[/?THINK\]|<\|(?:begin|end)_of_(?:thought|solution)\|>|</?(?:answer|final_answer|final)>"
)
_OPENED = re.compile(rb"\s*(?:<think>|\[THINK\]|<\|begin_of_thought\|>)?\s*")
_CLOSED = re.compile(
    rb"\s*(?:</think>|\[/THINK\]|<\|end_of_thought\|>)?\s*"
    rb"(?:<(?:answer|final_answer|final|\|begin_of_solution\|)>)?\s*"
)
_ENDED = re.compile(rb"\s*(?:</(?:answer|final_answer|final)>|<\|end_of_solution\|>)?\s*")


class Spelled(NamedTuple):
    """What tokens spell.

    Attributes:
        raw: The bytes of all tokens, one after another.
        lengths: How many of them each token has; `[num_tokens]`.
        special: Position and name of special tokens; the name is "" for those that harmony does not have.
    """

    raw: bytes
    lengths: npt.NDArray[np.int32]
    special: Mapping[int, str]

    @classmethod
    def of(cls, pieces: Sequence[bytes], special: Mapping[int, str]) -> Spelled:
        """Join what each token spells."""
        return cls(b"".join(pieces), np.fromiter(map(len, pieces), np.int32, len(pieces)), special)

    @property
    def edges(self) -> Edges:
        """Where in `raw` each token begins, and the end; `[num_tokens + 1]`."""
        return np.append(0, np.cumsum(self.lengths, dtype=np.int64))

    @property
    def num_text(self) -> int:
        """Tokens up to the last one that is neither special nor without bytes."""
        is_text = self.lengths > 0
        is_text[list(self.special)] = False
        return int(np.flatnonzero(is_text)[-1]) + 1 if is_text.any() else 0

    def first(self, number: int) -> Spelled:
        """Return the first tokens alone."""
        special = {i: name for i, name in self.special.items() if i < number}
        lengths = self.lengths[:number]
        return Spelled(self.raw[: int(lengths.sum())], lengths, special)


def is_opener(text: bytes, length: int) -> bool:
    """Return whether a template may have written this much of the beginning of a text."""
    return length >= 0 and text[:length].strip() in (b"", _OPEN)


def fit(spelled: Spelled, text: bytes) -> ByteLengths | None:
    """Return the bytes of the text that each token has, or None if the tokens spell another text."""
    lengths = _fit_valid(spelled, text)
    if lengths is None:
        pieces = [spelled.raw[start:stop] for start, stop in pairwise(spelled.edges.tolist())]
        if (valid := replace_invalid(pieces)) is not pieces:
            lengths = _fit_valid(Spelled.of(valid, spelled.special), text)
    return lengths


def difference(spelled: Spelled, text: bytes) -> tuple[str, str]:
    """Say how what the tokens spell differs from the text: a reason to be counted, and the details."""
    raw = spelled.first(spelled.num_text).raw
    opening, thinking, _, answer = _split(text)
    if answer and thinking and raw.removeprefix(opening).strip() == thinking:
        return "the tokens spell only the thinking", difference_in_length(len(raw), len(text))[1]
    if len(raw) != len(text):
        return difference_in_length(len(raw), len(text))
    at = next(i for i, (a, b) in enumerate(zip(raw, text, strict=True)) if a != b)
    there, here = (part[at : at + 12].decode(errors="replace") for part in (raw, text))
    return "the tokens spell another text", f"from byte {at} on tokens spell {there!r}, the text has {here!r}"


def difference_in_length(spelled: int, text: int) -> tuple[str, str]:
    """Say that tokens spell more or fewer bytes than the text has."""
    return "the tokens spell another text", f"tokens spell {spelled} bytes, the text has {text}"


def _fit_valid(spelled: Spelled, text: bytes) -> ByteLengths | None:
    num, edges = spelled.num_text, spelled.edges
    for stop in range(num, len(spelled.lengths) + 1):  # the text may end with the names of special tokens
        if edges[stop] > len(text):
            break
        if stop > num and edges[stop] == edges[stop - 1]:
            continue
        body = spelled.raw[: edges[stop]]
        if text.endswith(body) and is_opener(text, len(text) - len(body)):
            return _padded(spelled.lengths[:stop], len(spelled.lengths))
    inside = spelled.first(num)
    for silence in (_silence_channels, _silence_special):
        silenced = silence(inside)
        if silenced is not None and (lengths := _fit_parts(silenced, text)) is not None:
            return _padded(lengths, len(spelled.lengths))
    return None


def _padded(lengths: npt.NDArray[np.int32], number: int) -> ByteLengths:
    """Return the lengths, followed by zeros up to this number of tokens."""
    return np.append(lengths, np.zeros(number - len(lengths), np.int32))


def _silence_channels(spelled: Spelled) -> Spelled | None:
    """Put `<think>` and `</think>` in place of harmony's headers; None if there are none, or malformed ones."""
    names = {i: name for i, name in spelled.special.items() if name}
    if "message" not in names.values():
        return None
    # To the rewriter, the text between two special tokens is one token.
    starts, edges = sorted({0, *names, *(i + 1 for i in names), len(spelled.lengths)}), spelled.edges
    runs = [spelled.raw[edges[start] : edges[stop]] for start, stop in pairwise(starts)]
    special_runs = {run: names[start] for run, start in enumerate(starts) if start in names}
    tags = (_OPEN.decode(), _CLOSE.decode())
    rewriter = harmony.Rewriter(special_runs, runs.__getitem__, tags)
    rewritten, verdict = rewriter.rewrite(range(len(runs)), "" if 0 in names else tags[0])
    if verdict:
        return None
    lengths = spelled.lengths.copy()
    for (start, stop), before, after in zip(pairwise(starts), runs, rewritten, strict=True):
        if after != before:  # a special token, or the words of a header, which spell nothing
            lengths[start:stop] = len(after)
    return Spelled(b"".join(rewritten), lengths, {})


def _silence_special(spelled: Spelled) -> Spelled:
    """Leave out what special tokens spell, except for tags."""
    edges, lengths, kept, done = spelled.edges, spelled.lengths.copy(), [], 0
    for i in sorted(spelled.special):
        start, stop = int(edges[i]), int(edges[i + 1])
        if not _TAG.fullmatch(spelled.raw, start, stop):
            kept.append(spelled.raw[done:start])
            lengths[i], done = 0, stop
    return Spelled(b"".join([*kept, spelled.raw[done:]]), lengths, {})


def _fit_parts(spelled: Spelled, text: bytes) -> ByteLengths | None:
    """Fit tokens part by part: what they spell between thinking and answer, or nothing, stands for the text's tags."""
    opening, thinking, closing, answer = _split(text)
    raw, edges = spelled.raw, spelled.edges
    think_at = _end(_OPENED, raw, 0) if opening else 0
    closing_at = answer_at = think_at + len(thinking)
    if closing:
        answer_at = _end(_CLOSED, raw, closing_at)
    end = answer_at + len(answer)
    if raw[think_at:closing_at] != thinking or raw[answer_at:end] != answer or _end(_ENDED, raw, end) < len(raw):
        return None
    has_closing = answer_at > closing_at
    if closing and not has_closing and closing_at not in edges:
        return None  # one token for the end of the thinking and the beginning of the answer
    raw_bounds = np.array([0, think_at, closing_at, answer_at, end])
    text_bounds = np.cumsum([0, len(opening), len(thinking), len(closing), len(answer), 0])
    part = np.searchsorted(raw_bounds, edges, side="right") - 1
    text_edges = np.minimum(text_bounds[part] + edges - raw_bounds[part], text_bounds[part + 1])
    if closing and not has_closing:  # special tokens between the two, the last of which gets the separator
        text_edges[:-1][(edges[:-1] == closing_at) & (edges[1:] == closing_at)] = text_bounds[2]
    # Thinking that is empty and has no tokens of its own leaves more than an opener unspelled.
    return np.diff(text_edges).astype(np.int32) if is_opener(text, int(text_edges[0])) else None


def _end(pattern: re.Pattern[bytes], raw: bytes, start: int) -> int:
    match = pattern.match(raw, start)
    return match.end() if match else start


def _split(text: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Split an answer into `<think>`, thinking, `</think>` and answer; white space belongs to the tags."""
    if not text.startswith(_OPEN):
        return b"", b"", b"", text
    before, tag, after = text.partition(_CLOSE)
    thinking = before.removeprefix(_OPEN).lstrip(_WHITE)
    opening = before[: len(before) - len(thinking)]
    if not tag:
        return opening, thinking, b"", b""
    thinking, answer = thinking.rstrip(_WHITE), after.lstrip(_WHITE)
    return opening, thinking, text[len(opening) + len(thinking) : len(text) - len(answer)], answer
