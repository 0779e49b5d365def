"""Select what is trained on: filters first, then the rank among a prompt's candidates (paper sections 4, 6.3).

Input: rollouts, their scores if the rule needs them, and the student's tokenizer. Output: the kept rollouts as token
ids of the student, with their weights if weighting is on; in the same folder the rejected ones, each with its reason
and the value behind it. Two passes over the data, with a few numbers per rollout in memory: the first measures, the
second writes.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.typing import ArrayLike

from dasd_lite.chat.chat import Chat
from dasd_lite.config.extensions import check_callable, code_hash, is_extension, load_extension, name_of, running
from dasd_lite.config.models import Student, result_options, student_table
from dasd_lite.config.options import with_options
from dasd_lite.config.stages import CLASS_RULES, NEED_NO_LOGPROBS, NGRAM, SelectConfig
from dasd_lite.console import label, note, progress
from dasd_lite.data.dataset import batches, num_rows, read_table
from dasd_lite.data.handles import Kept, Rollouts, Scores
from dasd_lite.data.hub import model_folder
from dasd_lite.data.manifest import fingerprint, identify, read_manifest, read_timing
from dasd_lite.data.records import KEPT, REJECTED, TOKENS
from dasd_lite.data.seeds import check_seed, derive_seed
from dasd_lite.data.writer import ShardWriter, is_finished
from dasd_lite.errors import DataError
from dasd_lite.grading import open_grader
from dasd_lite.grading.grade import Grader
from dasd_lite.grading.rollouts import WRONG, Verdicts, grade_rollouts
from dasd_lite.method import choice, divergence, filters, selection, weights
from dasd_lite.method.ragged import Ragged, from_arrow, join, offsets_of
from dasd_lite.method.selection import Candidates, SelectionRule
from dasd_lite.method.sentences import repeated_ngrams, text_repetition

VERSION = 6  # 2 had no weights; 3 other sentence ends; 4 no limit on loops; 5 no grades
_REMEDIES = {  # what to do about a reason when nothing is left
    "truncated": " (raise max_tokens of sample or mix)",
    "no thinking": " (no <think>…</think>; for data without thinking, set select.require_think = false)",
    "no answer": " (nothing after </think>)",
    "structure": " (needs one <think> at the start and one </think>; select.require_think = false lets all pass)",
    "function call": " (ask questions that need no tools)",
    "malformed channels": " (gpt-oss at a high temperature; lower it)",
    "too long": " (raise select.max_tokens or pack.seq_len, up to the student's context)",
    "repeated lines": " (select.max_duplicate_lines)",
    "repeated sentences": " (select.max_duplicate_sentences)",
    "repeated n-grams": " (select.max_repeated_ngrams)",
    "repeated span": " (select.max_repeated_span)",
    "wrong answer": " (select.require_right)",
    "no reference answer": " (select.require_right = 'where_known' lets them pass)",
    "cannot be compared": " (select.require_right = 'where_known' lets them pass)",
}
_REPEATS = ("repeated lines", "repeated sentences", "repeated n-grams", "repeated span")
_ROLLOUT_COLUMNS = KEPT.names[: KEPT.names.index("ids")]
_SCORE_COLUMNS = ("uid", "ids", "num_context_tokens")
_BY_STUDENT = ("student_mean_logprob", "rank_sum", "surprisal_sum")


@dataclass
class _Measured:
    """A few numbers per rollout, in the order of the data; arrays, as there may be millions."""

    reason: list[str] = field(default_factory=list)  # "" passes the filters
    value: array[float] = field(default_factory=lambda: array("d"))
    prompt: array[int] = field(default_factory=lambda: array("q"))  # numbered from 0
    domain: array[int] = field(default_factory=lambda: array("q"))  # a place in `domains`
    num_tokens: array[int] = field(default_factory=lambda: array("q"))  # of the answer, in the student's tokens
    num_sentences: array[int] = field(default_factory=lambda: array("q"))
    counts: array[int] = field(default_factory=lambda: array("q"))
    """Shared, teacher and student sentences of each rollout, one after another; empty without scores."""
    by_teacher: array[int] = field(default_factory=lambda: array("q"))
    """Whether the teacher has scored it; empty without scores."""
    unsure: tuple[array[int], array[int]] = field(default_factory=lambda: (array("q"), array("q")))
    """Teacher sentences that would be none, and others that would be one, if the noise turned against them."""
    repeats: array[int] = field(default_factory=lambda: array("b"))
    """Whether it repeats itself, whatever else it was rejected for."""
    mean_logprob: array[float] = field(default_factory=lambda: array("d"))
    """By the teacher, NaN if unknown; empty if not needed."""
    by_student: dict[str, array[float]] = field(default_factory=dict)  # columns of the scores, NaN if unknown
    prompts: dict[str, int] = field(default_factory=dict)
    domains: dict[str, int] = field(default_factory=dict)

    def passed(self) -> npt.NDArray[np.int64]:
        """Return those that have no reason to be rejected so far."""
        return np.flatnonzero([not reason for reason in self.reason])


def _numbered(names: dict[str, int], values: Sequence[str]) -> list[int]:
    """Return the number of each name, which is the next one if it is new."""
    return [names.setdefault(value, len(names)) for value in values]


@dataclass(frozen=True)
class _Noise:
    """How far scores of the same answers are apart between engines, as `score` measured it; None if it did not."""

    sentence: float | None
    """In the p of a sentence."""
    token: float | None
    """In the student's mean log-probability of an answer."""

    @staticmethod
    def of(scores: Path | None) -> _Noise:
        """Read what a folder of scores says."""
        timing = {} if scores is None else read_timing(scores)
        # A mean of log-probabilities that moves by x moves p by at most x.
        sentence = [timing[name] for name in ("engine_noise_sentence", "sampling_noise_mean") if name in timing]
        return _Noise(max(sentence, default=None), timing.get("engine_noise_mean"))


