"""Log-probabilities that come with a given answer: read from whatever form they have, and aligned with its text.

Input: an answer, and what its source says about the tokens. Output: ids, log-probabilities and byte lengths as the rows
of rollouts hold them (data/records.py), or the reason why they cannot be had. Invariant: numbers are the source's own
and none is made up; tokens that do not spell the answer by the rules of fit.py are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from dasd_lite.chat import harmony
from dasd_lite.chat.chat import Chat
from dasd_lite.chat.fit import Spelled, difference, difference_in_length, fit, is_opener
from dasd_lite.chat.spelling import ByteLengths, TokenIds
from dasd_lite.method.divergence import TOLERANCE

O200K_CONTROL = range(200002, 200013)
"""Special tokens of gpt-oss's vocabulary. Data that come with its ids have them although another tokenizer is named."""

_O200K_NAMES = {200002: "return", 200003: "constrain", 200005: "channel", 200006: "start"}
_O200K_NAMES |= {200007: "end", 200008: "message", 200012: "call"}
_CONTROL = re.compile(r"<[|｜][^<>]*[|｜]>|</?s>|<eos>|<end_of_turn>|\[/?THINK\]")
NO_LOGPROBS = "no log-probabilities"
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

    def align(self, completion: str, tokens: Mapping[str, Any], prefix_bytes: int = 0) -> Aligned | Misfit:
        """Return the tokens of an answer, aligned with its text.

        Args:
            completion: The answer, with its thinking in `<think>…</think>`.
            tokens: What the source says. `logprobs` or `token_logprobs`: a number for each token; or `logprobs` as in
                OpenAI's replies, `{"content": [{"token", "logprob", "bytes"}, …]}`. `token_ids`. `token_bytes`: the
                length of each token, or its bytes as a list of numbers.
            prefix_bytes: Bytes at the beginning of the answer that another model wrote; the tokens begin behind them.

        Returns:
            The tokens; or, if something is missing, impossible, or does not add up, the reason.
        """
        try:
            given = _read(tokens)
            text = completion.encode()[prefix_bytes:]
            if given.lengths is not None:
                total = int(given.lengths.sum(dtype=np.int64))
                if total != len(text) if prefix_bytes else not is_opener(text, len(text) - total):
                    return Misfit(*difference_in_length(total, len(text)))
                return Aligned(given.ids, given.logprobs, given.lengths)
            spelled = self._spell(given)
            lengths = fit(spelled, text)
            if lengths is None or (prefix_bytes and lengths.sum() != len(text)):  # a prefix leaves no opener to others
                return Misfit(*difference(spelled, text))
            return Aligned(given.ids, given.logprobs, lengths)
        except _Misfits as error:
            return error.misfit

    def _spell(self, given: _Given) -> Spelled:
        if given.pieces is not None:
            return Spelled.of(given.pieces, _special_names(given.pieces))
        if given.ids is None:
            raise _Misfits("log-probabilities without tokens", "neither token_ids nor bytes")
        if self._vocabulary is None:
            raise _Misfits("token ids without a tokenizer", "token_ids without bytes; set ingest.tokenizer")
        return self._vocabulary.spell(given.ids)


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
        raise _Misfits(NO_LOGPROBS)
    given = tokens.get("token_bytes")
    if _is_list(given) and len(given) and not isinstance(given[0], int | np.integer):
        pieces = [_bytes(piece) for piece in given]
    elif given is not None:
        lengths = _integers(given, "token_bytes")
    logprobs = _logprobs(values)
    token_ids = None if ids is None else _integers(ids, "token_ids")
    for name, others in (("ids", token_ids), ("token bytes", lengths), ("tokens", pieces)):
        if others is not None and len(others) != len(logprobs):
            raise _Misfits("not as many tokens as log-probabilities", f"{len(others)} {name}, {len(logprobs)} logprobs")
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
    if array.ndim == 0:
        raise _Misfits("log-probabilities are no list", f"logprobs = {str(values)[:40]!r}")
    if array.dtype.kind not in "fiu" and len(array):
        index = next(
            i for i, value in enumerate(values) if isinstance(value, bool) or not isinstance(value, int | float)
        )
        raise _Misfits("a log-probability is not a number", f"the log-probability of token {index} is {values[index]}")
    if array.ndim != 1 or not len(array):
        raise _Misfits(NO_LOGPROBS)
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
        spelled = [piece or b"" for piece in pieces]
        self._bytes = np.frombuffer(b"".join(spelled), dtype=np.uint8)
        self._lengths = np.fromiter(map(len, spelled), np.int32, len(spelled))
        self._starts = np.cumsum(self._lengths, dtype=np.int64) - self._lengths

    def spell(self, ids: TokenIds) -> Spelled:
        """Return the bytes of each token."""
        unknown = ids >= len(self._lengths)
        if not unknown.any():
            unknown = ~self._is_known[ids]
        if unknown.any():
            raise _Misfits("unknown token id", f"unknown id {ids[unknown.argmax()]}")
        lengths = self._lengths[ids]
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        total = int(lengths.sum(dtype=np.int64))
        raw = self._bytes[np.repeat(self._starts[ids] - starts, lengths) + np.arange(total)].tobytes()
        return Spelled(
            raw, lengths, {i: self._names[int(ids[i])] for i in np.flatnonzero(self._is_special[ids]).tolist()}
        )


def _special_names(pieces: Sequence[bytes]) -> dict[int, str]:
    """Return position and name of the pieces that look like special tokens: no tokenizer is there to say so."""
    short = ((i, piece) for i, piece in enumerate(pieces) if piece[:1] in (b"<", b"[") and len(piece) < 64)
    names = ((i, piece.decode(errors="replace")) for i, piece in short)
    return {i: _channel_name(name) for i, name in names if _CONTROL.fullmatch(name)}


def _channel_name(token: str) -> str:
    """Return the name of a special token of harmony, or ""."""
    name = token[2:-2]
    return name if name in harmony.SPECIAL_TOKENS and token == f"<|{name}|>" else ""
