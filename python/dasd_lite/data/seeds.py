"""Digests and seeds: pure functions of their parts."""

from __future__ import annotations

import hashlib
import json


def digest(*parts: object) -> str:
    """Return 128 bits of hash, in hex, of JSON-ready `parts`."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def derive_seed(seed: int, *parts: object) -> int:
    """Return a 63-bit seed for one use of `seed`, the same on every machine."""
    return int(digest(seed, *parts)[:16], 16) >> 1