def select(
    rollouts: Rollouts | str | PathLike[str],
    student: Student | str | PathLike[str],
    config: SelectConfig | None = None,
    *,
    out: str | PathLike[str],
    scores: Scores | str | PathLike[str] | None = None,
    seq_len: int | None = None,
    mask_prefix: bool = False,
    seed: int = 0,
    phase: str = "",
    rule: str | SelectionRule | None = None,
    grader: str | Grader = "auto",
    force: bool = False,
    **options: Any,
) -> Kept:
    """Filter the rollouts, and keep the best-ranked of each prompt.

    Args:
        rollouts: What sample, ingest or mix wrote.
        student: The model whose tokenizer and chat template the rows will have: its table, name or folder.
        config: Options of the stage.
        out: Folder to write.
        scores: What score wrote; rules that compare teacher and student need them.
        seq_len: Tokens of the rows that will be packed: longer answers are rejected. None: the student's context.
        mask_prefix: Do not train on the part of a mixed answer that the student wrote.
        seed: Seed of the rule "random" and of the budget's draws.
        phase: Name of the phase: with the same seed, "random" draws other candidates in another one.
        rule: A selection rule by its name, or one of your own; None: the one that `config.rule` names.
        grader: Grades the answers to questions with a reference answer: its name, or one of your own.
        force: Replace a folder that was made with other options.
        **options: Fields of SelectConfig, in place of those of `config`.

    Returns:
        The rollouts kept; `.rejected` has the others with their reasons.

    Raises:
        ConfigError: A wrong option.
        DataError: Nothing passes; scores of other rollouts; a kept answer that `config.weighting` cannot weigh.
        CheckpointError: `out` was made with other options.

    Source: arXiv 2601.09088, sections 4 and 6.3.
    """
    options |= {"rule": rule} if isinstance(rule, str) else {}
    check_seed(seed)
    config = with_options(SelectConfig, config, options, "select")
    grade = open_grader(grader)
    chosen = open_rule(config.rule if rule is None or isinstance(rule, str) else rule)
    if rule is not None and not isinstance(rule, str):
        config = config.model_copy(update={"rule": name_of(rule)})
    chat = Chat(model_folder(student_table(student).model))
    rollouts, out = Rollouts.of(rollouts).folder, Path(out)
    scores = None if scores is None else Scores.of(scores).folder
    limit = min(config.max_tokens or seq_len or chat.context, chat.context)
    asked = {**result_options(config), "max_tokens": limit, "seed": seed, "mask_prefix": mask_prefix}
    inputs: dict[str, Path | str] = {"rollouts": rollouts, "tokenizer": chat.fingerprint, "grader": grade.code}
    inputs |= {"rule": code_hash(chosen)} if callable(chosen) else {}
    asked |= {"phase": phase} if chosen == "random" or callable(chosen) else {}
    if config.needs_scores and scores is None:
        raise DataError(
            f"select.rule = {config.rule!r} needs scores; run score first, or use 'longest', 'shortest', 'random' or"
            " 'all'"
        )
    if config.uses_weights and config.rule != "all" and config.keep == 1:
        raise DataError("select.weighting weighs a prompt's kept answers, but select.keep = 1 keeps one; raise it")
    inputs |= {"scores": scores} if scores else {}
    identity = identify("select", VERSION, asked, inputs, names={"grader": grade.name}, grows=["inputs.grader"])
    if scores is not None:
        scored = read_manifest(scores)["inputs"].get("rollouts")  # unknown in scores that others wrote
        if scored not in (None, fingerprint(rollouts)):
            raise DataError(f"{scores}: made from other rollouts than {rollouts}; score them again")
    if is_finished(out, identity, force=force):
        return Kept(out)

    total = num_rows(rollouts, "rollouts")
    candidates, noise = _Measured(), _Noise.of(scores)
    read = partial(_read, rollouts, scores, chat)
    with progress(label(out.parent.name, "select"), 2 * total, "rollouts") as bar:
        for batch in read(_measured_columns(scores, config), bar):
            _measure(candidates, batch, config, limit, chat.answer_end_ids, noise.sentence or 0.0)
        _name_unknown_domains(candidates, config)
        programs = config.require_right != "no"
        verdicts = grade_rollouts(rollouts, grade, programs=programs, label=label(out.parent.name, "select: grading"))
        _require_right(candidates, verdicts, config.require_right)
        score, about_rule = _rank(candidates, chosen, config, derive_seed(seed, "random", phase), scores, noise)
        _spend_budgets(candidates, config, seed)
        reasons = Counter(reason for reason in candidates.reason if reason)
        if len(candidates.reason) == sum(reasons.values()):
            why = ", ".join(f"{reason} {count}{_REMEDIES.get(reason, '')}" for reason, count in reasons.most_common())
            raise DataError(f"{rollouts}: all {total} candidates are rejected: {why}")
        weight, weight_counts = _weigh(candidates, config, rollouts)
        with ShardWriter(out, identity, {"kept": KEPT, "rejected": REJECTED}, config) as writer:
            first = 0
            for batch in read((), bar):
                _write(writer, batch, candidates, verdicts, score, weight, first, mask_prefix)
                first += batch.rollouts.num_rows
            counts = _counts(candidates, reasons) | {"grades": verdicts.counts()}
            counts |= {"mixed": True} if read_manifest(rollouts)["stage"] == "mix" else {}
            writer.publish(counts | about_rule | weight_counts)
    return Kept(out)


