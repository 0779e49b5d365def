"""Log-probabilities that come with a given answer: which bytes of its text each token has.

Input: an answer, and what its source says about the tokens. Output: ids, log-probabilities and byte lengths as the rows
of rollouts hold them (data/records.py), or the reason why they cannot be had. Invariant: nothing is aligned by guess;
the tokens spell the text byte by byte, and what they do not spell is one of these:

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
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from dasd_lite.chat import harmony
from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import ByteLengths, TokenIds, replace_invalid
from dasd_lite.method.divergence import TOLERANCE

O200K_CONTROL = range(200002, 200013)
"""Special tokens of gpt-oss's vocabulary. Data that come with its ids have them although another tokenizer is named."""

_O200K_NAMES = {200002: "return", 200003: "constrain", 200005: "channel", 200006: "start"}
_O200K_NAMES |= {200007: "end", 200008: "message", 200012: "call"}
_CONTROL = re.compile(r"<[|｜][^<>]*[|｜]>|</?s>|<eos>|<end_of_turn>|\[[A-Z_/]+\]")
_OPEN, _CLOSE = b"<think>", b"</think>"
_WHITE = b" \t\n\r\f\v"
# Tags that readers of files rewrite to <think> and </think>, or remove: see data/formats/thinking.py.
_TAG = re.compile(
    rb"</?think>|\[/?THINK\]|<\|(?:begin|end)_of_(?:thought|solution)\|>|</?(?:answer|final_answer|final)>"
)
_OPENED = re.compile(rb"\s*(?:<think>|\[THINK\]|<\|begin_of_thought\|>)?\s*")
_CLOSED = re.compile(
    rb"\s*(?:</think>|\[/THINK\]|<\|end_of_thought\|>)?\s*(?:<(?:answer|final_answer|final|\|begin_of_solution\|)>)?\s*"
)
_ENDED = re.compile(rb"\s*(?:</(?:answer|final_answer|final)>|<\|end_of_solution\|>)?\s*")
_PLACEHOLDER = -9000.0  # some sources write -9999 for a value that they do not have


class Aligned(NamedTuple):
    """The tokens of an answer, in order; all of the same length.

    Attributes:
        token_ids: In the vocabulary of the model that wrote the answer; None if the source had none.
        logprobs: Natural logarithms.
        token_bytes: Bytes of the text that each token has. They add up to the text, less a `<think>` before it.
    """

    token_ids: TokenIds | None
    logprobs: npt.NDArray[np.float32]
    token_bytes: ByteLengths


class Misfit(NamedTuple):
    """Why an answer gets no log-probabilities.

    Attributes:
        reason: One of a few, to be counted.
        detail: The numbers of this answer.
    """

    reason: str
    detail: str


