"""Measure the rollouts of one phase: sentence classes, what was chosen, openings, variety, mixed policy.

Input: the closed folders of a phase. Output: counts, histograms and a few numbers per rollout.
Invariant: one pass over the texts, a batch at a time; nothing that grows with the length of an answer
is kept, so memory stays flat however long they are.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dasd_lite.config.stages import Phase
from dasd_lite.console import progress
from dasd_lite.data.dataset import batches, num_rows
from dasd_lite.errors import DataError
from dasd_lite.grading.math import grade
from dasd_lite.method.divergence import SentenceClass, classify_sentences
from dasd_lite.method.sentences import sentence_ends

Floats = npt.NDArray[np.float64]
CLASSES = ("shared", "teacher", "student", "none")
DIFFERENCE_EDGES = np.linspace(-1, 1, 81)
PLANE_EDGES = np.linspace(0, 1, 41)
_POSITIONS = 4096  # sentences of an answer that are told apart by position; the classes of all are counted
_OPENING_ANSWERS = 5_000  # answers whose sentences are compared; of more, whole prompts are drawn by hash
_OPENING_KINDS = 300_000  # openings in memory; beyond, those seen once are forgotten
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")


@dataclass
class SentenceTally:
    """Sentences of a set of answers by class."""

    answers: int = 0
    totals: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(4, np.int64))
    by_position: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((_POSITIONS, 4), np.int64))

    def add(self, answers: int, classes: npt.NDArray[np.int8], positions: npt.NDArray[np.int64]) -> None:
        """Count the sentences of `answers` more answers."""
        columns = classes.astype(np.int64) % 4  # NONE is −1: the last column
        self.answers += answers
        self.totals += np.bincount(columns, minlength=4)
        near = positions < _POSITIONS
        flat = np.bincount(positions[near] * 4 + columns[near], minlength=4 * _POSITIONS)
        self.by_position += flat.reshape(_POSITIONS, 4)


@dataclass
class Answers:
    """A set of answers that the rule ranked."""

    answers: int = 0
    tokens: int = 0
    sentences: int = 0
    teacher: int = 0
    grades: Counter[str] = field(default_factory=Counter)

    def add(self, tokens: int, sentences: int, teacher: int, verdict: str | None) -> None:
        """Count one more answer."""
        self.answers += 1
        self.tokens += tokens
        self.sentences += sentences
        self.teacher += teacher
        if verdict is not None:
            self.grades[verdict] += 1


@dataclass(frozen=True)
class Opening:
    """How often sentences with one opening stand in the chosen answers, beside what indifference would give."""

    text: str
    chosen: int
    ranked: int
    expected: float
    ratio: float
    mean_tokens: float  # of the ranked answers that have it


@dataclass
class Preference:
    """What the rule chose, against those that it ranked lower."""

    chosen: Answers = field(default_factory=Answers)
    rest: Answers = field(default_factory=Answers)
    counted_answers: int = 0  # whose openings were counted
    _ranked: Counter[str] = field(default_factory=Counter)
    _picked: Counter[str] = field(default_factory=Counter)
    _with: Counter[str] = field(default_factory=Counter)
    _with_tokens: Counter[str] = field(default_factory=Counter)

    def add_openings(self, openings: list[str], tokens: int, *, chosen: bool) -> None:
        """Count the openings of one answer's sentences."""
        self.counted_answers += 1
        self._ranked.update(openings)
        if chosen:
            self._picked.update(openings)
        for text in set(openings):
            self._with[text] += 1
            self._with_tokens[text] += tokens
        if len(self._ranked) > _OPENING_KINDS:
            for text in [text for text, count in self._ranked.items() if count == 1]:
                for counter in (self._ranked, self._picked, self._with, self._with_tokens):
                    counter.pop(text, None)

    def openings(self, most: int = 6, prior: float = 5.0) -> tuple[list[Opening], list[Opening]]:
        """Return the openings most over-picked and most under-picked.

        The ratio is (chosen + prior) / (expected + prior): the prior keeps a handful of sentences from
        leading the list; what is within a tenth of 1 is left out. Expected is the chosen answers' share of
        all sentences, so length alone gives 1.
        """
        everything, picked = self._ranked.total(), self._picked.total()
        if not picked or picked == everything:
            return [], []
        found = []
        for text, ranked in self._ranked.items():
            expected = ranked * picked / everything
            ratio = (self._picked[text] + prior) / (expected + prior)
            mean_tokens = self._with_tokens[text] / self._with[text]
            found.append(Opening(text, self._picked[text], ranked, expected, ratio, mean_tokens))
        found.sort(key=lambda o: (-o.ratio, o.text))
        over = [o for o in found[:most] if o.ratio > 1.1]
        under = [o for o in reversed(found[-most:]) if o.ratio < 1 / 1.1]
        return over, under