def open_rule(rule: str | SelectionRule) -> str | SelectionRule:
    """Return the name of a built-in selection rule, or the user's own that a recipe names or that is handed over.

    Raises:
        ConfigError: The code cannot be imported, or cannot be called with the candidates.
    """
    if isinstance(rule, str):
        if not is_extension(rule):
            return rule
        own: SelectionRule = load_extension(rule, kind="selection rule", key="select.rule")
    else:
        own = rule
    check_callable(own, ("candidates",), kind="selection rule", key="select.rule")
    return own


def _reported(rule: SelectionRule, name: str) -> SelectionRule:
    """Return the user's rule, whose exceptions name the place in its code."""

    def reported(candidates: Candidates, /) -> ArrayLike:
        with running(rule, f"selection rule {name}"):
            return rule(candidates)

    return reported


@dataclass(frozen=True)
class _Batch:
    """Some rollouts as the student reads them, and their scores if there are any."""

    rollouts: pa.RecordBatch
    ids: pa.LargeListArray[Any]
    num_prompt: npt.NDArray[np.int64]
    num_before: npt.NDArray[np.int64]
    """Tokens before the teacher's part: the prompt, and the student's part of a mixed answer."""
    scores: pa.RecordBatch | None

    def ids_after(self, num_tokens: npt.NDArray[np.int64]) -> Ragged:
        """Return the ids of each rollout after so many, with the end token."""
        ids, edges = from_arrow(self.ids)
        return join([ids[s:e] for s, e in zip(edges[:-1] + num_tokens, edges[1:], strict=True)])

    def teacher_texts(self) -> Any:
        """Return the text of each answer after the bytes that the student wrote."""
        texts = self.rollouts["completion"]
        pairs = zip(texts.to_pylist(), self.rollouts["prefix_bytes"].to_pylist(), strict=True)
        return pa.array([text.encode()[length:].decode() for text, length in pairs], texts.type)


