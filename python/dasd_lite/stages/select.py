"""Select what is trained on: filters first, then the rank among a question's candidates (paper sections 4, 6.3).

Reads rollouts, their scores where the rule needs them, and the student's tokenizer; writes the kept
rollouts with the ids that the student will read, and in the same folder the rejected ones, each
with its reason and the number behind it. Two passes over the data, a few numbers per rollout in
memory: the first measures, the second writes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dasd_lite import divergence
from dasd_lite.chat import Chat, Ids, model_folder
from dasd_lite.config import SCORED_RULES, SelectConfig, semantic
from dasd_lite.console import err, progress
from dasd_lite.dataset import batches, fingerprint, identify, is_finished, num_rows, read_manifest
from dasd_lite.errors import DataError
from dasd_lite.journal import ShardWriter
from dasd_lite.records import KEPT, REJECTED, derive_seed
from dasd_lite.text import repeated_ngrams, text_repetition

VERSION = 1
_NGRAM = 20
_REMEDIES = {  # the option behind a reason, told when nothing is left
    "truncated": " (raise max_tokens of sample or mix)",
    "structure": " (no <think>…</think> and answer; for data without: select.require_think = false)",
    "too long": " (raise select.max_tokens or pack.seq_len, up to the student's context)",
    "repeated lines": " (select.max_duplicate_lines)",
    "repeated sentences": " (select.max_duplicate_sentences)",
    "repeated n-grams": " (select.max_repeated_ngrams)",
}
_CALLS = re.compile(r"<tool_call>|<\|call\|>|<\|tool▁calls▁begin\|>|<function=")
_ROLLOUT_COLUMNS = KEPT.names[: KEPT.names.index("ids")]


@dataclass
class _Candidates:
    """A few numbers per rollout, in the order of the data."""

    prompt: list[int] = field(default_factory=list)
    domain: list[str] = field(default_factory=list)
    reason: list[str] = field(default_factory=list)  # "" passes the filters
    value: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)  # of the answer, in the student's tokens
    num_sentences: list[int] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)  # shared, teacher, student


def run(
    rollouts: Path,
    student: str,
    config: SelectConfig,
    out: Path,
    *,
    max_tokens: int,
    seed: int,
    scores: Path | None = None,
    mask_prefix: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Select among the rollouts of one folder into `out`; returns its manifest.

    `student` names the model whose tokenizer and template count; `max_tokens` is the longest question
    plus answer that fits a row. Raises DataError when nothing passes.
    """
    chat = Chat(model_folder(student))
    limit = min(config.max_tokens or max_tokens, chat.context)
    options = {**semantic(config), "max_tokens": limit, "seed": seed, "mask_prefix": mask_prefix}
    inputs: dict[str, Path | str] = {"rollouts": rollouts, "tokenizer": chat.fingerprint}
    if config.rule in SCORED_RULES and scores is None:
        raise DataError(f"select.rule = {config.rule!r} needs scores; run score first, or use 'random' or 'all'")
    identity = identify("select", VERSION, options, inputs | ({"scores": scores} if scores else {}))
    if scores is not None:
        scored = read_manifest(scores)["inputs"].get("rollouts")  # scores that others wrote do not say
        if scored not in (None, fingerprint(rollouts)):
            raise DataError(f"{scores}: made of other rollouts than {rollouts}; score them again")
    if is_finished(out, identity, force=force):
        return read_manifest(out)

    total = num_rows(rollouts, "rollouts")
    candidates = _Candidates()
    with progress(f"{out.parent.name}: select", 2 * total, "rollouts") as bar:
        for batch, examples in _read(rollouts, scores, chat, mask_prefix, bar):
            _measure(candidates, batch, examples, config, limit, chat.stop_ids)
        _name_unknown_domains(candidates, config)
        score = _rank(candidates, config, seed)
        reasons = Counter(reason for reason in candidates.reason if reason)
        if len(candidates.reason) == sum(reasons.values()):
            found = ", ".join(f"{reason} {count}{_REMEDIES.get(reason, '')}" for reason, count in reasons.most_common())
            raise DataError(f"{rollouts}: every one of {total} candidates is rejected: {found}")
        with ShardWriter(out, identity, {"kept": KEPT, "rejected": REJECTED}, config) as writer:
            first = 0
            for batch, examples in _read(rollouts, scores, chat, mask_prefix, bar):
                _write(writer, batch, examples, candidates, score, first)
                first += batch.num_rows
            return writer.publish(_counts(candidates, reasons))


