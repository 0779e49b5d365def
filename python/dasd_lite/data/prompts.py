"""The questions that users bring: files of many formats, or lists of `Prompt`.

Input: a path. Output: prompts in order. Invariant: no row is skipped without a count; all faults of a file are one
error, which names the file, the line, and the mistake.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike, fspath
from typing import Any, overload

from dasd_lite.config.options import with_options
from dasd_lite.config.reading import Reading
from dasd_lite.console import note
from dasd_lite.data.formats.read import RowFiles
from dasd_lite.data.formats.row import Row
from dasd_lite.data.records import Prompt
from dasd_lite.data.seeds import digest
from dasd_lite.errors import ConfigError, DataError


@dataclass(frozen=True)
class Prompts(Sequence[Prompt]):
    """Prompts in order, read once and passed to every stage that asks them.

    Attributes:
        items: The prompts.
        path: The file or files; None if they came from none.
        limit: How many of the file's prompts were read at most; None for all.
        system: System message added to prompts that had none.
        left_out: Why prompts of the file are not among them → how many.
        commit: Of files of the hub, their path with the commit; "" for others.
    """

    items: tuple[Prompt, ...]
    path: str | None = None
    limit: int | None = None
    system: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    commit: str = ""

    @property
    def counts(self) -> dict[str, Any]:
        """What a manifest says about them, beside their number."""
        return {**self.left_out, **({"prompts_from": self.commit} if self.commit else {})}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the prompts: their uids and all that answers may depend on, wherever they come from."""
        return digest([(prompt.uid, prompt.columns()) for prompt in self.items])

    @classmethod
    def of(
        cls,
        source: Prompts | Iterable[Prompt] | str | PathLike[str],
        *,
        limit: int | None = None,
        system: str | None = None,
        reading: Reading | None = None,
    ) -> Prompts:
        """Return the first `limit` prompts of `source`.

        Args:
            source: Prompts, which may have been read before, or their file.
            limit: How many at most; None: all.
            system: System message for prompts of a file that have none.
            reading: How a file is read.

        Raises:
            DataError: `source` has no prompts, or holds something else.
        """
        if isinstance(source, str | PathLike):
            return read_prompts(source, limit=limit, system=system, reading=reading)
        if not isinstance(source, cls):
            if not isinstance(source, Iterable):
                raise DataError(f"prompts: {str(source)[:60]!r} is neither a list of Prompt nor a path")
            items = tuple(source)
            for item in items:
                if not isinstance(item, Prompt):
                    raise DataError(f"prompts: {str(item)[:60]!r} is not a Prompt; pass Prompt objects, or a path")
            if not items:
                raise DataError("prompts: the list is empty; give at least one prompt")
            for uid, number in Counter(item.uid for item in items).items():
                if number > 1:
                    raise DataError(f"prompts: {number} prompts have the uid {uid!r}; uids must be unique")
            source = cls(items)
        return source if limit is None or limit == source.limit else source.first(limit)

    def first(self, number: int) -> Prompts:
        """Return the first `number` prompts, as if read with that limit."""
        limit = number if self.limit is None else min(number, self.limit)
        return replace(self, items=self.items[:number], limit=limit)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        """Return one prompt, or several."""
        return self.items[index]

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.items)


def read_prompts(
    path: str | PathLike[str],
    *,
    limit: int | None = None,
    system: str | None = None,
    reading: Reading | None = None,
    **options: Any,
) -> Prompts:
    """Read prompts.

    Args:
        path: A file of JSONL, JSON, CSV or Parquet, a folder, a pattern, or hf://datasets/ORG/NAME@REVISION/path.
        limit: Read only this many prompts.
        system: System message for prompts that have none.
        reading: How the file is read; None: found from its columns.
        **options: Fields of Reading (`format`, `columns`, `max_faulty`), in place of those of `reading`.

    Raises:
        ConfigError: `limit` is not at least 1, or a wrong option.
        DataError: Rows that cannot be read, each with file and line.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"limit = {limit!r}: it must be an integer of at least 1")
    path, reading = fspath(path), with_options(Reading, reading, options, "prompts")
    files = RowFiles([path], reading, answers=False, system=system)
    prompts: dict[str, Prompt] = {}
    duplicates = 0
    for row in files:
        prompt = to_prompt(row, row.uid if row.uid is not None else row.prompt_uid)
        first = prompts.setdefault(prompt.uid, prompt)
        if first is not prompt:
            if first.columns() == prompt.columns():
                duplicates += 1
            elif first.messages == prompt.messages:
                what = "answer" if first.answer != prompt.answer else "domain"
                files.fault(row.where, f"same question as {first.where}, but another {what}; keep one of them")
            else:
                files.fault(row.where, f"same uid {prompt.uid!r} as {first.where}; uids must be unique")
        if len(prompts) == limit:
            break
    for line in files.finish():
        note(line)
    if not prompts:
        raise DataError(f"{path}: contains no prompts")
    left_out = dict(files.left_out)
    if duplicates:
        left_out["duplicate questions"] = duplicates
        note(f"{path}: {duplicates:,} left out: the same question again")
    return Prompts(tuple(prompts.values()), path, limit, system, left_out, files.sources[0].identity)


def to_prompt(row: Row, uid: str | None) -> Prompt:
    """Return the question of a row under the name `uid`; None: a hash of its messages."""
    return Prompt(
        uid=uid if uid is not None else digest(row.messages),
        messages=tuple(row.messages),
        domain=row.domain if row.domain is not None else "all",
        answer=row.answer,
        where=row.where,
    )
