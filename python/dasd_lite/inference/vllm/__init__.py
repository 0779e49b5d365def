"""A model in vLLM, in child processes."""
