"""Reads the files of existing answers that a recipe names: what is in them, and what would fail later because of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dasd_lite.chat.chat import Chat
from dasd_lite.config.models import Teacher
from dasd_lite.config.stages import Phase
from dasd_lite.console import say, say_note
from dasd_lite.data.formats.read import RowFiles
from dasd_lite.data.formats.sources import find
from dasd_lite.data.hub import model_folder
from dasd_lite.data.prompts import to_prompt
from dasd_lite.errors import DasdError, DataError
from dasd_lite.stages.ingest import tokenizer_name

_SECONDS = 10.0  # longer files are read in part; the stage reads all of them
_FIRST = 100  # rows


@dataclass
class _Content:
    """What the answers of some files are like."""

    is_whole: bool = True  # nothing that the stage takes was not read, but for want of time
    is_read_to_the_end: bool = True
    answers: int = 0
    with_thinking: int = 0
    with_tokens: int = 0  # for all of the answer, not only for what the teacher wrote behind a prefix
    prompts: set[str] = field(default_factory=set)
    domains: set[str] = field(default_factory=set)
    first: str = ""  # a line about the first rows


def check_ingest(phases: Sequence[Phase], system: str | None, seconds: float = _SECONDS) -> Iterator[str]:
    """Read the files of every phase that takes existing answers; yield what is wrong with them.

    Args:
        phases: The phases of a recipe.
        system: System message for prompts that have none.
        seconds: For how long files are read, to their end if that is sooner.
    """
    read: dict[str, _Content | None] = {}
    for phase in phases:
        if phase.source != "ingest":
            continue
        key = phase.ingest.model_dump_json()
        if key not in read:
            try:
                read[key] = _read(phase, system, seconds)
            except DataError as error:
                read[key] = None
                yield from (f"ingest.paths: {line}" for line in str(error).splitlines())
        if (content := read[key]) is not None:
            yield from _later_faults(phase, content)


def _read(phase: Phase, system: str | None, seconds: float) -> _Content:
    """Read the files of a phase and print what is in them."""
    files = RowFiles(phase.ingest.paths, phase.ingest, answers=True, tokens=True, system=system)
    content, end = _Content(), time.monotonic() + seconds
    answered = 0
    for number, row in enumerate(files, start=1):
        prompt = to_prompt(row, row.prompt_uid)
        content.prompts.add(prompt.uid)
        content.domains.add(prompt.domain)
        content.answers += len(row.answers)
        content.with_thinking += sum("</think>" in answer.completion for answer in row.answers)
        content.with_tokens += sum(bool(answer.tokens) and not answer.prefix_bytes for answer in row.answers)
        answered += row.answer is not None
        if number <= _FIRST:
            content.first = (
                f"the first {number:,} rows: {content.with_thinking:,} answers with thinking,"
                f" {content.with_tokens:,} with something for each token; {answered:,} rows with a reference answer"
            )
        if phase.ingest.limit is not None and content.answers >= phase.ingest.limit:
            content.is_read_to_the_end = False  # the stage reads on if answers occur twice
            break
        if number % 64 == 0 and time.monotonic() > end:
            content.is_whole = content.is_read_to_the_end = False
            break
    notes = files.finish()
    if content.answers == 0:
        raise DataError(f"{', '.join(phase.ingest.paths)}: no rows")
    part = "" if content.is_whole else f" in what was read in {seconds:g} s"
    each = content.answers / len(content.prompts)
    say(
        f"{phase.name}: {content.answers:,} answers to {len(content.prompts):,} prompts{part},"
        f" {each:.1f} per prompt; {content.first}"
    )
    for line in notes:
        say_note(line)
    return content


def check_logprobs(phases: Sequence[Phase], teacher: Teacher | None) -> Iterator[str]:
    """Find the files of log-probabilities, and open the tokenizer of their token ids; yield what is wrong with them."""
    faults: dict[str, None] = {}
    for phase in phases:
        if phase.source != "ingest":
            continue
        name = tokenizer_name(phase.ingest, teacher)
        for key, places, open_one in (
            ("logprobs", phase.ingest.logprobs, find),
            ("tokenizer", [] if name is None else [name], lambda folder: Chat(model_folder(folder))),
        ):
            for place in places:
                try:
                    open_one(place)
                except DasdError as error:
                    faults |= dict.fromkeys(f"ingest.{key}: {line}" for line in str(error).splitlines())
    yield from faults


def _later_faults(phase: Phase, content: _Content) -> Iterator[str]:
    """Name what would end the run at a later stage."""
    lacking = content.answers - content.with_tokens
    if phase.ingest.logprobs or phase.ingest.require_logprobs:
        lacking = 0  # known only when they are aligned
    if phase.needs_logprobs and phase.score.by == "student" and lacking:
        what = f"select.rule = {phase.select.rule!r}" if phase.select.uses_scores else "select.weighting"
        what = "score.when = 'always'" if phase.score.when == "always" else what
        yield (
            f"phase {phase.name!r}: {what} needs log-probabilities, which {lacking:,} of {content.answers:,} answers"
            " lack; use 'random' or 'all', or let the teacher score them: score.by = 'teacher'"
        )
    for domain in sorted(phase.select.budget.keys() - content.domains) if content.is_read_to_the_end else ():
        known = ", ".join(sorted(content.domains))
        yield f"phase {phase.name!r}: select.budget: no answer has the domain {domain!r}; the domains are {known}"
    if phase.select.require_think and content.with_thinking == 0 and content.is_whole:
        yield (
            f"phase {phase.name!r}: select.require_think = true rejects every answer: none has <think>…</think>; map"
            " the thinking, or set it to false"
        )
