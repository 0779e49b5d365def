"""Phases and stages: the pipeline, the check before it and the trial."""