class _Misfits(Exception):
    """Carries a Misfit out of the functions below."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.misfit = Misfit(reason, detail or reason)


class Aligner:
    """Aligns answers with the tokens that came with them."""

    def __init__(self, chat: Chat | None = None) -> None:
        """Take the tokenizer of the model that wrote the answers; None: tokens must come with bytes."""
        self._vocabulary = None if chat is None else _Vocabulary(chat)

    def align(self, completion: str, tokens: Mapping[str, Any]) -> Aligned | Misfit:
        """Return the tokens of an answer, aligned with its text.

        Args:
            completion: The answer, with its thinking in `<think>…</think>`.
            tokens: What the source says. `logprobs` or `token_logprobs`: a number for each token; or `logprobs` as in
                OpenAI's replies, `{"content": [{"token", "logprob", "bytes"}, …]}`. `token_ids`. `token_bytes`: the
                length of each token, or its bytes as a list of numbers.

        Returns:
            The tokens; or, if something is missing, impossible, or does not add up, the reason.
        """
        try:
            given = _read(tokens)
            text = completion.encode()
            if given.lengths is not None:
                _check_sum(given.lengths, text)
                return Aligned(given.ids, given.logprobs, given.lengths)
            pieces, special = given.pieces, _special_names(given.pieces or ())
            if pieces is None:
                if given.ids is None:
                    raise _Misfits("log-probabilities without tokens", "neither token_ids nor bytes")
                if self._vocabulary is None:
                    raise _Misfits("token ids without a tokenizer", "token_ids without bytes; set ingest.tokenizer")
                pieces, special = self._vocabulary.spell(given.ids)
            return Aligned(given.ids, given.logprobs, _fit(pieces, special, text))
        except _Misfits as error:
            return error.misfit


# --- what sources say about tokens --------------------------------------------------------------------


class _Given(NamedTuple):
    ids: TokenIds | None
    logprobs: npt.NDArray[np.float32]
    pieces: list[bytes] | None
    """The bytes of each token."""
    lengths: ByteLengths | None
    """Their lengths, if these are all that the source has."""


def _read(tokens: Mapping[str, Any]) -> _Given:
    """Return the fields as arrays of equal length."""
    ids: Any = tokens.get("token_ids")
    values: Any = _present(tokens, "logprobs", "token_logprobs")
    lengths = pieces = None
    if isinstance(values, Mapping) and values.get("content") is None:  # a reply of /completions
        values, pieces = values.get("token_logprobs"), _texts(values.get("tokens"))
    elif isinstance(values, Mapping):
        values = values["content"]
    if _is_list(values) and len(values) and isinstance(values[0], Mapping):
        ids, values, pieces = _read_entries(values, ids)
    if values is None:
        raise _Misfits("no log-probabilities")
    given = tokens.get("token_bytes")
    if _is_list(given) and len(given) and not isinstance(given[0], int | np.integer):
        pieces = [_bytes(piece) for piece in given]
    elif given is not None:
        lengths = _integers(given, "token_bytes")
    logprobs = _logprobs(values)
    token_ids = None if ids is None else _integers(ids, "token_ids")
    for name, others in (("ids", token_ids), ("token bytes", lengths), ("tokens", pieces)):
        if others is not None and len(others) != len(logprobs):
            raise _Misfits("as many tokens as log-probabilities", f"{len(others)} {name}, {len(logprobs)} logprobs")
    return _Given(token_ids, logprobs, pieces, lengths)


def _present(tokens: Mapping[str, Any], *names: str) -> Any:
    return next((tokens[name] for name in names if tokens.get(name) is not None), None)


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)


def _read_entries(entries: Sequence[Any], ids: Any) -> tuple[Any, list[Any], list[bytes] | None]:
    """Return ids, log-probabilities and bytes of the entries of OpenAI's `content`."""
    if not all(isinstance(entry, Mapping) for entry in entries):
        raise _Misfits("a log-probability is not a number")
    own = [entry.get("id", entry.get("token_id")) for entry in entries]
    ids = own if ids is None and None not in own else ids
    names = [entry.get("token") for entry in entries]
    if all(isinstance(name, str) and name.startswith("token_id:") for name in names):  # vLLM, if it is asked to
        return [_number_in(name) for name in names], [entry.get("logprob") for entry in entries], None
    pieces = [_entry_bytes(entry) for entry in entries]
    return ids, [entry.get("logprob") for entry in entries], pieces


def _number_in(name: str) -> int:
    number = name.removeprefix("token_id:")
    if not number.isascii() or not number.isdigit():
        raise _Misfits("token_ids are not integers", f"{name!r} is not a token id")
    return int(number)


def _entry_bytes(entry: Mapping[str, Any]) -> bytes:
    if entry.get("bytes") is not None:
        return _bytes(entry["bytes"])
    token = entry.get("token")
    # Several tokens have the text U+FFFD or "bytes:\xe2": parts of a character, whose bytes are lost or escaped.
    if not isinstance(token, str) or "\ufffd" in token or token.startswith("bytes:"):
        raise _Misfits("a token without bytes", f"token {token!r} has no bytes")
    return _bytes(token)


def _bytes(value: Any) -> bytes:
    with suppress(TypeError, ValueError, UnicodeEncodeError):
        return value.encode() if isinstance(value, str) else bytes(value)
    raise _Misfits("a token without bytes", f"{str(value)[:40]!r} are not the bytes of a token")


def _texts(values: Any) -> list[bytes] | None:
    return [_entry_bytes({"token": value}) for value in values] if _is_list(values) else None


def _integers(values: Any, name: str) -> npt.NDArray[np.int32]:
    with suppress(ValueError, TypeError, OverflowError):
        array = np.asarray(values)
        if array.ndim == 1 and (array.dtype.kind in "iu" or not len(array)):
            if len(array) and not 0 <= int(array.min()) <= int(array.max()) < 1 << 31:
                raise _Misfits(f"{name} out of range", f"{name} from {array.min()} to {array.max()}")
            return array.astype(np.int32)
    raise _Misfits(f"{name} are not integers")


