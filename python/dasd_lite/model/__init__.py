"""One torch model: loading, packed attention and log-probabilities without full logits."""

LOGIT_BYTES = 256 << 20
"""Of one chunk's float32 logits where a loss is taken of them, which needs about three times this."""
