"""Hashes and random seeds, the same for the same input on every machine."""

from __future__ import annotations

import hashlib
import json


def digest(*parts: object) -> str:
    """Return a 128-bit hash, in hex, of `parts`, which must be JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def derive_seed(seed: int, *parts: object) -> int:
    """Derive a 63-bit seed from `seed` for one purpose, which `parts` name."""
    return int(digest(seed, *parts)[:16], 16) >> 1