@dataclass
class Mixed:
    """What became of the student's answers in a mixed-policy phase (paper section 5, Fig. 7)."""

    prompts: int
    cut: npt.NDArray[np.bool_]
    lengths: Floats  # of the teacher's answer to the same question, in the student's tokens; NaN where not known
    grades: Counter[str] = field(default_factory=Counter)  # of the mended answers
    prefix_share: float = math.nan


@dataclass
class PhaseRollouts:
    """What one phase's rollouts amount to."""

    name: str
    source: str
    temperature: float | None
    rule: str
    beta: float
    rollouts: int = 0
    prompts: int = 0
    varied: float = math.nan  # mean over prompts of distinct sentences / sentences, in all answers to it
    candidates: SentenceTally | None = None
    kept: SentenceTally | None = None
    difference: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(DIFFERENCE_EDGES) - 1, np.int64))
    plane: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((len(PLANE_EDGES) - 1, len(PLANE_EDGES) - 1), np.int64)
    )
    geometric: Floats = field(default_factory=lambda: np.empty(0))
    reasons: Counter[str] | None = None  # "" is kept; None: select is not finished
    tokens: dict[str, Floats] = field(default_factory=dict)  # "kept" and "rejected": length of each answer
    preference: Preference | None = None
    mixed: Mixed | None = None


def read_phase(run_folder: Path, phase: Phase, earlier: Path | None) -> PhaseRollouts | None:
    """Measure the rollouts of one phase; None when there are none yet.

    `earlier` is the select folder that a mixed-policy phase took its questions from.
    """
    folder = run_folder / phase.name
    if not _finished(folder / phase.source):
        return None
    temperature = {"sample": phase.sample.temperature, "mix": phase.mix.temperature}.get(phase.source)
    found = PhaseRollouts(phase.name, phase.source, temperature, phase.select.rule, phase.select.beta)
    scored = _finished(folder / "score") and phase.is_scored
    chosen = _selection(found, folder / "select") if _finished(folder / "select") else None
    _Pass(found, chosen, scored, num_rows(folder / phase.source, "rollouts")).run(folder, phase)
    if phase.source == "mix":
        _read_mixed(found, folder / "mix", earlier)
    return found