def _measured_columns(scores: Path | None, config: SelectConfig) -> tuple[str, ...]:
    """Return the columns that only the first pass reads: of the scores if there are any, else of the rollouts."""
    if scores is None:
        return ("logprobs", "token_bytes") if config.uses_weights else ()
    return ("p_teacher", "p_student", "teacher_mean_logprob", *_BY_STUDENT)


def _read(rollouts: Path, scores: Path | None, chat: Chat, columns: tuple[str, ...], bar: Any) -> Iterator[_Batch]:
    """Yield the rollouts with their ids (from the scores, or tokenized here) and more columns from the same place."""
    scored = batches(scores, "scores", (*_SCORE_COLUMNS, *columns)) if scores else repeat(None)
    wanted = _ROLLOUT_COLUMNS if scores else [*_ROLLOUT_COLUMNS, *columns]
    for batch, score in zip(batches(rollouts, "rollouts", wanted), scored, strict=False):
        if score is None:
            texts = batch.select(_ROLLOUT_COLUMNS).to_pylist()  # columns of numbers stay arrays
            examples, prompts = zip(*(chat.example(row["messages"], row["completion"]) for row in texts), strict=True)
            ids, num_prompt = pa.array(examples, TOKENS), np.array(prompts, np.int64)
        elif score["uid"].equals(batch["uid"]):
            ids, num_prompt = score["ids"], score["num_context_tokens"].to_numpy()
        else:
            raise DataError(f"{scores}: its rows do not match {rollouts}; score them again")
        yield _Batch(batch, ids, num_prompt, _num_before(batch, ids, num_prompt, chat), score)
        bar.advance(batch.num_rows)


def _num_before(
    rollouts: pa.RecordBatch, ids: pa.LargeListArray[Any], num_prompt: npt.NDArray[np.int64], chat: Chat
) -> npt.NDArray[np.int64]:
    """Return how many tokens come before the teacher's part of each rollout; one that both wrote is among them."""
    num_before, prefix_bytes, (values, edges) = num_prompt.copy(), rollouts["prefix_bytes"].to_numpy(), from_arrow(ids)
    for row in np.flatnonzero(prefix_bytes).tolist():
        completion = rollouts["completion"][row].as_py()
        lengths = chat.token_bytes(values[edges[row] + num_prompt[row] : edges[row + 1] - 1], completion)
        opened = len(completion.encode()) - int(lengths.sum())
        num_before[row] += int(np.argmax(opened + np.cumsum(lengths) >= prefix_bytes[row])) + 1
    return num_before


