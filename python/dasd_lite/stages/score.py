"""Score each rollout: p per sentence under teacher and student (paper section 4).

Input: rollouts, and the student before training. Output: one row per rollout with sentence ends, p_T and p_S, where p
of a sentence is exp(mean log-probability of its tokens), each model on its own tokens of the text.
The end token belongs to no sentence. The student scores every answer. The teacher's log-probabilities came with the
answers or, with score.by = "teacher", are computed by the same code in the subfolder `teacher`. Both are journals, so
the same call resumes after any stop.

The student's pass also keeps two sums over each answer and its end token, Σ min(rank, 100) and Σ −log p: their ratio is
the rank-surprisal ratio of arXiv 2601.14249.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import repeat
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import TokenIds
from dasd_lite.config.models import (
    Student,
    Table,
    Teacher,
    Transformers,
    Vllm,
    engine_options,
    result_options,
    student_table,
)
from dasd_lite.config.options import with_options
from dasd_lite.config.stages import NEED_NO_LOGPROBS, ScoreConfig
from dasd_lite.console import label, note, progress, say
from dasd_lite.data.dataset import batches, num_rows
from dasd_lite.data.handles import Rollouts, Scores, model_path
from dasd_lite.data.hub import has_longrope
from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import Identity, identify, read_manifest, read_state, read_timing, state_file
from dasd_lite.data.records import SCORE, TEACHER_TOKENS
from dasd_lite.data.seeds import digest
from dasd_lite.data.usage import Usage
from dasd_lite.data.writer import begin, is_finished
from dasd_lite.errors import ConfigError, DataError
from dasd_lite.inference import Sampler, Scorer
from dasd_lite.inference.backends import check_same_teacher, model_identity, model_name
from dasd_lite.inference.collect import journal_usage
from dasd_lite.inference.scorer import context_of, open_scorer
from dasd_lite.method.divergence import Tokens, sentence_scores

VERSION = 5  # 1 rounded the mean before its exp; 2 had no ranks; 3 other sentences; 4 no keys
_GROWS = ("inputs.rollouts",)
_COLUMNS = ("uid", "messages", "completion", "prefix_bytes", "token_ids", "logprobs", "token_bytes")
_MAX_RANK = 100  # arXiv 2601.14249 clips there
_NOISE_ITEMS, _NOISE_TOKENS = 8, 32768  # scored by a second engine as well, to measure the noise between the two
_NOISE_LIMIT = 0.05  # of a sentence's p: half the margin (select.beta) that makes a sentence a Teacher sentence

TokenLogprobs = npt.NDArray[np.float32]
Ranks = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Item:
    """One rollout as a model scores it."""

    position: int
    where: str
    """What errors call it: file and uid."""
    row: dict[str, Any]
    """Its columns; numbers are arrays, or None if the rollout has none."""
    ids: TokenIds
    num_context: int


def score(
    rollouts: Rollouts | str | PathLike[str],
    student: Student | str | PathLike[str],
    config: ScoreConfig | None = None,
    *,
    out: str | PathLike[str],
    teacher: Teacher | Sampler | None = None,
    student_alone: bool = False,
    used: Usage | None = None,
    reuse: Iterable[str | PathLike[str]] = (),
    force: bool = False,
    **options: Any,
) -> Scores:
    """Score every rollout with the student, and with the teacher where it has not sampled them.

    Args:
        rollouts: What sample, ingest or mix wrote.
        student: The student before training: its table, folder or name on the hub.
        config: Options of the stage.
        out: Folder to write. One that `score` wrote before keeps the scores of rollouts that are the same.
        teacher: Scores the answers if `config.by` is "teacher"; otherwise their own log-probabilities count.
        student_alone: Score answers that have no log-probabilities of the teacher too, which is enough for the rules
            "rsr" and "likelihood".
        used: What other stages have asked of the teacher; it counts against its budget.
        reuse: Folders that `score` wrote with these options, finished or not; the same rollouts are not scored again.
        force: Replace a folder that was made with other options.
        **options: Fields of ScoreConfig, in place of those of `config`.

    Returns:
        The scores, one row for each rollout.

    Raises:
        ConfigError: A wrong option, or no teacher where one should score.
        DataError: A rollout without log-probabilities of the teacher (unless `student_alone`), or of another teacher.
        CheckpointError: `out` was made with other options.

    Source: arXiv 2601.09088, section 4.
    """
    config = with_options(ScoreConfig, config, options, "score")
    rollouts, out = Rollouts.of(rollouts).folder, Path(out)
    student = student_table(student)
    folder = model_path(student)
    asked: dict[str, Any] = {**result_options(config), "dtype": student.dtype}
    del asked["when"]  # whether, not how
    asked |= {"context": student.max_model_len} if has_longrope(folder) else {}
    inputs: dict[str, Path | str] = {"rollouts": rollouts, "student": folder}
    if config.by == "teacher":
        if teacher is None:
            raise ConfigError("score.by = 'teacher' needs a teacher, but there is no [teacher] table")
        asked["teacher"] = engine_options(teacher) if isinstance(teacher, Table) else {}
        inputs["teacher"] = model_identity(teacher)
    names = {"teacher": model_name(teacher)} if teacher is not None else {}
    identity = identify("score", VERSION, asked, inputs, names=names, brought=("student", "teacher"), grows=_GROWS)
    if is_finished(out, identity, force=force):
        return Scores(out)

    phase, readings = out.parent.name, None
    noise = {name: value for name, value in read_timing(out).items() if "_noise_" in name}  # until it is measured again
    others = [Path(folder) for folder in reuse if _has_same_options(Path(folder), identity)]
    total = num_rows(rollouts, "rollouts")
    keys, uids = cache(partial(_keys, rollouts)), cache(partial(_uids, rollouts))
    if teacher is not None and config.by == "teacher":
        check_same_teacher(rollouts, teacher, identity)
        if not (out / "manifest.json").exists():  # a finished folder stays so until its second half grows
            begin(out, identity, config)
        readings = out / "teacher"
        halves = [folder / "teacher" for folder in others]
        _score_by_teacher(rollouts, teacher, config, readings, identity, keys, uids, halves, phase, used or Usage())
        noise |= _noise_of_sampling(rollouts, readings)
    with Journal(
        out,
        identity,
        SCORE,
        total,
        keys=keys,
        key="key",
        columns=lambda position: {"uid": uids()[position]},
        table="scores",
        config=config,
    ) as journal:
        timing = noise
        journal.take_over(others)
        if len(done := journal.done()) < total:
            by_student = _StudentScorer(student, folder, config)
            pending = _student_items(
                rollouts, readings, by_student.chat, by_student.context, done, student_alone=student_alone
            )
            timing = noise | _fill(
                journal,
                by_student.scorer,
                by_student.remember_first(pending),
                by_student.row,
                label(phase, "score"),
            )
            timing |= by_student.noise_of_engines()
        unscored = sum(batch["surprisal_sum"].null_count for batch in journal.batches(["surprisal_sum"]))
        journal.publish({"rollouts": total, "over_context": unscored}, **timing)
    return Scores(out)


def _has_same_options(folder: Path, identity: Identity) -> bool:
    """Return whether a folder of scores differs from `identity` in nothing but its rollouts."""
    file = state_file(folder)
    return file is not None and identity.changed(read_state(file)) <= identity.grows


def _keys(rollouts: Path) -> list[str]:
    """Return the key of each rollout."""
    return [_key(row) for _, row in _pending(rollouts, None, set())]


def _uids(rollouts: Path) -> list[str]:
    return [uid for batch in batches(rollouts, "rollouts", ["uid"]) for uid in batch["uid"].to_pylist()]


def _key(row: Mapping[str, Any]) -> str:
    """Return a hash of all of a rollout that its scores depend on."""
    tokens = [row[name] for name in ("token_ids", "logprobs", "token_bytes")]
    hashed = hashlib.blake2b(digest(row["messages"], row["completion"], row["prefix_bytes"]).encode(), digest_size=16)
    for numbers in tokens:
        hashed.update(
            b"null" if numbers is None else f"{len(numbers)}:".encode() + np.ascontiguousarray(numbers).tobytes()
        )
    return hashed.hexdigest()


def _fill(
    journal: Journal,
    scorer: Scorer,
    items: Iterator[_Item | tuple[int, dict[str, Any]]],
    row: Callable[[_Item, TokenLogprobs, Ranks | None], dict[str, Any]],
    label: str,
) -> dict[str, float]:
    """Score the items and commit a row for each; a row among them is committed as it is.

    Closes the scorer, and returns the timing.
    """
    waiting: dict[int, _Item] = {}
    unread: list[tuple[int, dict[str, Any]]] = []

    def sequences() -> Iterator[tuple[int, TokenIds]]:
        for item in items:
            if isinstance(item, tuple):
                unread.append(item)
            else:
                waiting[item.position] = item
                yield item.position, item.ids

    def commit_unread() -> None:
        for position, finished in unread:
            journal.commit({position: finished}, {"over_context": 1})
            bar.advance()
        unread.clear()

    tokens, start = 0, time.perf_counter()
    try:
        with progress(label, journal.total, "rollouts", len(journal.done()), scorer.status) as bar:
            for position, logprobs, ranks in scorer.score(sequences()):
                item = waiting.pop(position)
                journal.commit({position: row(item, logprobs, ranks)}, {"prompt_tokens": len(item.ids)})
                tokens += len(item.ids)
                bar.advance()
                commit_unread()
            commit_unread()
    finally:
        scorer.close()
    return {"scored_tokens": tokens, "tokens_per_second": tokens / (time.perf_counter() - start)}


# --- the teacher --------------------------------------------------------------------------------------


def _score_by_teacher(
    rollouts: Path,
    teacher: Teacher | Sampler,
    config: ScoreConfig,
    out: Path,
    parent: Identity,
    keys: Callable[[], Sequence[str]],
    uids: Callable[[], Sequence[str]],
    reuse: Sequence[Path],
    phase: str,
    used: Usage,
) -> None:
    """Let the teacher score every answer: by the token ids that it sampled, or else as it would tokenize the text."""
    inputs = {name: parent.inputs[name] for name in ("rollouts", "teacher")}
    identity = identify("score.teacher", VERSION, parent.config["teacher"], inputs, grows=_GROWS)
    if is_finished(out, identity):
        return
    total = num_rows(rollouts, "rollouts")
    with Journal(
        out,
        identity,
        TEACHER_TOKENS,
        num_rows(rollouts, "rollouts"),
        keys=keys,
        key="key",
        columns=lambda position: {"uid": uids()[position]},
        table="readings",
        config=config,
    ) as journal:
        timing = {}
        journal.take_over(reuse)
        if len(done := journal.done()) < total:
            used += journal_usage(journal)
            scorer, chat = open_scorer(
                teacher, batch_tokens=config.batch_tokens, chunk_tokens=config.chunk_tokens, used=used
            )

            # Ids that came from files may be another model's, and may begin behind a header that the model writes.
            was_sampled = read_manifest(rollouts)["stage"] != "ingest"

            def row(item: _Item, logprobs: TokenLogprobs, ranks: Ranks | None) -> dict[str, Any]:
                answer = slice(item.num_context, None)
                token_bytes = item.row["token_bytes"]
                if not (was_sampled and _has_ids(item.row)):
                    lengths = chat.token_bytes(item.ids[answer][:-1], item.row["completion"])
                    token_bytes = np.append(lengths, np.int32(0))  # the end token
                tokens = {"token_ids": item.ids[answer], "logprobs": logprobs[answer], "token_bytes": token_bytes}
                return {"uid": item.row["uid"], "key": item.row["key"], **tokens}

            items = _teacher_items(rollouts, chat, context_of(teacher, chat), done, by_ids=was_sampled)
            timing = _fill(journal, scorer, items, row, label(phase, "teacher scores"))
        unscored = sum(batch["logprobs"].null_count for batch in journal.batches(["logprobs"]))
        counts = {"rollouts": total, "over_context": unscored}
        journal.publish(counts, **timing, prompt_tokens=journal.counts().get("prompt_tokens", 0))


def _teacher_items(
    rollouts: Path, chat: Chat, context: int, done: set[int], *, by_ids: bool
) -> Iterator[_Item | tuple[int, dict[str, Any]]]:
    for position, row in _pending(rollouts, None, done):
        if by_ids and _has_ids(row):
            prompt = chat.prompt_ids(row["messages"])
            ids, num_context = np.concatenate([prompt, row["token_ids"]]), len(prompt)
        else:
            ids, num_context = chat.example(row["messages"], row["completion"])
        if len(ids) > context:  # an error only if the student can read it: see _student_items
            yield position, {"uid": row["uid"], "key": row["key"], "token_ids": ids[num_context:]}
        else:
            yield _Item(position, f"{rollouts}: rollout {row['uid']}", row, ids, num_context)


def _has_ids(row: dict[str, Any]) -> bool:
    """Return whether all of a rollout is token ids that the teacher sampled."""
    has_tokens = all(row[name] is not None for name in ("token_ids", "logprobs", "token_bytes"))
    return has_tokens and not row["prefix_bytes"]


def _noise_of_sampling(rollouts: Path, readings: Path) -> dict[str, float]:
    """Compare log-probabilities as sampled and as scored afterwards; print and return the difference."""
    count, total, largest = 0, 0.0, 0.0
    columns = ("token_ids", "logprobs")
    for sampled, scored in zip(
        batches(rollouts, "rollouts", columns), batches(readings, "readings", columns), strict=True
    ):
        for row in range(sampled.num_rows):
            if not sampled["logprobs"].is_valid()[row].as_py() or sampled["token_ids"][row] != scored["token_ids"][row]:
                continue
            if (now := _numbers(scored["logprobs"][row])) is None:
                continue
            gap = np.abs(now - _numbers(sampled["logprobs"][row]))
            count += len(gap)
            total += float(gap.sum(dtype=np.float64))
            largest = max(largest, float(gap.max()))
    if not count:
        return {}
    say(
        f"noise between sampling and scoring by the teacher: |Δ log p| mean {total / count:.1g},"
        f" largest {largest:.1g} of {count:,} tokens"
    )
    return {"sampling_noise_tokens": count, "sampling_noise_mean": total / count, "sampling_noise_largest": largest}


# --- the student --------------------------------------------------------------------------------------


def _student_items(
    rollouts: Path, readings: Path | None, chat: Chat, context: int, done: set[int], *, student_alone: bool
) -> Iterator[_Item | tuple[int, dict[str, Any]]]:
    for position, row in _pending(rollouts, readings, done):
        where = f"{rollouts}: rollout {row['uid']}"
        ids, num_context = chat.example(row["messages"], row["completion"])
        item = _Item(position, where, row, ids, num_context)
        if len(ids) > chat.context:  # select rejects it as too long, so it needs no score
            yield position, _score(item, chat, None, None)
            continue
        if row["logprobs"] is None and not student_alone:
            raise DataError(f"{where} {_why_unscored(row, readings)}")
        if len(ids) > context:
            raise DataError(
                f"{where} has {len(ids)} tokens with its prompt, over student.max_model_len = {context}; raise it"
            )
        yield item


def _why_unscored(row: dict[str, Any], readings: Path | None) -> str:
    if readings is not None:
        return (
            f"has {len(row['token_ids'])} tokens; with its prompt it exceeds the teacher's context; raise the"
            " teacher's max_model_len, or leave the rollout out"
        )
    return (
        "has no teacher log-probabilities, so it cannot be scored; let the teacher score it (score.by = 'teacher'),"
        " sample from a teacher that returns them, leave such answers out (ingest.require_logprobs = true), or use"
        f" select.rule = {NEED_NO_LOGPROBS}"
    )


class _StudentScorer:
    """The student's engine, the rows made of its scores, and the noise between it and another engine."""

    def __init__(self, student: Student, folder: Path, config: ScoreConfig) -> None:
        model, dtype, trust = student.model, student.dtype, student.trust_remote_code
        served = student.max_model_len if has_longrope(folder) else None
        self._plain = Transformers(model=model, dtype=dtype, trust_remote_code=trust, max_model_len=served)
        self._folder, self._config = folder, config
        self._model: Student = self._plain
        if config.engine == "vllm":
            other = Vllm(kind="vllm", model=model, dtype=dtype, trust_remote_code=trust, max_model_len=served)
            self._model = student if student.kind == "vllm" else other
        self.scorer, self.chat = self._open(self._model, config.four_bit)
        self.context = context_of(self._model, self.chat)
        self._noise_sample: dict[int, _Item] = {}
        self._scored: dict[int, tuple[TokenLogprobs, dict[str, Any]]] = {}

    def _open(self, model: Student, four_bit: bool = False) -> tuple[Scorer, Chat]:
        return open_scorer(
            model,
            folder=self._folder,
            batch_tokens=self._config.batch_tokens,
            chunk_tokens=self._config.chunk_tokens,
            four_bit=four_bit,
        )

    def remember_first(self, items: Iterator[_Item | tuple[int, dict[str, Any]]]) -> Iterator[Any]:
        """Yield the items, and remember the first few for noise_of_engines."""
        room = _NOISE_TOKENS if self._model.kind == "vllm" else 0
        for item in items:
            if isinstance(item, _Item) and len(item.ids) <= room and len(self._noise_sample) < _NOISE_ITEMS:
                self._noise_sample[item.position] = item
                room -= len(item.ids)
            yield item

    def row(self, item: _Item, logprobs: TokenLogprobs, ranks: Ranks | None) -> dict[str, Any]:
        """Return the row of SCORE."""
        row = _score(item, self.chat, logprobs, ranks)
        if item.position in self._noise_sample:
            self._scored[item.position] = logprobs, row
        return row

    def noise_of_engines(self) -> dict[str, float]:
        """Let transformers score the first few answers that vLLM scored; print and return the difference."""
        if not self._scored:
            return {}
        scorer, chat = self._open(self._plain)
        token_gaps, sentence_gaps = [], []
        try:
            for position, logprobs, _ in scorer.score((p, self._noise_sample[p].ids) for p in self._scored):
                before, row = self._scored[position]
                token_gaps.append(np.abs(logprobs - before)[1:])
                again = _score(self._noise_sample[position], chat, logprobs, None)
                sentence_gaps.append(np.abs(again["p_student"] - row["p_student"]))
        finally:
            scorer.close()
        gaps = np.concatenate(token_gaps)
        mean, largest = float(gaps.mean(dtype=np.float64)), float(gaps.max())
        sentence = float(np.nanmax(np.concatenate(sentence_gaps), initial=0.0))
        say(
            f"noise between vLLM and transformers, {len(token_gaps)} rollouts: |Δ log p| mean {mean:.1g}, largest"
            f" {largest:.1g} per token; largest Δp of a sentence {sentence:.1g}"
        )
        if sentence > _NOISE_LIMIT:
            note(
                f"the engines differ by {sentence:.2g} in the p of a sentence, over {_NOISE_LIMIT}; margins"
                " (select.beta) of that size are noise"
            )
        return {"engine_noise_mean": mean, "engine_noise_largest": largest, "engine_noise_sentence": sentence}


