"""The files of prompts that a recipe names; each is read once per command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dasd_lite.chat.chat import Chat
from dasd_lite.config.models import CustomTeacher, Endpoint
from dasd_lite.config.reading import Reading
from dasd_lite.config.stages import EvaluateConfig, RecipeConfig
from dasd_lite.console import note
from dasd_lite.data.hub import model_folder
from dasd_lite.data.prompts import Prompts, read_prompts
from dasd_lite.data.records import Prompt
from dasd_lite.data.seeds import digest
from dasd_lite.errors import ConfigError, DataError

_NEW_TOKENS = 16  # what a template may write without characters of its own


class Questions:
    """Prompts by file; a file is read when it is first needed."""

    def __init__(self) -> None:
        """Start without any file."""
        self._files: dict[tuple[str, str | None, str], Prompts] = {}
        self._fitting: dict[str, Prompts] = {}

    def to_sample(self, recipe: RecipeConfig) -> Prompts:
        """Return the prompts that the teacher is sampled on, without those that `prompts.skip_overlong` leaves out."""
        config = recipe.prompts
        if config.path is None:
            raise ConfigError("prompts.path is not set; name a file of prompts")
        prompts = self.read(config.path, config, config.limit, config.system)
        if not config.skip_overlong:
            return prompts
        key = digest(config.model_dump(mode="json"), recipe.student.model, recipe.teacher and recipe.teacher.model)
        if key not in self._fitting:
            self._fitting[key] = _without_overlong(prompts, recipe)
        return self._fitting[key]

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


def overlong(prompts: Prompts, chat: Chat) -> Iterator[tuple[Prompt, int]]:
    """Yield the prompts that leave no room for an answer in the context of a model, each with its number of tokens."""
    for prompt in prompts:
        text = chat.render(prompt.messages)
        if text.isascii() and len(text) + _NEW_TOKENS < chat.context:  # a token has at least one character
            continue
        length = len(chat.prompt_ids(prompt.messages))
        if length >= chat.context:
            yield prompt, length


def _without_overlong(prompts: Prompts, recipe: RecipeConfig) -> Prompts:
    tokenizers = [recipe.student.model]
    if isinstance(recipe.teacher, Endpoint):
        tokenizers += [recipe.teacher.tokenizer] if recipe.teacher.tokenizer is not None else []
    elif recipe.teacher is not None and not isinstance(recipe.teacher, CustomTeacher):
        tokenizers.append(recipe.teacher.model)
    long = {
        prompt.uid: (prompt, length, chat)
        for chat in (Chat(model_folder(name)) for name in dict.fromkeys(tokenizers))
        for prompt, length in overlong(prompts, chat)
    }
    if not long:
        return prompts
    prompt, length, chat = next(iter(long.values()))
    first = f"{prompt.name}: {length:,} tokens, but the context of {chat.folder} is {chat.context:,} tokens"
    if len(long) == len(prompts):
        raise DataError(f"all {len(long):,} prompts are too long, the first is {first}")
    note(f"{len(long):,} of {len(prompts):,} prompts left out (prompts.skip_overlong); the first is {first}")
    items = tuple(prompt for prompt in prompts if prompt.uid not in long)
    return replace(prompts, items=items, left_out={**prompts.left_out, "prompts over the context": len(long)})
