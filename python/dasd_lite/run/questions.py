"""The files of prompts that a recipe names; each is read once per command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dasd_lite.chat.chat import Chat
from dasd_lite.config.evaluate import EvaluateConfig
from dasd_lite.config.models import CustomTeacher, Endpoint
from dasd_lite.config.reading import Reading
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.console import note
from dasd_lite.data.asked import question_sets
from dasd_lite.data.hub import model_folder
from dasd_lite.data.prompts import Prompts, read_prompts
from dasd_lite.data.records import Prompt
from dasd_lite.data.seeds import digest
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.grading.contamination import overlaps

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
        if not config.skip_overlong and not config.drop_contaminated:
            return prompts
        key = digest(recipe.model_dump(mode="json"))
        if key not in self._fitting:
            prompts = _without_overlong(prompts, recipe) if config.skip_overlong else prompts
            self._fitting[key] = self._without_contaminated(prompts, recipe) if config.drop_contaminated else prompts
        return self._fitting[key]

    def contaminated(self, prompts: Prompts, recipe: RecipeConfig) -> list[tuple[Prompt, Prompt, float]]:
        """Return the prompts that contain half of an evaluation question or more: prompt, question, share of 8-grams.

        Source: the rule is in grading/contamination.py.
        """
        different = {phase.evaluate.model_dump_json(): phase.evaluate for phase in recipe.phase}
        asked: dict[str, Prompt] = {}
        for config in map(_unlimited, different.values()):
            for each in question_sets(config, self.to_evaluate(config, recipe.prompts.system)):
                asked |= {question.key: question for question in each.questions}
        questions = list(asked.values())
        texts = (_last(prompt) for prompt in prompts)
        found = overlaps([_last(question) for question in questions], texts) if questions else []
        return [(prompts[own.prompt], questions[own.question], own.share) for own in found if own.is_flagged]

    def _without_contaminated(self, prompts: Prompts, recipe: RecipeConfig) -> Prompts:
        found = self.contaminated(prompts, recipe)
        dropped = {prompt.uid for prompt, _, _ in found}
        if not dropped:
            return prompts
        prompt, question, share = found[0]
        first = f"{prompt.place}: {share:.0%} of the 8-grams of {question.place}"
        if len(dropped) == len(prompts):
            raise DataError(f"all {len(dropped):,} prompts contain evaluation questions, the first is {first}")
        note(f"{len(dropped):,} of {len(prompts):,} prompts left out (prompts.drop_contaminated); the first is {first}")
        items = tuple(prompt for prompt in prompts if prompt.uid not in dropped)
        return replace(prompts, items=items, left_out={**prompts.left_out, "evaluation questions": len(dropped)})

    def to_evaluate(self, config: EvaluateConfig, system: str | None) -> Prompts | None:
        """Return the user's own questions that a model is evaluated on; None: there are none."""
        if config.prompts is None:
            return None
        return self.read(config.prompts, config, config.limit, system)

    def read(self, path: str, reading: Reading, limit: int | None, system: str | None) -> Prompts:
        """Return the first `limit` prompts of a file, or all."""
        reading = Reading(**{name: getattr(reading, name) for name in Reading.model_fields})
        key = path, system, reading.model_dump_json()
        prompts = self._files.get(key)
        if prompts is None or (prompts.limit is not None and (limit is None or limit > prompts.limit)):
            prompts = self._files[key] = read_prompts(path, limit=limit, system=system, reading=reading)
        return prompts if limit == prompts.limit or limit is None else prompts.first(limit)


def _unlimited(config: EvaluateConfig) -> EvaluateConfig:
    """Return the same questions without a limit: a trial or a first look asks a part of them."""
    tasks = [task.model_copy(update={"limit": None}) for task in config.task_configs]
    return config.model_copy(update={"limit": None, "tasks": tasks})


def _last(prompt: Prompt) -> str:
    return prompt.messages[-1]["content"]


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
