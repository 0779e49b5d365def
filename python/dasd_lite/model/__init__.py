"""One torch model: loading, packed attention and log-probabilities without full logits."""

LOGIT_BYTES = 256 << 20
"""Of one chunk's float32 logits where a loss is taken of them, which needs two to three times this."""
_MOST_LOGIT_BYTES, _LARGE_GPU = 2 << 30, 40e9


def logit_bytes(free: float, memory: float) -> int:
    """Return the bytes of float32 logits that exist at the same time in training on a GPU.

    A large GPU has room for more, which means fewer passes over the gradient of the head.

    Args:
        free: Bytes that are free when the loss is computed.
        memory: Bytes of the GPU.
    """
    return LOGIT_BYTES if memory < _LARGE_GPU else min(_MOST_LOGIT_BYTES, max(LOGIT_BYTES, int(free) // 8))
