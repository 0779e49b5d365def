"""Measure the rollouts of one phase: sentence classes, what was chosen, openings, variety, mixed policy.

Input: the finished folders of a phase. Output: counts, histograms, and a few numbers per rollout. Invariant: one pass
over the texts, a batch at a time; nothing that grows with the length of an answer is kept, so memory stays flat.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dasd_lite.config.stages import Phase
from dasd_lite.console import progress
from dasd_lite.data.dataset import batches, num_rows
from dasd_lite.data.manifest import read_manifest
from dasd_lite.data.run_folder import RunFolder, StageFolder
from dasd_lite.errors import DataError
from dasd_lite.method.divergence import SentenceClass, classify_sentences, mean_logprob
from dasd_lite.method.ragged import from_arrow
from dasd_lite.method.sentences import sentence_ends

Floats = npt.NDArray[np.float64]
CLASSES = ("shared", "teacher", "student", "none")
DIFFERENCE_EDGES = np.linspace(-1, 1, 81)
PLANE_EDGES = np.linspace(0, 1, 41)
_POSITIONS = 4096  # positions counted separately; later sentences count in the totals only
_OPENING_ANSWERS = 5_000  # answers whose sentences are compared; of more, whole prompts are drawn by hash
_OPENING_KINDS = 300_000  # openings in memory; beyond, those seen once are dropped
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")


@dataclass
class SentenceCounts:
    """Sentences of a set of answers by class; columns are those of `CLASSES`."""

    answers: int = 0
    totals: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(4, np.int64))
    by_position: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((_POSITIONS, 4), np.int64))

    def add(self, answers: int, classes: npt.NDArray[np.int8], positions: npt.NDArray[np.int64]) -> None:
        """Count the sentences of `answers` more answers."""
        columns = classes.astype(np.int64) % 4  # NONE is −1, so the last column
        self.answers += answers
        self.totals += np.bincount(columns, minlength=4)
        near = positions < _POSITIONS
        flat = np.bincount(positions[near] * 4 + columns[near], minlength=4 * _POSITIONS)
        self.by_position += flat.reshape(_POSITIONS, 4)


@dataclass
class RankedAnswers:
    """Totals over the answers that the rule chose, or over those it ranked lower."""

    answers: int = 0
    tokens: int = 0
    sentences: int = 0
    teacher: int = 0
    grades: Counter[str] = field(default_factory=Counter)

    def add(self, tokens: int, sentences: int, teacher: int, verdict: str | None) -> None:
        """Count one more answer with its teacher sentences; `verdict` is None if it was not graded."""
        self.answers += 1
        self.tokens += tokens
        self.sentences += sentences
        self.teacher += teacher
        if verdict is not None:
            self.grades[verdict] += 1


@dataclass(frozen=True)
class Opening:
    """How often sentences begin with it in the chosen answers, and how often if the rule ignored openings."""

    text: str
    chosen: int
    ranked: int
    expected: float
    ratio: float
    mean_tokens: float  # of the ranked answers that contain it


@dataclass
class Preference:
    """What the rule chose, compared with what it ranked lower."""

    chosen: RankedAnswers = field(default_factory=RankedAnswers)
    rest: RankedAnswers = field(default_factory=RankedAnswers)
    counted_answers: int = 0  # answers whose openings were counted
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

        The ratio is (chosen + prior) / (expected + prior): the prior keeps rare openings from leading the list.
        Ratios within a tenth of 1 are left out. Expected is the chosen answers' share of all sentences, so longer
        answers alone give a ratio of 1.
        """
        everything, picked = self._ranked.total(), self._picked.total()
        if not picked or picked == everything:
            return [], []
        openings = []
        for text, ranked in self._ranked.items():
            expected = ranked * picked / everything
            ratio = (self._picked[text] + prior) / (expected + prior)
            mean_tokens = self._with_tokens[text] / self._with[text]
            openings.append(Opening(text, self._picked[text], ranked, expected, ratio, mean_tokens))
        openings.sort(key=lambda o: (-o.ratio, o.text))
        over = [o for o in openings[:most] if o.ratio > 1.1]
        under = [o for o in reversed(openings[-most:]) if o.ratio < 1 / 1.1]
        return over, under