def _measure(
    candidates: _Measured, batch: _Batch, config: SelectConfig, limit: int, stop_ids: tuple[int, ...], noise: float
) -> None:
    """Add each rollout's numbers, and the first filter that it fails."""
    rollouts, texts, answers = batch.rollouts, batch.rollouts["completion"], batch.ids_after(batch.num_prompt)
    num_ids, num_answer = batch.ids.value_lengths().to_numpy(), np.diff(answers.offsets)
    whole = config.filter_prefix or not rollouts["prefix_bytes"].to_numpy().any()
    own = answers if whole else batch.ids_after(batch.num_before)
    repeats, spans = repeated_ngrams(own.values, own.offsets, NGRAM)
    shares = repeats / np.maximum(np.diff(own.offsets) - NGRAM + 1, 1)
    duplicate_lines, duplicate_sentences = text_repetition(texts if whole else batch.teacher_texts())
    stops = offsets_of(np.isin(answers.values, stop_ids))  # stop tokens before each place
    early = stops[np.maximum(answers.offsets[1:] - 1, 0)] - stops[answers.offsets[:-1]]
    failed = [
        *filters.endings(rollouts["finish_reason"], num_ids),
        *(filters.structure(texts) if config.require_think else ()),
        filters.over("end token inside", early, 0),
        filters.function_calls(texts),
        filters.over("too long", num_ids, limit),
        filters.over("repeated lines", duplicate_lines, config.max_duplicate_lines),
        filters.over("repeated sentences", duplicate_sentences, config.max_duplicate_sentences),
        filters.over("repeated n-grams", shares, config.max_repeated_ngrams),
        filters.over("repeated span", spans, config.max_repeated_span),
    ]
    reasons, values = filters.first_failed(failed, rollouts.num_rows)
    candidates.reason += reasons
    candidates.repeats.extend(np.any([each.fails for each in failed if each.name in _REPEATS], axis=0).astype(int))
    candidates.value.extend(values)
    candidates.num_tokens.extend(num_answer.tolist())
    _count_classes(candidates, batch, config.beta, noise)
    if config.uses_weights or batch.scores is not None:
        candidates.mean_logprob.extend(_mean_logprobs(batch).tolist())
    if batch.scores is not None:
        for name in _BY_STUDENT:
            column = batch.scores[name].to_numpy(zero_copy_only=False).astype(np.float64)
            candidates.by_student.setdefault(name, array("d")).extend(column.tolist())
    candidates.domain.extend(_numbered(candidates.domains, rollouts["domain"].to_pylist()))
    candidates.prompt.extend(_numbered(candidates.prompts, rollouts["prompt_uid"].to_pylist()))


def _count_classes(candidates: _Measured, batch: _Batch, beta: float, noise: float) -> None:
    """Add the number of sentences of each rollout, and of each class; zeros and nothing without scores."""
    if batch.scores is None:
        candidates.num_sentences.extend([0] * batch.rollouts.num_rows)
        return
    teacher, student = from_arrow(batch.scores["p_teacher"]), from_arrow(batch.scores["p_student"])
    classes = divergence.classify_sentences(teacher.values, student.values, beta)
    num_sentences = np.diff(teacher.offsets)
    candidates.num_sentences.extend(num_sentences.tolist())
    candidates.counts.extend(divergence.class_counts(classes, teacher.offsets).ravel().tolist())
    known = offsets_of(np.isfinite(teacher.values))[teacher.offsets]
    candidates.by_teacher.extend(((num_sentences == 0) | (np.diff(known) > 0)).astype(int).tolist())
    if noise:
        beyond = teacher.values.astype(np.float64) - student.values - beta
        for numbers, near in zip(
            candidates.unsure, ((beyond > 0) & (beyond <= noise), (beyond <= 0) & (beyond > -noise)), strict=True
        ):
            numbers.extend(np.diff(offsets_of(near)[teacher.offsets]).tolist())


