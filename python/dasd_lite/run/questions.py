"""The files of prompts that a recipe names: each is read once per command and handed on."""

from __future__ import annotations

from pathlib import Path

from dasd_lite.config.stages import EvaluateConfig, PromptsConfig
from dasd_lite.data.prompts import Prompts, read_prompts
from dasd_lite.errors import ConfigError


class Questions:
    """Reads a file when it is first needed."""

    def __init__(self) -> None:
        """Read nothing yet."""
        self._read: dict[tuple[Path, str | None], Prompts] = {}

    def to_sample(self, config: PromptsConfig) -> Prompts:
        """Return the prompts that the teacher is sampled on."""
        if config.path is None:
            raise ConfigError("prompts.path is not set; name a file of prompts")
        return self.read(config.path, config.limit, config.system)

    def to_evaluate(self, config: EvaluateConfig, system: str | None) -> Prompts:
        """Return the questions that a model is evaluated on."""
        if config.prompts is None:
            raise ConfigError("evaluate.prompts is not set; name a file of questions with answers")
        return self.read(config.prompts, config.limit, system)

    def read(self, path: Path, limit: int | None, system: str | None) -> Prompts:
        """Return the first `limit` prompts of a file, or all."""
        read = self._read.get((path, system))
        if read is None or (read.limit is not None and (limit is None or limit > read.limit)):
            read = self._read[path, system] = read_prompts(path, limit=limit, system=system)
        return read if limit == read.limit or limit is None else read.first(limit)