def _finished(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def _selection(found: PhaseRollouts, select: Path) -> dict[str, tuple[str, int]]:
    """Return why each rollout was rejected ("" is kept) and how long it is, in the student's tokens."""
    chosen: dict[str, tuple[str, int]] = {}
    found.reasons = Counter()
    for table in ("kept", "rejected"):
        columns = ["uid", "ids", "num_context_tokens", *(["reason"] if table == "rejected" else [])]
        lengths = [np.empty(0)]
        for batch in batches(select, table, columns):
            tokens = _column(batch, "ids").value_lengths().to_numpy() - batch["num_context_tokens"].to_numpy()
            reasons = _list(batch, "reason") if table == "rejected" else [""] * batch.num_rows
            chosen.update(zip(_list(batch, "uid"), zip(reasons, tokens.tolist(), strict=True), strict=True))
            found.reasons.update(reasons)
            lengths.append(tokens.astype(np.float64))
        found.tokens[table] = np.concatenate(lengths)
    return chosen


class _Pass:
    """The one pass over a phase's texts and scores."""

    def __init__(
        self, found: PhaseRollouts, chosen: dict[str, tuple[str, int]] | None, scored: bool, total: int
    ) -> None:
        self.found, self.chosen, self.scored, self.total = found, chosen, scored, total
        self.stride = max(total // _OPENING_ANSWERS, 1)
        self.distinct: dict[str, set[int]] = defaultdict(set)
        self.sentences: Counter[str] = Counter()
        self.candidates: Counter[str] = Counter()
        self.geometric: list[Floats] = [np.empty(0)]
        if scored:
            found.candidates = SentenceTally()
            found.kept = SentenceTally() if chosen is not None else None
        if chosen is not None and found.rule != "all":
            found.preference = Preference()

    def run(self, folder: Path, phase: Phase) -> None:
        """Read the rollouts and, beside them, their scores."""
        columns = ["uid", "prompt_uid", "answer", "completion"]
        pairs: Iterator[tuple[pa.RecordBatch, pa.RecordBatch | None]]
        if self.scored:
            wanted = ("uid", "sentence_ends", "p_teacher", "p_student", "teacher_mean_logprob")
            rows = batches(folder / phase.source, "rollouts", columns)
            pairs = zip(rows, batches(folder / "score", "scores", wanted), strict=True)
        else:
            columns += ["logprobs", "token_bytes"]
            pairs = ((batch, None) for batch in batches(folder / phase.source, "rollouts", columns))
        with progress(f"{folder.name}: report", self.total, "rollouts") as bar:
            for batch, score in pairs:
                if score is not None and not score["uid"].equals(batch["uid"]):
                    source = folder / phase.source
                    raise DataError(f"{folder / 'score'}: its rows are not those of {source}; score them again")
                self._batch(batch, score)
                bar.advance(batch.num_rows)
        found = self.found
        found.rollouts, found.prompts = self.candidates.total(), len(self.candidates)
        shares = [len(texts) / self.sentences[prompt] for prompt, texts in self.distinct.items()]
        found.varied = float(np.mean(shares)) if shares else math.nan
        geometric = np.concatenate(self.geometric)
        found.geometric = geometric[np.isfinite(geometric)]

    def _batch(self, batch: pa.RecordBatch, score: pa.RecordBatch | None) -> None:
        prompts, texts = _list(batch, "prompt_uid"), _list(batch, "completion")
        ends: Sequence[npt.NDArray[np.int64] | None]
        if score is not None:
            ends = _split(score["sentence_ends"])
            teacher = self._classes(batch, score)
            self.geometric.append(np.exp(score["teacher_mean_logprob"].to_numpy(zero_copy_only=False)))
        else:
            ends, teacher = [None] * len(texts), [0] * len(texts)
            self.geometric.append(np.exp(_mean_logprobs(batch)))
        for prompt, text, edges in zip(prompts, texts, ends, strict=True):
            self.candidates[prompt] += 1
            if zlib.crc32(prompt.encode()) % self.stride == 0:  # memory stays flat
                said = _sentences(text, sentence_ends(text) if edges is None else edges)
                self.sentences[prompt] += len(said)
                self.distinct[prompt].update(map(hash, said))
        if self.found.preference is None or self.chosen is None:
            return
        rows = zip(_list(batch, "uid"), prompts, _list(batch, "answer"), texts, ends, teacher, strict=True)
        for uid, prompt, answer, text, edges, num_teacher in rows:
            reason, tokens = self.chosen[uid]
            if reason in ("", "rank"):
                places = sentence_ends(text) if edges is None else edges
                self._ranked(prompt, answer, text, places, num_teacher, tokens, chosen=not reason)

    def _classes(self, batch: pa.RecordBatch, score: pa.RecordBatch) -> list[int]:
        """Count the classes of a batch; return the number of teacher sentences of each answer."""
        found = self.found
        p_teacher, p_student = (_column(score, name).flatten().to_numpy() for name in ("p_teacher", "p_student"))
        lengths = _column(score, "p_teacher").value_lengths().to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        classes = classify_sentences(p_teacher, p_student, found.beta)
        positions = np.arange(len(classes)) - np.repeat(offsets[:-1], lengths)
        assert found.candidates is not None
        found.candidates.add(len(lengths), classes, positions)
        if found.kept is not None and self.chosen is not None:
            keep = np.array([not self.chosen[uid][0] for uid in _list(batch, "uid")])
            inside = np.repeat(keep, lengths)
            found.kept.add(int(keep.sum()), classes[inside], positions[inside])
        both = np.isfinite(p_teacher) & np.isfinite(p_student)
        difference = p_teacher[both].astype(np.float64) - p_student[both]
        found.difference += np.histogram(difference, DIFFERENCE_EDGES)[0]
        found.plane += np.histogram2d(p_student[both], p_teacher[both], (PLANE_EDGES, PLANE_EDGES))[0].astype(np.int64)
        before = np.concatenate([[0], np.cumsum(classes == SentenceClass.TEACHER)])
        return [int(n) for n in np.diff(before[offsets])]

    def _ranked(
        self,
        prompt: str,
        answer: str | None,
        text: str,
        ends: npt.NDArray[np.int64],
        teacher: int,
        tokens: int,
        *,
        chosen: bool,
    ) -> None:
        preference = self.found.preference
        assert preference is not None
        verdict = grade(text, answer).verdict if answer is not None else None
        side = preference.chosen if chosen else preference.rest
        side.add(tokens, len(ends), teacher, verdict)
        if zlib.crc32(prompt.encode()) % self.stride == 0:  # all candidates of a prompt, or none
            preference.add_openings(_openings(text, ends), tokens, chosen=chosen)


def _column(batch: pa.RecordBatch, name: str) -> Any:
    """Return a column of lists, whose methods the types of pyarrow do not know."""
    return batch[name]


def _list(batch: pa.RecordBatch, name: str) -> list[Any]:
    values: list[Any] = batch[name].to_pylist()
    return values


def _split(column: Any) -> list[npt.NDArray[np.int64]]:
    return np.split(column.flatten().to_numpy(), np.cumsum(column.value_lengths().to_numpy())[:-1])


def _mean_logprobs(batch: pa.RecordBatch) -> Floats:
    """Return the teacher's mean log-probability of each answer, NaN where it is not known.

    The end token is no part of the text: it has no bytes of it and is left out, as score leaves it out.
    """
    means = np.full(batch.num_rows, math.nan)
    for row, (values, sizes) in enumerate(zip(batch["logprobs"], batch["token_bytes"], strict=True)):
        if values.values is not None and sizes.values is not None:
            spelling = np.flatnonzero(sizes.values.to_numpy())
            end = int(spelling[-1]) + 1 if len(spelling) else 0
            if end:
                means[row] = values.values.to_numpy()[:end].mean(dtype=np.float64)
    return means


def _sentences(text: str, ends: npt.NDArray[np.int64]) -> list[bytes]:
    raw = text.encode()
    return [raw[start:end].strip() for start, end in zip([0, *ends.tolist()], ends.tolist(), strict=False)]


def _openings(text: str, ends: npt.NDArray[np.int64]) -> list[str]:
    raw, start, found = text.encode(), 0, []
    for end in ends.tolist():
        opening = opening_of(raw[start : min(end, start + 120)].decode(errors="ignore"))
        if opening:
            found.append(opening)
        start = end
    return found


def opening_of(sentence: str) -> str:
    """Return a sentence's first two words, numbers as #; nothing for a mark such as <think>."""
    words = sentence.split(None, 2)[:2]
    if not words or words[0] in ("<think>", "</think>"):
        return ""
    return _NUMBER.sub("#", " ".join(words)).rstrip(".,;:!?")[:40]


def _read_mixed(found: PhaseRollouts, mix: Path, earlier: Path | None) -> None:
    """Measure how many of the student's answers were cut off, by length, and how many of these were mended."""
    lengths: dict[str, float] = {}
    if earlier is not None and _finished(earlier):
        for batch in batches(earlier, "kept", ("prompt_uid", "ids", "num_context_tokens")):
            tokens = _column(batch, "ids").value_lengths().to_numpy() - batch["num_context_tokens"].to_numpy()
            for uid, length in zip(_list(batch, "prompt_uid"), tokens.tolist(), strict=True):
                lengths.setdefault(uid, float(length))  # the first one kept set the cap
    cut: list[bool] = []
    known: list[float] = []
    if _finished(mix / "student"):
        for batch in batches(mix / "student", "rollouts", ("prompt_uid", "finish_reason")):
            cut += [reason == "length" for reason in _list(batch, "finish_reason")]
            known += [lengths.get(uid, math.nan) for uid in _list(batch, "prompt_uid")]
    found.mixed = Mixed(len(cut), np.array(cut, dtype=bool), np.array(known))
    prefix = total = 0
    for batch in batches(mix, "rollouts", ("completion", "answer", "prefix_bytes")):
        for row in batch.to_pylist():
            prefix, total = prefix + row["prefix_bytes"], total + len(row["completion"].encode())
            if row["answer"] is not None:
                found.mixed.grades[grade(row["completion"], row["answer"]).verdict] += 1
    found.mixed.prefix_share = prefix / total if total else math.nan
