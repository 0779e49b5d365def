"""Text and token ids: chat templates, harmony channels, and the bytes of each token."""