def _logprobs(values: Any) -> npt.NDArray[np.float32]:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "fiu" and len(array):
        index = next(
            i for i, value in enumerate(values) if isinstance(value, bool) or not isinstance(value, int | float)
        )
        raise _Misfits("a log-probability is not a number", f"the log-probability of token {index} is {values[index]}")
    if array.ndim != 1 or not len(array):
        raise _Misfits("no log-probabilities")
    for reason, wrong in (
        ("a log-probability is not a number", ~np.isfinite(array)),
        ("a log-probability above 0", array > TOLERANCE),
        ("a log-probability that stands for a missing one", array < _PLACEHOLDER),
    ):
        if wrong.any():
            index = int(wrong.argmax())
            raise _Misfits(reason, f"the log-probability of token {index} is {array[index]:g}")
    return array.astype(np.float32)


# --- what tokens spell --------------------------------------------------------------------------------


class _Vocabulary:
    """The bytes of every token, in one table."""

    def __init__(self, chat: Chat) -> None:
        pieces = chat.vocabulary()
        pieces += [None] * (O200K_CONTROL.stop - len(pieces))
        names = {token_id: _channel_name(name) for token_id, name in chat.special_tokens.items()}
        for token_id in O200K_CONTROL:
            if pieces[token_id] is None:
                name = _O200K_NAMES.get(token_id, "")
                pieces[token_id], names[token_id] = f"<|{name}|>".encode() if name else b"", name
        self._names = names
        self._is_known = np.array([piece is not None for piece in pieces])
        self._is_special = np.isin(np.arange(len(pieces)), list(names))
        self._pieces = [piece or b"" for piece in pieces]

    def spell(self, ids: TokenIds) -> tuple[list[bytes], dict[int, str]]:
        """Return the bytes of each token; and position and name of the special ones."""
        unknown = ids >= len(self._pieces)
        if not unknown.any():
            unknown = ~self._is_known[ids]
        if unknown.any():
            raise _Misfits("unknown token id", f"unknown id {ids[unknown.argmax()]}")
        special = np.flatnonzero(self._is_special[ids]).tolist()
        values = ids.tolist()
        return list(map(self._pieces.__getitem__, values)), {i: self._names[values[i]] for i in special}


def _special_names(pieces: Sequence[bytes]) -> dict[int, str]:
    """Return position and name of the pieces that look like special tokens: no tokenizer is there to say so."""
    short = ((i, piece) for i, piece in enumerate(pieces) if piece[:1] in (b"<", b"[") and len(piece) < 64)
    names = ((i, piece.decode(errors="replace")) for i, piece in short)
    return {i: _channel_name(name) for i, name in names if _CONTROL.fullmatch(name)}


def _channel_name(token: str) -> str:
    """Return the name of a special token of harmony, or ""."""
    name = token[2:-2]
    return name if name in harmony.SPECIAL_TOKENS and token == f"<|{name}|>" else ""


# --- tokens against text ------------------------------------------------------------------------------


def _check_sum(lengths: ByteLengths, text: bytes) -> None:
    total = int(lengths.sum(dtype=np.int64))
    if not _is_opener(text, len(text) - total):
        raise _Misfits("the tokens spell another text", f"tokens spell {total} bytes, the text has {len(text)}")


def _is_opener(text: bytes, length: int) -> bool:
    """Return whether a template may have written this much of the beginning of a text."""
    return length >= 0 and text[:length].strip() in (b"", _OPEN)


def _fit(pieces: list[bytes], special: Mapping[int, str], text: bytes) -> ByteLengths:
    """Return the bytes of the text that each token has; see the module's docstring for the rules."""
    lengths = _fit_valid(pieces, special, text)
    if lengths is None:
        valid = replace_invalid(pieces)
        lengths = None if valid is pieces else _fit_valid(valid, special, text)
    if lengths is None:
        raise _Misfits(*_difference(pieces[: _end_of_text(pieces, special)], text))
    return lengths