def _mean_logprobs(batch: _Batch) -> npt.NDArray[np.float64]:
    """Return the teacher's mean log-probability of each rollout, NaN if unknown; of a mixed one over its own part."""
    if batch.scores is not None:
        return np.asarray(batch.scores["teacher_mean_logprob"].to_numpy(zero_copy_only=False), np.float64)
    logprobs, token_bytes = from_arrow(batch.rollouts["logprobs"]), from_arrow(batch.rollouts["token_bytes"])
    lengths, spelled = np.diff(logprobs.offsets), np.diff(token_bytes.offsets)
    if len(wrong := np.flatnonzero(lengths != spelled)):
        first = int(wrong[0])
        raise DataError(
            f"rollout {batch.rollouts['uid'][first]} has {lengths[first]} logprobs and {spelled[first]} token_bytes;"
            " every token needs one of each"
        )
    return divergence.mean_logprob(logprobs.values, token_bytes.values, logprobs.offsets)


def _name_unknown_domains(candidates: _Measured, config: SelectConfig) -> None:
    known = sorted(candidates.domains)
    for domain in config.budget.keys() - set(known):
        note(f"select.budget: no rollout is of domain {domain!r}; domains are {', '.join(known)}")


def _rank(
    candidates: _Measured,
    rule: str | SelectionRule,
    config: SelectConfig,
    seed: int,
    scores: Path | None,
    noise: _Noise,
) -> tuple[npt.NDArray[np.float32] | None, dict[str, Any]]:
    """Mark what is ranked too low among those that pass the filters.

    Returns their scores, and what the manifest says about the rule.
    """
    if rule == "all":
        return None, {}
    passed = candidates.passed()
    if config.rule in CLASS_RULES and scores is not None:
        _check_compared(candidates, passed, config.rule, scores)
    ranked = _candidates(candidates, passed, seed)
    score = np.full(len(candidates.reason), np.nan, dtype=np.float32)
    score[passed] = selection.score_candidates(
        rule if isinstance(rule, str) else _reported(rule, config.rule), ranked, config.rule
    )
    keep = selection.rank_within_prompts(score[passed], ranked.prompt_index, config.keep)
    for i in passed[~keep]:
        candidates.reason[i], candidates.value[i] = "rank", float(score[i])
    unsure = [np.array(numbers)[passed] for numbers in candidates.unsure if numbers]
    return score, {"choice": _choice(ranked, score[passed].astype(np.float64), keep, config.rule, noise, unsure)}


def _require_right(candidates: _Measured, verdicts: Verdicts, required: str) -> None:
    """Mark answers that are not right among those that pass the other filters."""
    for i in candidates.passed() if required != "no" else ():
        if (verdict := verdicts.of[i]) in WRONG:
            candidates.reason[i] = "wrong answer"
        elif required == "yes" and verdict != "right":
            candidates.reason[i] = "no reference answer" if verdict is None else "cannot be compared"


def _candidates(candidates: _Measured, passed: npt.NDArray[np.int64], seed: int) -> Candidates:
    """Return what a rule is given of those that pass the filters."""
    counts = np.zeros((len(passed), 3), np.int64)
    if candidates.counts:
        counts = np.array(candidates.counts).reshape(-1, 3)[passed]
    known = candidates.mean_logprob
    return Candidates(
        teacher_counts=counts[:, divergence.SentenceClass.TEACHER],
        shared_counts=counts[:, divergence.SentenceClass.SHARED],
        student_counts=counts[:, divergence.SentenceClass.STUDENT],
        num_sentences=np.array(candidates.num_sentences)[passed],
        num_tokens=np.array(candidates.num_tokens)[passed],
        prompt_index=np.unique(np.asarray(candidates.prompt)[passed], return_inverse=True)[1],
        seed=seed,
        mean_logprob=np.array(known)[passed] if known else None,
        **{name: np.array(values)[passed] for name, values in candidates.by_student.items()},
    )


