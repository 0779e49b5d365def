"""Take existing answers as rollouts: your own files, or a published data set.

Input: files of many formats (docs/data.md) with questions and answers; log-probabilities may be beside the answers or
in files of their own. Output: the same rollouts that sample writes. Invariant: log-probabilities are those of the
source, and their tokens spell the answer byte by byte; otherwise they are null, and the reason is counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import pyarrow as pa

from dasd_lite.chat.align import NO_LOGPROBS, Aligned, Aligner, Misfit
from dasd_lite.chat.chat import Chat
from dasd_lite.config.models import Endpoint, Teacher, Transformers, Vllm, result_options
from dasd_lite.config.options import with_options
from dasd_lite.config.stages import IngestConfig
from dasd_lite.console import Progress, label, note, progress
from dasd_lite.data.formats.read import RowFiles
from dasd_lite.data.formats.row import Answer, Fault
from dasd_lite.data.formats.sources import find
from dasd_lite.data.handles import Rollouts
from dasd_lite.data.hub import model_folder
from dasd_lite.data.logprobs import Partners
from dasd_lite.data.manifest import identify
from dasd_lite.data.prompts import to_prompt
from dasd_lite.data.records import ROLLOUT, Prompt
from dasd_lite.data.seeds import digest
from dasd_lite.data.writer import ShardWriter, is_finished
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.inference import Sampler

VERSION = 4  # 3 removed tags amid an answer, and read a run's own rollouts and worked solutions as others
_READ_AGAIN = ("config.limit", "inputs.paths", "inputs.logprobs")  # by themselves, since it costs nothing
_BATCH = 256


def ingest(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    config: IngestConfig | None = None,
    *,
    out: str | PathLike[str],
    system: str | None = None,
    teacher: Teacher | Sampler | None = None,
    force: bool = False,
    **options: Any,
) -> Rollouts:
    """Take existing answers as rollouts.

    Args:
        paths: Files of rows with prompt and answer, folders, patterns, or places on the hub; None: `config.paths`.
        config: Options of the stage.
        out: Folder to write.
        system: System message for prompts that have none.
        teacher: Its tokenizer is that of the token ids, unless `config.tokenizer` names another.
        force: Replace a folder that was made with other options.
        **options: Fields of IngestConfig, in place of those of `config`.

    Returns:
        The rollouts, one for each answer. An answer that occurs twice counts once.

    Raises:
        ConfigError: A wrong option.
        DataError: A file that is missing, or rows that cannot be read, each with file and line.
        CheckpointError: `out` was made with other options.
    """
    if paths is not None:
        options["paths"] = [fspath(p) for p in ([paths] if isinstance(paths, str | PathLike) else paths)]
    config, out = with_options(IngestConfig, config, options, "ingest"), Path(out)
    if not config.paths:
        raise DataError("ingest.paths is not set; name files of rows with prompt and answer")
    with _named("ingest.paths"):
        files = RowFiles(config.paths, config, answers=True, tokens=True, system=system)
    with _named("ingest.logprobs"):
        sources = [find(path) for path in config.logprobs]
    with _named("ingest.tokenizer"):
        chat = None if (name := tokenizer_name(config, teacher)) is None else Chat(model_folder(name))
    asked = {k: v for k, v in result_options(config).items() if k not in ("paths", "logprobs", "tokenizer")}
    inputs = {"paths": digest([source.fingerprint for source in files.sources])}
    inputs |= {"logprobs": digest([source.fingerprint for source in sources])} if sources else {}
    inputs |= {} if chat is None else {"tokenizer": chat.fingerprint}
    names = {"paths": ", ".join(s.identity or place for s, place in zip(files.sources, config.paths, strict=True))}
    names |= {"logprobs": ", ".join(s.identity or p for s, p in zip(sources, config.logprobs, strict=True))}
    identity = identify("ingest", VERSION, asked | {"system": system}, inputs, names=names, grows=_READ_AGAIN)
    if is_finished(out, identity, force=force):
        return Rollouts(out)

    seen = _Seen()
    rows: list[dict[str, Any]] = []
    with (
        ExitStack() as stack,
        ShardWriter(out, identity, {"rollouts": ROLLOUT}, config) as writer,
        progress(
            label(out.parent.name, "ingest"), len(files.files), "files", status=lambda: f"{files.num_rows:,} rows"
        ) as bar,
    ):
        tokens = _Tokens(config, chat, stack.enter_context(Partners((f for s in sources for f in s.files), out)))
        for prompt, answer, uid in _answers(files, bar):
            try:
                admitted = seen.admit(prompt, answer, uid)
            except Fault as fault:
                files.fault(prompt.where, str(fault))
                continue
            if admitted is None or (columns := tokens.columns(prompt.where, answer, uid)) is None:
                continue
            rows.append(seen.add(prompt, answer, *admitted) | columns)
            if len(rows) == _BATCH:
                writer.write("rollouts", pa.RecordBatch.from_pylist(rows, schema=ROLLOUT))
                rows.clear()
            if len(seen) == config.limit:
                break
        for line in files.finish():
            note(line)
        if not seen:
            why = ", ".join(
                f"{reason} {number:,}" for reason, number in (files.left_out + tokens.left_out).most_common()
            )
            raise DataError(f"{', '.join(config.paths)}: " + (f"every row is left out: {why}" if why else "no rows"))
        if seen.num_duplicates:
            note(f"{seen.num_duplicates:,} left out: the same answer to the same question again")
        writer.write("rollouts", pa.RecordBatch.from_pylist(rows, schema=ROLLOUT))
        tokens.finish(read_all=len(seen) != config.limit)
        writer.publish(
            seen.counts | tokens.counts | {f"left out: {why}": number for why, number in files.left_out.items()}
        )
    return Rollouts(out)


def _answers(files: RowFiles, bar: Progress) -> Iterator[tuple[Prompt, Answer, str | None]]:
    """Yield each answer with its question and the name that the file gives it."""
    for file in files.files:
        for row in files.rows(file):
            prompt = to_prompt(row, row.prompt_uid)
            several = len(row.answers) > 1
            for number, answer in enumerate(row.answers):
                yield prompt, answer, f"{row.uid}-{number}" if several and row.uid is not None else row.uid
        bar.advance()


class _Seen:
    """The answers so far: their names, and which of them occur again."""

    def __init__(self) -> None:
        """Start without any."""
        self.num_duplicates = 0
        self._places: dict[str, str] = {}  # uid → where
        self._answers: set[str] = set()
        self._candidates: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return the number of answers."""
        return len(self._places)

    @property
    def counts(self) -> dict[str, int]:
        """What the manifest counts."""
        duplicates = {"duplicates": self.num_duplicates} if self.num_duplicates else {}
        return {"prompts": len(self._candidates), "rollouts": len(self), **duplicates}

    def admit(self, prompt: Prompt, answer: Answer, uid: str | None) -> tuple[str, str] | None:
        """Return key and name of a new answer, or None if the same answer to the same question was there before.

        Raises:
            Fault: Its uid, or that of its question, is that of another.
        """
        text = f"{prompt.uid}\0{answer.completion}"
        if answer.own is not None:  # a run that drew the same text twice has two answers
            text += f"\0{uid}\0{answer.prefix_bytes}"
        key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        if key in self._answers:
            self.num_duplicates += 1
            return None
        uid = key if uid is None else uid
        if uid in self._places:
            raise Fault(f"same uid {uid!r} as {self._places[uid]}, but another answer; uids must be unique")
        return key, uid

    def add(self, prompt: Prompt, answer: Answer, key: str, uid: str) -> dict[str, Any]:
        """Return the rollout of an answer that was admitted."""
        self._answers.add(key)
        self._places[uid] = prompt.where
        own = answer.own or {}
        index = own.get("index")
        index = self._candidates[prompt.uid] if index is None else index
        self._candidates[prompt.uid] += 1
        return {
            **prompt.columns(),
            "uid": uid,
            "index": index,
            "completion": answer.completion,
            "finish_reason": answer.finish_reason,
            "prefix_bytes": answer.prefix_bytes,
            "num_tokens": own.get("num_tokens"),
            "max_tokens": own.get("max_tokens"),
        }