@dataclass
class Mixed:
    """The student's answers in a mixed-policy phase (paper section 5, Fig. 7)."""

    prompts: int
    cut_off: int
    """Answers that reached the length limit."""
    wrong: int | None
    """Answers that were finished and wrong; None if they were not graded."""
    cut: npt.NDArray[np.bool_]
    """Whether each answer did."""
    lengths: Floats
    """Tokens of the teacher's answer to the same question, in the student's vocabulary; NaN if unknown."""
    grades: Counter[str]
    """Grades of the answers that the teacher finished."""
    prefix_share: float
    """Share of the bytes of these that the student wrote."""


@dataclass
class PhaseRollouts:
    """The rollouts of one phase, measured."""

    name: str
    source: str
    temperature: float | None
    rule: str
    beta: float
    rollouts: int = 0
    prompts: int = 0
    varied: float = math.nan  # distinct sentences ÷ sentences over all answers to a prompt, averaged over prompts
    candidates: SentenceCounts | None = None
    kept: SentenceCounts | None = None
    difference: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(DIFFERENCE_EDGES) - 1, np.int64))
    plane: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((len(PLANE_EDGES) - 1, len(PLANE_EDGES) - 1), np.int64)
    )
    geometric: Floats = field(default_factory=lambda: np.empty(0))
    reasons: Counter[str] | None = None  # "" stands for kept; None if select is not finished
    choice: dict[str, float | None] | None = None  # what select measured about its rule; None if it ranks nothing
    tokens: dict[str, Floats] = field(default_factory=dict)  # "kept" and "rejected": length of each answer
    preference: Preference | None = None
    mixed: Mixed | None = None


def read_phase(run: RunFolder, phase: Phase, earlier: Path | None) -> PhaseRollouts | None:
    """Measure the rollouts of one phase; None if it has none yet.

    Args:
        run: The run.
        phase: Its phase.
        earlier: The `select` folder that a mixed-policy phase took its questions from.
    """
    source, score, select = (
        StageFolder(phase.name, stage, run.stage(phase.name, stage)) for stage in (phase.source, "score", "select")
    )
    if not source.is_finished:
        return None
    temperature = {"sample": phase.sample.temperature, "mix": phase.mix.temperature}.get(phase.source)
    measured = PhaseRollouts(phase.name, phase.source, temperature, phase.select.rule, phase.select.beta)
    chosen = _read_selection(measured, select.path) if select.is_finished else None
    scores = score.path if phase.is_scored and score.is_finished else None
    _Pass(measured, chosen, scored=scores is not None).run(source.path, scores)
    if phase.source == "mix":
        measured.mixed = _read_mixed(source, earlier, chosen)
    return measured


class Selected(NamedTuple):
    """What select says about a rollout: why it was rejected ("" if kept), its length, and its verdict."""

    reason: str
    tokens: int
    grade: str | None


def _read_selection(measured: PhaseRollouts, select: Path) -> dict[str, Selected]:
    """Return what select says about each rollout; lengths are in the student's tokens."""
    counts = read_manifest(select)["counts"]
    measured.reasons = Counter({"": counts["kept"], **counts["rejected"]})
    measured.choice = counts.get("choice")
    chosen: dict[str, Selected] = {}
    for table in ("kept", "rejected"):
        columns = ["uid", "ids", "num_context_tokens", "grade", *(["reason"] if table == "rejected" else [])]
        lengths = [np.empty(0)]
        for batch in batches(select, table, columns):
            tokens = _answer_tokens(batch)
            reasons = batch["reason"].to_pylist() if table == "rejected" else [""] * batch.num_rows
            own = map(Selected, reasons, tokens.tolist(), batch["grade"].to_pylist())
            chosen.update(zip(batch["uid"].to_pylist(), own, strict=True))
            lengths.append(tokens.astype(np.float64))
        measured.tokens[table] = np.concatenate(lengths)
    return chosen


