"""A teacher behind OpenAI-compatible servers."""
