"""LiveCodeBench's private tests: JSON, or base64 of zlib of pickle of JSON.

Input: the column `private_test_cases`. Output: the tests, as JSON gives them. Invariant: no byte of it is executed, and
it is unpacked only up to a limit.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from typing import Any

_LARGEST = 512 << 20
"""Bytes of the unpacked tests; the largest of LiveCodeBench have some tens of MiB."""


class _TextUnpickler(pickle.Unpickler):
    """Reads text, numbers and lists, but loads no code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


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
    try:
        text = _TextUnpickler(io.BytesIO(pickled)).load()
    # a malformed pickle can raise almost anything; none of it has run any code
    except (
        pickle.UnpicklingError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        OverflowError,
    ) as error:
        raise ValueError(f"are not a pickled text ({error})") from None
    if not isinstance(text, str):
        raise ValueError(f"are a pickled {type(text).__name__}; it must be text")
    return from_json(text)


def from_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"are not JSON ({error})") from None