@dataclass(frozen=True)
class _Example:
    """One rollout as the student reads it."""

    ids: Ids
    num_context: int
    num_sentences: int = 0
    p_teacher: npt.NDArray[np.float32] | None = None
    p_student: npt.NDArray[np.float32] | None = None


def _read(
    rollouts: Path, scores: Path | None, chat: Chat, mask_prefix: bool, bar: Any
) -> Iterator[tuple[pa.RecordBatch, list[_Example]]]:
    """Yield batches of rollouts with their examples: from the scores, or tokenized here."""
    scored = batches(scores, "scores") if scores else repeat(None)
    for batch, score in zip(batches(rollouts, "rollouts", _ROLLOUT_COLUMNS), scored, strict=False):
        if score is None:
            examples = [
                _tokenize(chat, row["messages"], row["completion"], row["prefix_bytes"] if mask_prefix else 0)
                for row in batch.select(["messages", "completion", "prefix_bytes"]).to_pylist()
            ]
        else:
            if not score["uid"].equals(batch["uid"]):
                raise DataError(f"{scores}: its rows are not those of {rollouts}; score them again")
            examples = [_from_score(score, row) for row in range(score.num_rows)]
        yield batch, examples
        bar.advance(batch.num_rows)


def _tokenize(chat: Chat, messages: list[dict[str, str]], completion: str, masked_bytes: int) -> _Example:
    ids, num_context = chat.example(messages, completion)
    if masked_bytes:
        lengths = chat.token_bytes(ids[num_context:-1], completion)
        opened = len(completion.encode()) - int(lengths.sum())
        num_context += int(np.argmax(opened + np.cumsum(lengths) >= masked_bytes)) + 1
    return _Example(ids, num_context)


def _from_score(score: pa.RecordBatch, row: int) -> _Example:
    p_teacher, p_student = (score[name][row].values.to_numpy() for name in ("p_teacher", "p_student"))
    ids = score["ids"][row].values.to_numpy()
    return _Example(ids, score["num_context_tokens"][row].as_py(), len(p_teacher), p_teacher, p_student)


def _measure(
    candidates: _Candidates,
    batch: pa.RecordBatch,
    examples: list[_Example],
    config: SelectConfig,
    limit: int,
    stop_ids: tuple[int, ...],
) -> None:
    """Note each rollout's numbers, and the first filter that it fails."""
    answers = [e.ids[e.num_context :] for e in examples]
    offsets = np.cumsum([0, *map(len, answers)], dtype=np.int64)
    repeats, _ = repeated_ngrams(np.concatenate(answers), offsets, _NGRAM)
    completions = batch["completion"]
    duplicate_lines, duplicate_sentences = text_repetition(completions)
    for row, example in enumerate(examples):
        text, num_ids = completions[row].as_py(), len(example.ids)
        finish = batch["finish_reason"][row].as_py()
        share = float(repeats[row]) / max(len(answers[row]) - _NGRAM + 1, 1)
        checks = (  # in this order; the first that holds is the reason
            ("truncated", finish == "length", num_ids),
            ("unfinished", finish not in ("length", "stop", "unknown"), num_ids),
            ("structure", config.require_think and not has_structure(text), text.count("</think>")),
            ("end token inside", bool(early := np.isin(example.ids[example.num_context : -1], stop_ids).sum()), early),
            ("function call", bool(_CALLS.search(text)), len(_CALLS.findall(text))),
            ("too long", num_ids > limit, num_ids),
            ("repeated lines", duplicate_lines[row] > config.max_duplicate_lines, duplicate_lines[row]),
            ("repeated sentences", duplicate_sentences[row] > config.max_duplicate_sentences, duplicate_sentences[row]),
            ("repeated n-grams", share > config.max_repeated_ngrams, share),
        )
        reason, value = next(((name, float(number)) for name, failed, number in checks if failed), ("", 0.0))
        candidates.reason.append(reason)
        candidates.value.append(value)
        candidates.num_tokens.append(num_ids - example.num_context)
        candidates.num_sentences.append(example.num_sentences)
        candidates.counts.append(_count_classes(example, config.beta))
    uids = batch["prompt_uid"].to_pylist()
    candidates.domain += batch["domain"].to_pylist()
    candidates.prompt += uids


