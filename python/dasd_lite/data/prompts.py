"""Read files of questions and answers that users bring: JSONL or Parquet.

Input: a path. Output: rows, each with the place it came from, for error messages. Invariant: a row is
read whole or the reading stops with the file, the line and what is wrong; none is skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from dasd_lite.data.manifest import fingerprint
from dasd_lite.data.records import Message, Prompt
from dasd_lite.data.seeds import digest
from dasd_lite.errors import DataError


@dataclass(frozen=True)
class Prompts(Sequence[Prompt]):
    """Prompts in order, read once and handed on to every stage that asks them.

    Attributes:
        items: The prompts.
        fingerprint: Hash of the whole file, or of the prompts themselves where they came from no file.
        path: The file.
        limit: Only so many of the file's first prompts were read; None: all.
        system: System message that was put before each.
    """

    items: tuple[Prompt, ...]
    fingerprint: str
    path: Path | None = None
    limit: int | None = None
    system: str | None = None

    @classmethod
    def of(cls, source: Prompts | Iterable[Prompt] | str | PathLike[str]) -> Prompts:
        """Return prompts as they are, of a file, or of any other list of prompts."""
        if isinstance(source, cls):
            return source
        if isinstance(source, str | PathLike):
            return read_prompts(Path(source))
        items = tuple(source)
        if not items:
            raise DataError("prompts: an empty list; there must be at least one")
        return cls(items, digest([(prompt.uid, prompt.columns()) for prompt in items]))

    def first(self, number: int) -> Prompts:
        """Return the first `number` of them, as if read with that limit."""
        limit = number if self.limit is None else min(number, self.limit)
        return replace(self, items=self.items[:number], limit=limit)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        """Return one prompt, or a part of them."""
        return self.items[index]

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.items)


def read_prompts(path: str | PathLike[str], *, limit: int | None = None, system: str | None = None) -> Prompts:
    """Read prompts from a JSONL or Parquet file.

    Args:
        path: Rows with `prompt`, or with `messages`; `answer`, `domain` and `uid` are optional.
        limit: Read only the first so many rows.
        system: System message for prompts that have none.

    Raises:
        DataError: A bad row, an empty prompt or a uid that occurs twice; names file and line.
    """
    path = Path(path)
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for where, row in read_rows(path):
        prompt = to_prompt(row, where, system)
        if prompt.uid in seen:
            repeated = "uid" if "uid" in row else "question"
            what = repr(prompt.uid) if "uid" in row else "(give each a uid of its own to keep both)"
            raise DataError(f"{where}: the {repeated} of {seen[prompt.uid]} again: {what}")
        seen[prompt.uid] = where
        prompts.append(prompt)
        if limit is not None and len(prompts) == limit:
            break
    if not prompts:
        raise DataError(f"{path}: no prompts in it")
    return Prompts(tuple(prompts), fingerprint(path), path, limit, system)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its place (file:line, or file and row number)."""
    if not path.is_file():
        raise DataError(f"{path}: " + ("a folder; name a file" if path.is_dir() else "no such file"))
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        yield from _read_jsonl(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise DataError(f"{path}: ends in {path.suffix or 'nothing'!r}; .jsonl or .parquet can be read")


def to_prompt(row: Mapping[str, Any], where: str, system: str | None = None) -> Prompt:
    """Build a prompt of a row's `prompt` (or `input`) or `messages`, with `system` before it."""
    messages = _messages(row, where)
    while messages and messages[-1]["role"] == "assistant":  # the answer, where the row has one
        messages.pop()
    if system is not None and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise DataError(f"{where}: the prompt is empty; a question needs text")
    answer, domain = row.get("answer"), row.get("domain")
    return Prompt(
        uid=str(row["uid"]) if row.get("uid") is not None else digest(messages),
        messages=tuple(messages),
        domain=str(domain) if domain is not None else "all",
        answer=str(answer) if answer is not None else None,
    )


def _messages(row: Mapping[str, Any], where: str) -> list[Message]:
    if (messages := row.get("messages")) is not None:
        right = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not right:
            raise DataError(f"{where}: messages = {str(messages)[:60]}; it should be a list of {{role, content}} texts")
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    text = row.get("prompt", row.get("input"))
    if text is None:
        raise DataError(
            f"{where}: has {', '.join(map(str, row)) or 'no key'}; a row needs `prompt`, `input` or `messages`"
        )
    if not isinstance(text, str):
        raise DataError(f"{where}: prompt = {str(text)[:60]}; it should be text")
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
                bad = line[error.start]
                raise DataError(f"{where}: not UTF-8: byte 0x{bad:02x} at column {error.start + 1}") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
            if b"\\ud" in line.lower() and (character := _surrogate(row)):
                raise DataError(f"{where}: not UTF-8: half a character, \\u{ord(character):04x}, without the other")
            if not isinstance(row, dict):
                raise DataError(f'{where}: {str(row)[:40]!r} is not an object; a line should look like {{"prompt": …}}')
            yield where, row


def _surrogate(row: Any) -> str:
    """Return the first half of a surrogate pair that a row has alone, or nothing."""
    found = re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))
    return found.group() if found else ""


def _first_bad(batch: pa.RecordBatch) -> int:
    """Return the first row of a batch that holds text that is none."""
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
                    raise DataError(f"{path} row {number + _first_bad(batch)}: not UTF-8: {error.reason}") from error
                for row in rows:
                    yield f"{path} row {number}", row
                    number += 1
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from error
