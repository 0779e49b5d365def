"""Text and token ids: chat templates, harmony channels, the bytes of each token."""
