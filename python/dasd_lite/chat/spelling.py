"""The bytes that each token spells, and the text that they make.

Input: the vocabulary entries of a tokenizer.json, or the bytes of sampled tokens. Output: bytes, or a text and the
byte length of each token in it. Invariant: the lengths add up to the UTF-8 length of the text.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_lite.errors import ConfigError

TokenIds = npt.NDArray[np.int32]
ByteLengths = npt.NDArray[np.int32]


def spell(pieces: list[bytes]) -> tuple[str, ByteLengths]:
    """Join what tokens spell. Return the text and the byte length of each token in it."""
    edges = np.cumsum([0, *map(len, pieces)])
    text, replaced = _decode(b"".join(pieces))
    for start, end in reversed(replaced):  # an edge inside a replaced range moves to its end
        edges = np.where(edges >= end, edges + 3 - (end - start), np.where(edges > start, start + 3, edges))
    return text, np.diff(edges).astype(np.int32)


def _decode(raw: bytes) -> tuple[str, list[tuple[int, int]]]:
    """Decode UTF-8. Return the text and the byte ranges that became U+FFFD."""
    parts: list[str] = []
    replaced: list[tuple[int, int]] = []
    start = 0
    while True:
        try:
            return "".join([*parts, raw[start:].decode()]), replaced
        except UnicodeDecodeError as error:
            invalid, end = start + error.start, start + error.end
            parts += [raw[start:invalid].decode(), "\ufffd"]
            replaced.append((invalid, end))
            start = end


def replace_invalid(pieces: list[bytes]) -> list[bytes]:
    """Replace bytes that are not UTF-8 by U+FFFD, as servers do; a split character goes to its last token."""
    with suppress(UnicodeDecodeError):
        b"".join(pieces).decode()
        return pieces
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(p, final=i + 1 == len(pieces)).encode() for i, p in enumerate(pieces)]


def piece_reader(tokenizer: dict[str, Any], path: Path) -> Callable[[str], bytes]:
    """Return the function from a vocabulary entry to its bytes, for the decoder of the tokenizer.json at `path`."""
    kinds = _decoder_kinds(tokenizer.get("decoder") or {})
    if "ByteLevel" in kinds:
        table = byte_level_table()
        return lambda token: bytes(table[c] for c in token)
    if kinds & {"Metaspace", "Replace", "ByteFallback"}:

        def sentencepiece(token: str) -> bytes:
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            return bytes([int(byte.group(1), 16)]) if byte else token.replace("▁", " ").encode()

        return sentencepiece
    raise ConfigError(
        f"{path}: the decoder {', '.join(sorted(kinds)) or '(missing)'} is not supported; use a model with"
        " byte-level BPE or SentencePiece"
    )


def _decoder_kinds(decoder: dict[str, Any]) -> set[str]:
    inner = (kind for part in decoder.get("decoders", []) for kind in _decoder_kinds(part))
    return {str(decoder.get("type")), *inner} - {"None", "Sequence"}


def byte_level_table() -> dict[str, int]:
    """Return the byte for each character of byte-level BPE. Printable characters stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in set(printable))
    return table | {chr(256 + n): b for n, b in enumerate(others)}