def _choice(
    ranked: Candidates,
    score: npt.NDArray[np.float64],
    kept: npt.NDArray[np.bool_],
    rule: str,
    noise: _Noise,
    unsure: Sequence[npt.NDArray[np.int64]],
) -> dict[str, Any]:
    """Return what the choice says about its rule; None for what is not known."""
    prompts = ranked.prompt_index
    classes = sum(int(counts.sum()) for counts in (ranked.teacher_counts, ranked.shared_counts, ranked.student_counts))
    size, flips = choice.per_sentence(rule, ranked), None
    if size is not None and unsure and noise.sentence is not None:
        less, more = unsure if rule != "fewest" else reversed(unsure)
        flips = choice.could_flip(score - less * abs(size), score + more * abs(size), kept, prompts)
    elif rule == "likelihood" and noise.token is not None:
        flips = choice.could_flip(score - noise.token, score + noise.token, kept, prompts)
    measured = {
        "length_correlation": choice.rank_correlation(score, ranked.num_tokens, prompts),
        "tied": choice.tied(score, kept, prompts),
        "teacher_share": ranked.teacher_counts.sum() / classes if classes else None,
        "could_flip": flips,
    }
    known = {name: None if value is None or math.isnan(value) else float(value) for name, value in measured.items()}
    return {"questions": choice.num_choices(kept, prompts), **known}


def _spend_budgets(candidates: _Measured, config: SelectConfig, seed: int) -> None:
    """Mark what the budgets of the domains reject among those that are left."""
    passed = candidates.passed()
    for domain, budget in config.budget.items():
        number = candidates.domains.get(domain)
        rest = [i for i in passed if not candidates.reason[i] and candidates.domain[i] == number]
        order = np.random.Generator(np.random.Philox(derive_seed(seed, "budget", domain))).permutation(len(rest))
        for j in order[budget:]:  # drawn at random: dropping by score would drop the short answers
            candidates.reason[rest[j]], candidates.value[rest[j]] = "budget", float(budget)


def _check_compared(candidates: _Measured, passed: npt.NDArray[np.int64], rule: str, scores: Path) -> None:
    """Refuse to compare models where only one has scored."""
    alone = passed[~np.array(candidates.by_teacher, dtype=bool)[passed]]
    if len(alone):
        uid = read_table(scores, "scores", ["uid"])["uid"][int(alone[0])].as_py()
        raise DataError(
            f"{scores}: {len(alone)} of {len(passed)} rollouts were scored by the student alone, the first is {uid};"
            f" select.rule = {rule!r} needs the teacher's log-probabilities as well; score again with them, or use"
            f" {NEED_NO_LOGPROBS}"
        )


def _weigh(
    candidates: _Measured, config: SelectConfig, rollouts: Path
) -> tuple[npt.NDArray[np.float32] | None, dict[str, Any]]:
    """Return the weight of each candidate (NaN if rejected), and what the manifest says about weights."""
    if config.weighting is None:
        return None, {}
    kept = candidates.passed()
    prompts = np.unique(np.asarray(candidates.prompt)[kept], return_inverse=True)[1]
    means, lam = np.zeros(len(kept)), config.weighting.lam
    if config.uses_weights:
        means = np.array(candidates.mean_logprob)[kept]
        if len(unknown := kept[~np.isfinite(means)]):
            uid = read_table(rollouts, "rollouts", ["uid"])["uid"][int(unknown[0])].as_py()
            raise DataError(
                f"{rollouts}: {len(unknown)} of {len(kept)} kept rollouts have no teacher log-probabilities, the first"
                f" is {uid}; let the teacher score them (score.by = 'teacher', and a rule that needs scores), or drop"
                " select.weighting"
            )
    try:
        if lam is None:
            lam = weights.choose_lam(means, prompts, config.weighting.effective_sample_size, config.weighting.favor)
        kept_weights = weights.answer_weights(means, prompts, lam)
    except DataError as error:
        raise DataError(f"{rollouts}: select.weighting: {error}") from error
    sizes = np.bincount(prompts)
    shares = (weights.effective_sample_size(kept_weights, prompts) / sizes)[sizes > 1]
    if not len(shares):
        note("select.weighting: no prompt has two kept answers, so every weight is 1")
    weight = np.full(len(candidates.reason), np.nan, dtype=np.float32)
    weight[kept] = kept_weights
    return weight, {
        "lam": lam,
        "effective_sample_size": float(shares.mean()) if len(shares) else None,
        "weight_range": [float(kept_weights.min()), float(kept_weights.max())],
    }


