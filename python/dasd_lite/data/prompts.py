"""Files of prompts and answers that users bring, as JSONL or Parquet.

Input: a path. Output: rows, each with its location for error messages. Invariant: no row is skipped; a bad one is an
error that names the file, the line, and the mistake.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from dasd_lite.data.records import Message, Prompt
from dasd_lite.data.seeds import digest
from dasd_lite.errors import ConfigError, DataError


@dataclass(frozen=True)
class Prompts(Sequence[Prompt]):
    """Prompts in order, read once and passed to every stage that asks them.

    Attributes:
        items: The prompts.
        path: The file; None if they came from no file.
        limit: How many of the file's prompts were read at most; None for all.
        system: System message added to prompts that had none.
    """

    items: tuple[Prompt, ...]
    path: Path | None = None
    limit: int | None = None
    system: str | None = None

    @classmethod
    def of(
        cls,
        source: Prompts | Iterable[Prompt] | str | PathLike[str],
        *,
        limit: int | None = None,
        system: str | None = None,
    ) -> Prompts:
        """Return the first `limit` prompts of `source`.

        Args:
            source: Prompts, which may have been read before, or their file.
            limit: How many at most; None: all.
            system: System message for prompts of a file that have none.

        Raises:
            DataError: `source` has no prompts, or holds something else.
        """
        if isinstance(source, str | PathLike):
            return read_prompts(source, limit=limit, system=system)
        if not isinstance(source, cls):
            if not isinstance(source, Iterable):
                raise DataError(f"prompts: {str(source)[:60]!r} is neither a list of Prompt nor a path")
            items = tuple(source)
            for item in items:
                if not isinstance(item, Prompt):
                    raise DataError(f"prompts: {str(item)[:60]!r} is not a Prompt; pass Prompt objects, or a path")
            if not items:
                raise DataError("prompts: the list is empty; give at least one prompt")
            source = cls(items)
        return source if limit is None or limit == source.limit else source.first(limit)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the prompts, whatever file they came from."""
        return digest([prompt.columns() for prompt in self.items])

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


def read_prompts(path: str | PathLike[str], *, limit: int | None = None, system: str | None = None) -> Prompts:
    """Read prompts from a JSONL or Parquet file.

    Args:
        path: Rows with `prompt`, `input`, or `messages`; `answer`, `domain`, and `uid` are optional.
        limit: Read only this many rows.
        system: System message for prompts that have none.

    Raises:
        ConfigError: `limit` is not at least 1.
        DataError: A bad row, an empty prompt, or a uid that occurs twice; names file and line.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"limit = {limit!r}: it must be an integer of at least 1")
    path = Path(path)
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for where, row in read_rows(path):
        prompt = to_prompt(row, where, system)
        if first := seen.get(prompt.uid):
            if row.get("uid") is not None:
                raise DataError(f"{where}: same uid {prompt.uid!r} as {first}; uids must be unique")
            raise DataError(f"{where}: same question as {first}; remove one, or give each its own uid to keep both")
        seen[prompt.uid] = where
        prompts.append(prompt)
        if limit is not None and len(prompts) == limit:
            break
    if not prompts:
        raise DataError(f"{path}: contains no prompts")
    return Prompts(tuple(prompts), path, limit, system)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its location: file:line, or file and row number."""
    if not path.is_file():
        raise DataError(f"{path}: " + ("is a folder; name a file" if path.is_dir() else "no such file"))
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        yield from _read_jsonl(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise DataError(f"{path}: ends in {path.suffix or 'nothing'!r}; use a .jsonl or .parquet file")


def to_prompt(row: Mapping[str, Any], where: str, system: str | None = None) -> Prompt:
    """Build a prompt from the `prompt`, `input`, or `messages` of a row, adding the system message `system`."""
    messages = _messages(row, where)
    while messages and messages[-1]["role"] == "assistant":  # an answer that the row also has
        messages.pop()
    if system is not None and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise DataError(f"{where}: the prompt is empty; the last message must be a user's, with text")
    answer, domain = row.get("answer"), row.get("domain")
    return Prompt(
        uid=str(row["uid"]) if row.get("uid") is not None else digest(messages),
        messages=tuple(messages),
        domain=str(domain) if domain is not None else "all",
        answer=str(answer) if answer is not None else None,
    )


def _messages(row: Mapping[str, Any], where: str) -> list[Message]:
    if (messages := row.get("messages")) is not None:
        valid = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not valid:
            raise DataError(
                f"{where}: messages = {str(messages)[:60]}; it must be a list of {{role, content}}, both of them text"
            )
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    text = row.get("prompt", row.get("input"))
    if text is None:
        raise DataError(
            f"{where}: has {', '.join(map(str, row)) or 'no keys'}; a row needs `prompt`, `input`, or `messages`"
        )
    if not isinstance(text, str):
        raise DataError(f"{where}: prompt = {str(text)[:60]}; it must be text")
    return [{"role": "user", "content": text}]


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise DataError(f"{where}: not UTF-8: byte 0x{byte:02x} at column {error.start + 1}") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
            if b"\\ud" in line.lower() and (character := _surrogate(row)):
                raise DataError(f"{where}: not UTF-8: \\u{ord(character):04x} is only half of a surrogate pair")
            if not isinstance(row, dict):
                raise DataError(
                    f'{where}: {str(row)[:40]!r} is not a JSON object; a line must look like {{"prompt": …}}'
                )
            yield where, row


def _surrogate(row: Any) -> str:
    """Return the first unpaired surrogate in a row, or ""."""
    match = re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))
    return match.group() if match else ""


def _first_undecodable(batch: pa.RecordBatch) -> int:
    """Return the index of the first row of a batch with text that is not UTF-8."""
    for row in range(batch.num_rows):
        try:
            batch.slice(row, 1).to_pylist()
        except UnicodeDecodeError:
            return row
    return 0


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path} row {number + _first_undecodable(batch)}: not UTF-8: {error.reason}"
                    ) from error
                for row in rows:
                    yield f"{path} row {number}", row
                    number += 1
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from error
