"""The bytes of each token: what a tokenizer spells, and the characters a piece of text breaks in."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_lite.errors import ConfigError

Ids = npt.NDArray[np.int32]


Lengths = npt.NDArray[np.int32]


def spell(pieces: list[bytes]) -> tuple[str, Lengths]:
    """Join what tokens spell; return the text and each one's bytes of it."""
    edges = np.cumsum([0, *map(len, pieces)])
    text, replaced = _decode(b"".join(pieces))
    for start, end in reversed(replaced):  # edges inside a replaced range move to its end
        edges = np.where(edges >= end, edges + 3 - (end - start), np.where(edges > start, start + 3, edges))
    return text, np.diff(edges).astype(np.int32)


def _decode(raw: bytes) -> tuple[str, list[tuple[int, int]]]:
    """Decode UTF-8; return the text and the ranges of bytes that became U+FFFD."""
    parts: list[str] = []
    replaced: list[tuple[int, int]] = []
    start = 0
    while True:
        try:
            return "".join([*parts, raw[start:].decode()]), replaced
        except UnicodeDecodeError as error:
            bad, end = start + error.start, start + error.end
            parts += [raw[start:bad].decode(), "\ufffd"]
            replaced.append((bad, end))
            start = end


def piece_reader(tokenizer: dict[str, Any]) -> Any:
    """Return the function from a vocabulary entry to its bytes, by the kind of decoder."""
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
        f"tokenizer.json: decoder {sorted(kinds) or 'none'} is not supported; byte-level BPE and SentencePiece are"
    )


def _decoder_kinds(decoder: dict[str, Any]) -> set[str]:
    inner = (kind for part in decoder.get("decoders", []) for kind in _decoder_kinds(part))
    return {str(decoder.get("type")), *inner} - {"None", "Sequence"}


def byte_level_table() -> dict[str, int]:
    """Return the character that byte-level BPE writes for each byte: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in set(printable))
    return table | {chr(256 + n): b for n, b in enumerate(others)}