def _answer_tokens(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """Return the length of each answer in the student's tokens, without the prompt; int64 `[num_rows]`."""
    tokens: npt.NDArray[np.int64] = np.diff(from_arrow(batch["ids"]).offsets) - batch["num_context_tokens"].to_numpy()
    return tokens


class _Pass:
    """The one pass over the texts and scores of a phase."""

    def __init__(
        self,
        measured: PhaseRollouts,
        chosen: dict[str, Selected] | None,
        *,
        scored: bool,
    ) -> None:
        self.measured, self.chosen = measured, chosen
        self.stride = 1
        """Openings and variety are measured on one prompt in so many, drawn by hash, so that memory stays flat."""
        self.distinct: dict[str, set[int]] = defaultdict(set)
        self.sentences: Counter[str] = Counter()
        self.candidates: Counter[str] = Counter()
        self.geometric: list[Floats] = [np.empty(0)]
        if scored:
            measured.candidates = SentenceCounts()
            measured.kept = SentenceCounts() if chosen is not None else None
        if chosen is not None and measured.rule != "all":
            measured.preference = Preference()

    def run(self, source: Path, scores: Path | None) -> None:
        """Read the rollouts in `source` and their `scores` side by side."""
        total = num_rows(source, "rollouts")
        self.stride = max(total // _OPENING_ANSWERS, 1)
        columns = ["uid", "prompt_uid", "completion"]
        pairs: Iterator[tuple[pa.RecordBatch, pa.RecordBatch | None]]
        if scores is not None:
            wanted = ("uid", "sentence_ends", "p_teacher", "p_student", "teacher_mean_logprob")
            pairs = zip(batches(source, "rollouts", columns), batches(scores, "scores", wanted), strict=True)
        else:
            columns += ["logprobs", "token_bytes"]
            pairs = ((batch, None) for batch in batches(source, "rollouts", columns))
        measured = self.measured
        with progress(f"{measured.name}: report", total, "rollouts") as bar:
            for batch, score in pairs:
                if score is not None and not score["uid"].equals(batch["uid"]):
                    raise DataError(f"{scores}: its rows are not those of {source}; score them again")
                self._add(batch, score)
                bar.advance(batch.num_rows)
        measured.rollouts, measured.prompts = self.candidates.total(), len(self.candidates)
        shares = [len(texts) / number for prompt, texts in self.distinct.items() if (number := self.sentences[prompt])]
        measured.varied = float(np.mean(shares)) if shares else math.nan
        geometric = np.concatenate(self.geometric)
        measured.geometric = geometric[np.isfinite(geometric)]

    def _add(self, batch: pa.RecordBatch, score: pa.RecordBatch | None) -> None:
        uids, prompts, texts = (batch[name].to_pylist() for name in ("uid", "prompt_uid", "completion"))
        if score is not None:
            ends, teacher = from_arrow(score["sentence_ends"]), self._add_classes(batch, score)
            self.geometric.append(np.exp(score["teacher_mean_logprob"].to_numpy(zero_copy_only=False)))
        else:
            ends, teacher = sentence_ends(batch["completion"]), [0] * batch.num_rows
            self.geometric.append(np.exp(_mean_logprobs(batch)))
        edges = np.split(ends.values, ends.offsets[1:-1])
        for uid, prompt, text, own, num_teacher in zip(uids, prompts, texts, edges, teacher, strict=True):
            self.candidates[prompt] += 1
            counted = zlib.crc32(prompt.encode()) % self.stride == 0  # all candidates of a prompt, or none
            if counted:
                said = _sentences(text, own)
                self.sentences[prompt] += len(said)
                self.distinct[prompt].update(map(hash, said))
            preference = self.measured.preference
            if preference is None or self.chosen is None:
                continue
            reason, tokens, verdict = self.chosen[uid]
            if reason in ("", "rank"):
                side = preference.rest if reason else preference.chosen
                side.add(tokens, len(own), num_teacher, verdict)
                if counted:
                    preference.add_openings(_openings(text, own), tokens, chosen=not reason)

    def _add_classes(self, batch: pa.RecordBatch, score: pa.RecordBatch) -> list[int]:
        """Count the sentence classes of a batch; return the number of teacher sentences of each answer."""
        measured = self.measured
        (p_teacher, offsets), (p_student, _) = from_arrow(score["p_teacher"]), from_arrow(score["p_student"])
        lengths = np.diff(offsets)
        classes = classify_sentences(p_teacher, p_student, measured.beta)
        positions = np.arange(len(classes)) - np.repeat(offsets[:-1], lengths)
        assert measured.candidates is not None
        measured.candidates.add(len(lengths), classes, positions)
        if measured.kept is not None and self.chosen is not None:
            keep = np.array([not self.chosen[uid].reason for uid in batch["uid"].to_pylist()])
            inside = np.repeat(keep, lengths)
            measured.kept.add(int(keep.sum()), classes[inside], positions[inside])
        both = np.isfinite(p_teacher) & np.isfinite(p_student)
        measured.difference += np.histogram(p_teacher[both].astype(np.float64) - p_student[both], DIFFERENCE_EDGES)[0]
        plane = np.histogram2d(p_student[both], p_teacher[both], (PLANE_EDGES, PLANE_EDGES))[0]
        measured.plane += plane.astype(np.int64)
        before = np.concatenate([[0], np.cumsum(classes == SentenceClass.TEACHER)])
        return [int(n) for n in np.diff(before[offsets])]


def _mean_logprobs(batch: pa.RecordBatch) -> Floats:
    """Return the teacher's mean log-probability of each answer, NaN if unknown."""
    means = np.full(batch.num_rows, math.nan)
    known = pc.and_(batch["logprobs"].is_valid(), batch["token_bytes"].is_valid())
    rows = batch.filter(known)
    logprobs, token_bytes = from_arrow(rows["logprobs"]), from_arrow(rows["token_bytes"])
    means[known.to_numpy(zero_copy_only=False)] = mean_logprob(logprobs.values, token_bytes.values, logprobs.offsets)
    return means


def _sentences(text: str, ends: npt.NDArray[np.int64]) -> list[bytes]:
    raw = text.encode()
    return [raw[start:end].strip() for start, end in pairwise([0, *ends.tolist()])]


def _openings(text: str, ends: npt.NDArray[np.int64]) -> list[str]:
    raw, edges = text.encode(), [0, *ends.tolist()]
    heads = (raw[start : min(end, start + 120)].decode(errors="ignore") for start, end in pairwise(edges))
    return [opening for head in heads if (opening := opening_of(head))]


def opening_of(sentence: str) -> str:
    """Return the first two words of a sentence, with # for numbers; empty for a marker such as <think>."""
    words = sentence.split(None, 2)[:2]
    if not words or words[0] in ("<think>", "</think>"):
        return ""
    return _NUMBER.sub("#", " ".join(words)).rstrip(".,;:!?")[:40]


def _read_mixed(mix: StageFolder, earlier: Path | None, chosen: dict[str, Selected] | None) -> Mixed:
    """Measure how many of the student's answers were cut off, by length, and how the teacher's endings are graded."""
    lengths: dict[str, float] = {}
    if earlier is not None and StageFolder.at(earlier).is_finished:
        for batch in batches(earlier, "kept", ("prompt_uid", "ids", "num_context_tokens")):
            for uid, length in zip(batch["prompt_uid"].to_pylist(), _answer_tokens(batch).tolist(), strict=True):
                lengths.setdefault(uid, float(length))  # the first kept answer set the limit
    cut: list[bool] = []
    known: list[float] = []
    _, student = mix.parts
    for batch in batches(student, "rollouts", ("prompt_uid", "finish_reason")):
        cut += [reason == "length" for reason in batch["finish_reason"].to_pylist()]
        known += [lengths.get(uid, math.nan) for uid in batch["prompt_uid"].to_pylist()]
    grades: Counter[str] = Counter()
    prefix = total = 0
    for batch in batches(mix.path, "rollouts", ("uid", "completion", "prefix_bytes")):
        for row in batch.to_pylist():
            prefix, total = prefix + row["prefix_bytes"], total + len(row["completion"].encode())
            if chosen is not None and (verdict := chosen[row["uid"]].grade) is not None:
                grades[verdict] += 1
    counts = read_manifest(mix.path)["counts"]
    share = prefix / total if total else math.nan
    numbers = counts["prompts"], counts["cut_off"], counts.get("wrong")
    return Mixed(*numbers, np.array(cut, dtype=bool), np.array(known), grades, share)
