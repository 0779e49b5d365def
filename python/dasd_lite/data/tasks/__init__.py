"""Benchmarks by name: a table of where they are, and their questions as they are asked here. None is part of this."""
