"""Hashes and random seeds, the same for the same input on every machine."""

from __future__ import annotations

import hashlib
import json

from dasd_lite.errors import ConfigError

_TO_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode


def digest(*parts: object) -> str:
    """Return a 128-bit hash, in hex, of `parts`, which must be JSON values."""
    return hashlib.blake2b(_TO_JSON(parts).encode(), digest_size=16).hexdigest()


def check_seed(seed: int) -> None:
    """Raise ConfigError unless `seed` is an integer of at least 0."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed = {seed!r}: it must be an integer of at least 0")


def derive_seed(seed: int, *parts: object) -> int:
    """Derive a 63-bit seed from `seed` for one purpose, which `parts` name."""
    return int(digest(seed, *parts)[:16], 16) >> 1