def _score(item: _Item, chat: Chat, logprobs: TokenLogprobs | None, ranks: Ranks | None) -> dict[str, Any]:
    """Return the row of SCORE; without `logprobs` that of a rollout over the student's context."""
    text, answer, targets = item.row["completion"], slice(item.num_context, -1), slice(item.num_context, None)
    try:
        teacher = student = None
        if item.row["logprobs"] is not None:
            teacher = Tokens(item.row["logprobs"], item.row["token_bytes"])
        if logprobs is not None:
            student = Tokens(logprobs[answer], chat.token_bytes(item.ids[answer], text))
        sentences = sentence_scores(text, teacher, student)
    except DataError as error:
        raise DataError(f"{item.where}: {error}") from error
    return {
        "uid": item.row["uid"],
        **sentences,
        "ids": item.ids,
        "num_context_tokens": item.num_context,
        "rank_sum": None if ranks is None else int(np.minimum(ranks[targets], _MAX_RANK).sum()),
        "surprisal_sum": None if logprobs is None else float(-logprobs[targets].sum(dtype=np.float64)),
        "key": item.row["key"],
    }


def _pending(rollouts: Path, readings: Path | None, done: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield position and columns of the rollouts that are not done; `readings` has the teacher's own tokens."""
    position = 0
    scored = repeat(None) if readings is None else batches(readings, "readings")
    for batch, tokens in zip(batches(rollouts, "rollouts", _COLUMNS), scored, strict=readings is not None):
        for row in range(batch.num_rows):
            if position + row not in done:
                values = {name: batch[name][row].as_py() for name in ("uid", "messages", "completion", "prefix_bytes")}
                values |= _tokens(batch, row)
                values["key"] = _key(values)
                yield position + row, values if tokens is None else values | _tokens(tokens, row)
        position += batch.num_rows


def _tokens(batch: pa.RecordBatch, row: int) -> dict[str, Any]:
    return {name: _numbers(batch[name][row]) for name in ("token_ids", "logprobs", "token_bytes")}


def _numbers(cell: pa.LargeListScalar[Any]) -> npt.NDArray[Any] | None:
    return None if cell.values is None else cell.values.to_numpy(zero_copy_only=False)