def _write(
    writer: ShardWriter,
    batch: _Batch,
    candidates: _Measured,
    verdicts: Verdicts,
    score: npt.NDArray[np.float32] | None,
    weight: npt.NDArray[np.float32] | None,
    first: int,
    mask_prefix: bool,
) -> None:
    span = slice(first, first + batch.rollouts.num_rows)
    reason = candidates.reason[span]
    class_counts = pa.nulls(len(reason), KEPT.field("class_counts").type)
    if candidates.counts:
        counts = pa.array(np.array(candidates.counts[3 * span.start : 3 * span.stop]))
        class_counts = pa.FixedSizeListArray.from_arrays(counts, 3)
    columns = {
        **{name: batch.rollouts[name] for name in _ROLLOUT_COLUMNS},
        "ids": batch.ids,
        "num_context_tokens": pa.array(batch.num_before if mask_prefix else batch.num_prompt),
        **{
            name: pa.nulls(len(reason)) if values is None else pa.array(values[span], pa.float32(), from_pandas=True)
            for name, values in (("score", score), ("weight", weight))
        },
        "num_sentences": pa.array(np.array(candidates.num_sentences[span])),
        "class_counts": class_counts,
        "grade": pa.array(verdicts.of[span], pa.string()),
        "reason": pa.array(reason),
        "value": pa.array(np.array(candidates.value[span])),
    }
    table = pa.table(columns).cast(REJECTED)
    kept = pa.array([not r for r in reason])
    writer.write("kept", table.filter(kept).select(KEPT.names))
    writer.write("rejected", table.filter(pa.array([bool(r) for r in reason])))


def _counts(candidates: _Measured, reasons: Counter[str]) -> dict[str, Any]:
    """Return the manifest's counts: how many, why not, and how long the kept answers are beside the rest."""
    kept = np.array([not reason for reason in candidates.reason])
    lengths = np.array(candidates.num_tokens)
    ranked = np.array([reason in ("", "rank") for reason in candidates.reason])
    passed = [reason in ("", "rank", "budget") for reason in candidates.reason]
    return {
        "rollouts": len(kept),
        "kept": int(kept.sum()),
        "prompts": len(set(candidates.prompt)),
        "prompts_kept": len({p for p, k in zip(candidates.prompt, kept, strict=True) if k}),
        "prompts_lost": len(set(candidates.prompt) - {p for p, k in zip(candidates.prompt, passed, strict=True) if k}),
        "rejected": dict(reasons.most_common()),
        "rejected_values": {reason: _range(candidates, reason) for reason, _ in reasons.most_common()},
        "mean_tokens_kept": float(lengths[kept].mean()),
        "mean_tokens_candidates": float(lengths[ranked].mean()),
        "repeating": sum(candidates.repeats),
    }


def _range(candidates: _Measured, reason: str) -> list[float]:
    """Return the smallest and the largest value behind a reason."""
    values = [v for r, v in zip(candidates.reason, candidates.value, strict=True) if r == reason]
    return [min(values), max(values)]