def _fit_valid(pieces: list[bytes], special: Mapping[int, str], text: bytes) -> ByteLengths | None:
    end = _end_of_text(pieces, special)
    for stop in range(end, len(pieces) + 1):  # the text may end with the names of special tokens
        if _spell(pieces[:stop], text):
            return _lengths(pieces[:stop], len(pieces))
    inside = {i: name for i, name in special.items() if i < end}
    for spell in (_spell_channels, _spell_no_special):
        spelled = spell(pieces[:end], inside)
        if spelled is not None and (lengths := _fit_parts(spelled, text)) is not None:
            return np.append(lengths, np.zeros(len(pieces) - end, np.int32))
    return None


def _spell(pieces: Sequence[bytes], text: bytes) -> bool:
    """Return whether tokens spell a text, apart from its opener."""
    body = b"".join(pieces)
    return text.endswith(body) and _is_opener(text, len(text) - len(body))


def _end_of_text(pieces: Sequence[bytes], special: Mapping[int, str]) -> int:
    end = len(pieces)
    while end and (end - 1 in special or not pieces[end - 1]):
        end -= 1
    return end


def _lengths(pieces: Sequence[bytes], number: int) -> ByteLengths:
    """Return the length of each piece, followed by zeros up to a number of tokens."""
    lengths = np.zeros(number, np.int32)
    lengths[: len(pieces)] = np.fromiter(map(len, pieces), np.int32, len(pieces))
    return lengths


def _spell_channels(pieces: list[bytes], special: Mapping[int, str]) -> list[bytes] | None:
    """Return what the tokens of harmony's channels spell with `<think>` and `</think>` in place of headers."""
    names = {i: name for i, name in special.items() if name}
    if "message" not in names.values():
        return None
    # To the rewriter, the text between two special tokens is one token.
    edges = sorted({0, *names, *(i + 1 for i in names), len(pieces)})
    runs = [b"".join(pieces[start:stop]) for start, stop in pairwise(edges)]
    tags = (_OPEN.decode(), _CLOSE.decode())
    special_runs = {run: names[edges[run]] for run in range(len(runs)) if edges[run] in names}
    prefix = "" if 0 in names else tags[0]
    rewritten, verdict = harmony.Rewriter(special_runs, runs.__getitem__, tags).rewrite(range(len(runs)), prefix)
    if verdict:
        return None
    spelled = list(pieces)
    for (start, stop), before, after in zip(pairwise(edges), runs, rewritten, strict=True):
        if after != before:  # a special token, or the words of a header, which spell nothing
            spelled[start:stop] = [after] if stop == start + 1 else [b""] * (stop - start)
    return spelled


def _spell_no_special(pieces: list[bytes], special: Mapping[int, str]) -> list[bytes]:
    """Return what tokens spell without the special ones, except for tags."""
    spelled = list(pieces)
    for i in special:
        if not _TAG.fullmatch(spelled[i]):
            spelled[i] = b""
    return spelled


def _fit_parts(pieces: list[bytes], text: bytes) -> ByteLengths | None:
    """Fit tokens part by part: what they spell between thinking and answer, or nothing, stands for the text's tags."""
    opening, thinking, closing, answer = _split(text)
    raw = b"".join(pieces)
    think_at = _end(_OPENED, raw, 0) if opening else 0
    closing_at = answer_at = think_at + len(thinking)
    if closing:
        answer_at = _end(_CLOSED, raw, closing_at)
    end = answer_at + len(answer)
    if raw[think_at:closing_at] != thinking or raw[answer_at:end] != answer or _end(_ENDED, raw, end) < len(raw):
        return None
    edges = np.append(0, np.cumsum(_lengths(pieces, len(pieces))))
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
    return np.diff(text_edges).astype(np.int32) if _is_opener(text, int(text_edges[0])) else None


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


def _difference(pieces: list[bytes], text: bytes) -> tuple[str, str]:
    """Say how what the tokens spell differs from the text."""
    raw = b"".join(pieces)
    opening, thinking, _, answer = _split(text)
    if answer and thinking and raw.removeprefix(opening).strip() == thinking:
        return "the tokens spell only the thinking", f"tokens spell {len(raw)} bytes, the text has {len(text)}"
    if len(raw) != len(text):
        return "the tokens spell another text", f"tokens spell {len(raw)} bytes, the text has {len(text)}"
    at = next(i for i, (a, b) in enumerate(zip(raw, text, strict=True)) if a != b)
    there, here = (part[at : at + 12].decode(errors="replace") for part in (raw, text))
    return "the tokens spell another text", f"from byte {at} on tokens spell {there!r}, the text has {here!r}"