class _Tokens:
    """The tokens of the answers: found, aligned with the text, and counted by the reason if they are not."""

    def __init__(self, config: IngestConfig, chat: Chat | None, partners: Partners) -> None:
        """Take what comes with answers, and what is in files of its own."""
        self._partners, self._has_partners = partners, bool(config.logprobs)
        self._required = config.require_logprobs
        self._aligner = Aligner(chat)
        self._aligned, self._without_answer = 0, 0
        self._reasons: Counter[str] = Counter()
        self._first = ""

    def columns(self, where: str, answer: Answer, uid: str | None) -> dict[str, Any] | None:
        """Return the columns of an answer's tokens, or None if the answer is left out."""
        tokens: Mapping[str, Any] | None = answer.tokens
        if not tokens and self._has_partners:
            tokens = None if uid is None else self._partners.take(uid)
        if tokens:
            found = self._aligner.align(answer.completion, tokens, answer.prefix_bytes)
        elif self._has_partners:
            found = Misfit("no log-probabilities of this uuid", f"uuid {uid}" if uid is not None else "no uuid")
        elif self._required:
            found = Misfit(NO_LOGPROBS, NO_LOGPROBS)
        else:
            return {}
        if isinstance(found, Aligned):
            self._aligned += 1
            return found._asdict()
        self._reasons[found.reason] += 1
        self._first = self._first or f"{where}: {found.detail}"
        if self._required:
            return None
        has_none = answer.own is not None and found.reason == NO_LOGPROBS  # ids alone, or no tokens of an empty text
        return {name: answer.tokens.get(name) for name in Aligned._fields} if has_none else {}

    @property
    def left_out(self) -> Counter[str]:
        """Why answers are left out for want of log-probabilities → how many."""
        return self._reasons if self._required else Counter()

    def finish(self, *, read_all: bool) -> None:
        """Print what came of the log-probabilities; with `read_all` also count those that belong to no answer."""
        if self._has_partners and read_all:
            self._without_answer = self._partners.num_left()
        if not self._aligned and not self._reasons:
            return
        line = f"{self._aligned:,} answers have log-probabilities"
        if self._reasons:
            reasons = ", ".join(f"{reason} {number:,}" for reason, number in self._reasons.most_common())
            what = "are left out" if self._required else "have none"
            line += f", {self._reasons.total():,} {what}: {reasons} (the first is {self._first})"
        if self._without_answer:
            line += f"; {self._without_answer:,} rows of log-probabilities belong to no answer"
        note(line)

    @property
    def counts(self) -> dict[str, Any]:
        """What the manifest counts."""
        if not self._aligned and not self._reasons:
            return {}
        counts: dict[str, Any] = {"aligned": self._aligned, "reasons": dict(sorted(self._reasons.items()))}
        return {"logprobs": counts | ({"without_answer": self._without_answer} if self._has_partners else {})}


def tokenizer_name(config: IngestConfig, teacher: Teacher | Sampler | None) -> str | None:
    """Return the folder or hub name of the tokenizer whose ids come with answers; None if there is none."""
    if config.tokenizer is not None:
        return config.tokenizer
    if isinstance(teacher, Endpoint):
        return teacher.tokenizer
    return teacher.model if isinstance(teacher, Transformers | Vllm) else None


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Begin each line of an error with the option that it is about."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)("\n".join(f"{key}: {line}" for line in str(error).splitlines())) from error
