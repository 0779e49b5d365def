"""Score each rollout with the student: p per sentence by both models (paper section 4).

Reads rollouts and the student before training; writes one row per rollout: sentence ends, p_T and
p_S. p of a sentence is exp(mean log-probability of the tokens that begin in it), each model on its
own tokens of the same text. The end token belongs to no sentence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_lite.chat import Chat, model_folder
from dasd_lite.config import ScoreConfig, Student, semantic
from dasd_lite.console import progress
from dasd_lite.dataset import batches, identify, is_finished, num_rows, read_manifest
from dasd_lite.divergence import sentence_spans, sentence_stats
from dasd_lite.errors import DataError
from dasd_lite.journal import Journal
from dasd_lite.records import SCORE
from dasd_lite.text import sentence_ends

VERSION = 2  # 1 rounded the mean to float32 before its exp
_COLUMNS = ("uid", "messages", "completion", "logprobs", "token_bytes")


def run(rollouts: Path, student: Student, config: ScoreConfig, out: Path, *, force: bool = False) -> dict[str, Any]:
    """Score the rollouts of one folder into `out`; returns its manifest."""
    folder = model_folder(student.model, weights=True)
    options = {**semantic(config), "dtype": student.dtype}
    identity = identify("score", VERSION, options, {"rollouts": rollouts, "student": folder})
    if is_finished(out, identity, force=force):
        return read_manifest(out)

    total = num_rows(rollouts, "rollouts")
    with Journal(out, identity, SCORE, total, table="scores", config=config) as journal:
        done = journal.done()
        timing: dict[str, float] = {}
        if len(done) < total:
            tokens = 0
            from dasd_lite.self_check import check_packing
            from dasd_lite.student import load_model

            chat = Chat(folder)
            model = load_model(folder, dtype=student.dtype, trust_remote_code=student.trust_remote_code)
            pending = _tokenized(rollouts, chat, done)
            start = time.perf_counter()
            with progress(f"{out.parent.name}: score", total, "rollouts", len(done)) as bar:

                def rows() -> Iterator[tuple[int, dict[str, Any]]]:
                    nonlocal tokens
                    for number, group in enumerate(_groups(pending, config.batch_tokens)):
                        if number == 0:
                            check_packing(model, [item["ids"] for item in group])
                        yield from _score(model, chat, group, config.chunk_tokens)
                        tokens += sum(len(item["ids"]) for item in group)
                        bar.advance(len(group))

                journal.commit_each(rows())
            timing = {"scored_tokens": tokens, "tokens_per_second": tokens / (time.perf_counter() - start)}
        return journal.publish({"rollouts": total}, **timing)


def _tokenized(rollouts: Path, chat: Chat, done: set[int]) -> Iterator[dict[str, Any]]:
    """Yield the rollouts that are not scored yet, with the student's ids."""
    position = 0
    for batch in batches(rollouts, "rollouts", _COLUMNS):
        for row in range(batch.num_rows):
            if position + row in done:
                continue
            item = {name: batch[name][row].as_py() for name in ("uid", "messages", "completion")}
            for name in ("logprobs", "token_bytes"):
                values = batch[name][row].values
                item[name] = None if values is None else values.to_numpy(zero_copy_only=False)
            if item["logprobs"] is None:
                raise DataError(
                    f"{rollouts}: rollout {item['uid']} has no teacher log-probabilities, so it cannot be scored;"
                    " sample it from a teacher that returns them, or use select.rule = 'random' or 'all'"
                )
            ids, num_context = chat.example(item["messages"], item["completion"])
            where = f"{rollouts}: rollout {item['uid']}"
            yield {**item, "where": where, "position": position + row, "ids": ids, "num_context": num_context}
        position += batch.num_rows


def _groups(items: Iterator[dict[str, Any]], batch_tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Gather rollouts of together at most `batch_tokens` student tokens; a longer one goes alone."""
    group: list[dict[str, Any]] = []
    size = 0
    for item in items:
        if group and size + len(item["ids"]) > batch_tokens:
            yield group
            group, size = [], 0
        group.append(item)
        size += len(item["ids"])
    if group:
        yield group


def _score(
    model: Any, chat: Chat, group: list[dict[str, Any]], chunk_tokens: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    from dasd_lite.student import target_logprobs

    ids = np.concatenate([item["ids"] for item in group])
    lengths = np.array([len(item["ids"]) for item in group])
    logprobs = target_logprobs(model, ids, lengths, chunk_tokens=chunk_tokens)
    for item, scored in zip(group, np.split(logprobs, np.cumsum(lengths)[:-1]), strict=True):
        answer = slice(item["num_context"], -1)  # without the end token
        ends = sentence_ends(item["completion"])
        try:
            teacher = _without_end(item["logprobs"], item["token_bytes"])
            student = scored[answer], chat.token_bytes(item["ids"][answer], item["completion"])
            spans = [_spans(item["completion"], token_bytes, ends) for _, token_bytes in (teacher, student)]
            stats = sentence_stats(teacher[0], spans[0], student[0], spans[1], np.array([0, len(ends)], np.int64), 0.0)
        except DataError as error:
            raise DataError(f"{item['where']}: {error}") from error
        yield (
            item["position"],
            {
                "uid": item["uid"],
                "sentence_ends": ends,
                "p_teacher": stats.p_teacher,
                "p_student": stats.p_student,
                "teacher_mean_logprob": _mean(teacher[0]),
                "student_mean_logprob": _mean(student[0]),
                "num_teacher_tokens": len(teacher[0]),
                "ids": item["ids"],
                "num_context_tokens": item["num_context"],
            },
        )


def _without_end(
    logprobs: npt.NDArray[np.float32], token_bytes: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Leave out the tokens behind the text: the end token has no bytes of it."""
    length = int(np.flatnonzero(token_bytes)[-1]) + 1 if token_bytes.any() else 0
    return logprobs[:length], token_bytes[:length]


def _spans(text: str, token_bytes: npt.NDArray[np.int32], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return which tokens begin in which sentence.

    A `<think>` that the template wrote stands before all tokens: no token begins in it.
    """
    raw = text.encode()
    opened = len(raw) - int(token_bytes.sum())
    if opened < 0 or raw[:opened].strip() not in (b"", b"<think>"):
        raise DataError(f"its tokens are {token_bytes.sum()} bytes of a text of {len(raw)}; they should spell it")
    edges = (np.array([0, len(rows)], dtype=np.int64) for rows in (token_bytes, ends))
    return sentence_spans(token_bytes, next(edges), ends, next(edges), np.array([opened], dtype=np.int64))


def _mean(logprobs: npt.NDArray[np.float32]) -> float:
    return float(np.mean(logprobs, dtype=np.float64)) if len(logprobs) else float("nan")
