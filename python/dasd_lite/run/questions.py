"""The files of prompts that a recipe names; each is read once per command."""

from __future__ import annotations

from dasd_lite.config.reading import Reading
from dasd_lite.config.stages import EvaluateConfig, PromptsConfig
from dasd_lite.data.prompts import Prompts, read_prompts
from dasd_lite.errors import ConfigError


class Questions:
    """Prompts by file; a file is read when it is first needed."""

    def __init__(self) -> None:
        """Start without any file."""
        self._files: dict[tuple[str, str | None, str], Prompts] = {}

    def to_sample(self, config: PromptsConfig) -> Prompts:
        """Return the prompts that the teacher is sampled on."""
        if config.path is None:
            raise ConfigError("prompts.path is not set; name a file of prompts")
        return self.read(config.path, config, config.limit, config.system)

    def to_evaluate(self, config: EvaluateConfig, system: str | None) -> Prompts:
        """Return the questions that a model is evaluated on."""
        if config.prompts is None:
            raise ConfigError("evaluate.prompts is not set; name a file of questions with answers")
        return self.read(config.prompts, config, config.limit, system)

    def read(self, path: str, reading: Reading, limit: int | None, system: str | None) -> Prompts:
        """Return the first `limit` prompts of a file, or all."""
        reading = Reading(**{name: getattr(reading, name) for name in Reading.model_fields})
        key = path, system, reading.model_dump_json()
        prompts = self._files.get(key)
        if prompts is None or (prompts.limit is not None and (limit is None or limit > prompts.limit)):
            prompts = self._files[key] = read_prompts(path, limit=limit, system=system, reading=reading)
        return prompts if limit == prompts.limit or limit is None else prompts.first(limit)
