"""LiveCodeBench's private tests: JSON, or base64 of zlib of pickle of JSON.

Input: the column `private_test_cases`. Output: the tests, as JSON gives them. Invariant: no byte of it is executed, and
it is unpacked only up to a limit.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickletools
import zlib
from typing import Any

_LARGEST = 256 << 20
"""Bytes of the unpacked tests; the largest of LiveCodeBench have some tens of MiB."""

# What a pickle of one text consists of, in all protocols.
_TEXT = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE")
_AROUND_TEXT = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")


def unpack(packed: str, *, largest: int = _LARGEST) -> Any:
    """Return private tests as JSON gives them.

    Raises:
        ValueError: They are not packed as LiveCodeBench packs them; the message says which layer is wrong.
    """
    if packed.lstrip()[:1] == "[":
        return from_json(packed)
    try:
        squeezed = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("are neither JSON nor base64") from None
    inflater = zlib.decompressobj()
    try:
        pickled = inflater.decompress(squeezed, largest)
    except zlib.error as error:
        raise ValueError(f"are not compressed by zlib ({error})") from None
    if not inflater.eof:
        raise ValueError(
            f"have more than {largest} bytes" if len(pickled) >= largest else "are not compressed by zlib (cut off)"
        )
    if inflater.unused_data:
        raise ValueError("are not compressed by zlib (more follows)")
    return from_json(_pickled_text(pickled))


def _pickled_text(pickled: bytes) -> str:
    """Return the text that is all of a pickle. It is read, not executed, so it takes no more memory than the text."""
    file = io.BytesIO(pickled)
    text = None
    try:
        for step, value, _ in pickletools.genops(file):
            if step.name in _TEXT and text is None:
                text = value
            elif step.name not in _AROUND_TEXT:
                raise ValueError(f"{step.name} in it")
    except ValueError as error:
        raise ValueError(f"are not a pickled text ({str(error)[:100]})") from None
    if not isinstance(text, str) or file.read(1):
        raise ValueError("are not a pickled text")
    return text


def from_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is none, nested too deeply, or too large for the memory.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"are not JSON ({str(error) or 'too large for the memory'})") from None