def _name_unknown_domains(candidates: _Candidates, config: SelectConfig) -> None:
    found = sorted(set(candidates.domain))
    for domain in config.budget.keys() - set(found):
        err().print(f"note: select.budget: no rollout is of domain {domain!r}; there are {', '.join(found)}")


def has_structure(text: str) -> bool:
    """Tell whether an answer has one thinking part with text in it, and a final answer behind it."""
    parts = text.split("</think>")
    return (
        len(parts) == 2
        and bool(re.fullmatch(r"\s*<think>(?!.*<think>).*\S.*", parts[0], re.DOTALL))
        and bool(parts[1].strip())
    )


def _count_classes(example: _Example, beta: float) -> list[int]:
    if example.p_teacher is None or example.p_student is None:
        return []
    classes = divergence.classify_sentences(example.p_teacher, example.p_student, beta)
    return [int((classes == kind).sum()) for kind in range(3)]


def _rank(candidates: _Candidates, config: SelectConfig, seed: int) -> npt.NDArray[np.float32] | None:
    """Mark what rank or budget reject, among those that pass the filters; return the score by which."""
    passed = np.flatnonzero([not reason for reason in candidates.reason])
    score: npt.NDArray[np.float32] | None = None
    prompts = np.unique(np.asarray(candidates.prompt)[passed], return_inverse=True)[1]
    if config.rule != "all":
        score = np.full(len(candidates.reason), np.nan, dtype=np.float32)
        score[passed] = divergence.score_candidates(
            config.rule,
            teacher_counts=np.array([c[divergence.SentenceClass.TEACHER] if c else 0 for c in candidates.counts])[
                passed
            ],
            num_sentences=np.array(candidates.num_sentences)[passed],
            num_tokens=np.array(candidates.num_tokens)[passed],
            prompt_index=prompts,
            seed=derive_seed(seed, "random"),
        )
        keep = divergence.rank_within_prompts(score[passed], prompts, config.keep)
        for i in passed[~keep]:
            candidates.reason[i], candidates.value[i] = "rank", float(score[i])
    for domain, budget in config.budget.items():
        rest = [i for i in passed if not candidates.reason[i] and candidates.domain[i] == domain]
        order = np.random.Generator(np.random.Philox(derive_seed(seed, "budget", domain))).permutation(len(rest))
        for j in order[budget:]:  # which questions go is drawn: by score it would be the short ones
            candidates.reason[rest[j]], candidates.value[rest[j]] = "budget", float(budget)
    return score


def _write(
    writer: ShardWriter,
    batch: pa.RecordBatch,
    examples: list[_Example],
    candidates: _Candidates,
    score: npt.NDArray[np.float32] | None,
    first: int,
) -> None:
    span = slice(first, first + batch.num_rows)
    reason = candidates.reason[span]
    counts = [counts or None for counts in candidates.counts[span]]
    columns = {
        **{name: batch[name] for name in _ROLLOUT_COLUMNS},
        "ids": pa.array([e.ids for e in examples], KEPT.field("ids").type),
        "num_context_tokens": pa.array([e.num_context for e in examples], pa.int64()),
        "score": pa.array(score[span], pa.float32(), from_pandas=True)
        if score is not None
        else pa.nulls(batch.num_rows),
        "num_sentences": pa.array([e.num_sentences for e in examples], pa.int64()),
        "class_counts": pa.array(counts, KEPT.field("class_counts").type),
        "reason": pa.array(reason),
        "value": pa.array(candidates.value[span]),
    }
    table = pa.table(columns).cast(REJECTED)
    kept = pa.array([not r for r in reason])
    writer.write("kept", table.filter(kept).select(KEPT.names))
    writer.write("rejected", table.filter(pa.array([bool(r) for r in reason])))


def _counts(candidates: _Candidates, reasons: Counter[str]) -> dict[str, Any]:
    """Return what goes to the manifest: how many, why not, and how long the chosen are beside the rest."""
    kept = np.array([not reason for reason in candidates.reason])
    lengths = np.array(candidates.num_tokens)
    ranked = np.array([reason in ("", "rank") for reason in candidates.reason])
    return {
        "rollouts": len(kept),
        "kept": int(kept.sum()),
        "prompts_kept": len({p for p, k in zip(candidates.prompt, kept, strict=True) if k}),
        "rejected": dict(reasons.most_common()),
        "mean_tokens_kept": float(lengths[kept].mean()),
        "mean_tokens_candidates": float(lengths[ranked].mean()),
    }
