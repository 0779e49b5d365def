"""Which questions of an evaluation stand in the training prompts.

Input: the questions of an evaluation and the prompts that were trained on, as text. Output: for each pair that shares
much, the share of the question's 8-grams that are in that one prompt. Invariants: equal texts are always found; the
time grows with the length of the texts, not with the number of pairs; the same input gives the same output.

Words are runs of letters and digits in lower case; where a script puts no spaces between words, each character is one.
An accuracy on a question that was trained on says what was remembered. What to do about it is the user's choice.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

LENGTH = 8
"""Words of an n-gram."""
FLAGGED = 0.5
"""Share of a question's 8-grams in one prompt from which the question counts as known to the student."""
LISTED = 0.2
"""Share from which a pair is worth a look."""

# Chinese, Japanese, Thai, Lao, Burmese, Khmer.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_BATCH = 250_000  # words looked up at once
_OWN = (3, 0.05)  # an 8-gram in more than so many questions, and in more than this share of them, is the task's wording


@dataclass(frozen=True)
class Overlap:
    """A question and a training prompt that share much of their text.

    Attributes:
        question: Index of the question.
        prompt: Index of the prompt.
        share: Share of the question's 8-grams that are in the prompt, 0 to 1.
        exact: Whether both are the same words.
    """

    question: int
    prompt: int
    share: float
    exact: bool

    @property
    def is_flagged(self) -> bool:
        """Whether the question counts as known to a student that was trained on the prompt."""
        return self.exact or self.share >= FLAGGED


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without marks and spaces."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return _WORD.findall(plain.lower())


def overlaps(questions: Sequence[str], prompts: Iterable[str]) -> list[Overlap]:
    """Find the questions of an evaluation in training prompts.

    A question of fewer than 8 words counts as one n-gram of its own length. 8-grams that many questions share are the
    task's wording and left out; a question of which less than half is left is found by equal text alone.

    Args:
        questions: Texts of the evaluation's questions.
        prompts: Texts of the training prompts; read once, so that they may come from a file.

    Returns:
        Pairs with a share of at least `LISTED`, the largest share first. Of all pairs those are named that are the
        largest of their question or the largest of their prompt: no question and no prompt is missing that has one.
    """
    index = _Index([words(question) for question in questions])
    best_of_question: dict[int, Overlap] = {}
    found: dict[tuple[int, int], Overlap] = {}
    first = 0
    for batch in _batches(prompts):
        best_of_prompt: dict[int, Overlap] = {}
        for own in index.find(batch, first):
            for best, name in ((best_of_prompt, own.prompt), (best_of_question, own.question)):
                if name not in best or _rank(own) < _rank(best[name]):
                    best[name] = own
        found |= {(own.question, own.prompt): own for own in best_of_prompt.values()}
        first += len(batch)
    found |= {(own.question, own.prompt): own for own in best_of_question.values()}
    return sorted(found.values(), key=_rank)


def _rank(own: Overlap) -> tuple[bool, float, int, int]:
    return not own.exact, -own.share, own.question, own.prompt


def _batches(prompts: Iterable[str]) -> Iterator[list[list[str]]]:
    """Split prompts into words, so many prompts at a time that the arrays over them stay small."""
    batch: list[list[str]] = []
    size = 0
    for prompt in prompts:
        batch.append(words(prompt))
        size += len(batch[-1])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Index:
    """Which questions each n-gram is in. A question shorter than 8 words is one n-gram as a whole."""

    def __init__(self, questions: list[list[str]]) -> None:
        self._same: dict[str, list[int]] = defaultdict(list)
        self._ids: dict[str, int] = {}
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, question in enumerate(questions):
            if question:
                self._same[" ".join(question)].append(i)
                by_length[min(len(question), LENGTH)].append(i)
            for word in question:
                self._ids.setdefault(word, len(self._ids))
        self._tables = [
            _Table(length, np.array(names, np.int64), *self._numbers([questions[i] for i in names]))
            for length, names in sorted(by_length.items())
        ]

    def _numbers(self, texts: list[list[str]]) -> tuple[Integers, Integers]:
        """Return the number of each word, with −1 after each text and for unknown words, and the text that it is in."""
        get = self._ids.get
        ids = [number for text in texts for number in (*(get(word, -1) for word in text), -1)]
        return np.array(ids, np.int64), np.repeat(np.arange(len(texts)), [len(text) + 1 for text in texts])

    def find(self, prompts: list[list[str]], first: int) -> Iterator[Overlap]:
        """Yield each pair of a question and one of `prompts`, which are numbered from `first`, that shares enough."""
        same = {(i, at) for at, prompt in enumerate(prompts) for i in self._same.get(" ".join(prompt), ())}
        ids, texts = self._numbers(prompts)
        for table in self._tables:
            for question, prompt, share in table.find(ids, texts, len(prompts)):
                exact = (question, prompt) in same
                same.discard((question, prompt))
                yield Overlap(question, first + prompt, share, exact)
        for question, prompt in sorted(same):
            yield Overlap(question, first + prompt, 1.0, exact=True)


class _Table:
    """The n-grams of one length, and the questions that each is in."""

    def __init__(self, length: int, names: Integers, ids: Integers, texts: Integers) -> None:
        self._names = names
        self._grams = _Grams(length, ids)
        grams, rows = _pairs(self._grams.find(ids), texts)
        total = np.bincount(rows, minlength=len(names))
        few = np.bincount(grams)[grams] <= max(_OWN[0], _OWN[1] * len(names))
        self._sizes = np.bincount(rows[few], minlength=len(names))
        few &= (2 * self._sizes >= total)[rows]
        self._rows = rows[few]  # the questions of the first n-gram, of the second, and so on
        self._starts = np.searchsorted(grams[few], np.arange(self._grams.number + 1))

    def find(self, ids: Integers, texts: Integers, num_texts: int) -> Iterator[tuple[int, int, float]]:
        """Yield question, text and share of each pair that shares enough."""
        grams, places = _pairs(self._grams.find(ids), texts)
        sizes = self._starts[grams + 1] - self._starts[grams]
        ends = np.cumsum(sizes)
        rows = self._rows[np.arange(sizes.sum()) + np.repeat(self._starts[grams] - (ends - sizes), sizes)]
        keys, counts = np.unique(rows * num_texts + np.repeat(places, sizes), return_counts=True)
        shares = counts / self._sizes[keys // num_texts]
        for key, share in zip(keys[shares >= LISTED].tolist(), shares[shares >= LISTED].tolist(), strict=True):
            yield int(self._names[key // num_texts]), key % num_texts, share


def _pairs(grams: Integers, texts: Integers) -> tuple[Integers, Integers]:
    """Return each n-gram that is known with each text that it begins in, once, in order."""
    at = np.flatnonzero(grams >= 0)
    num_texts = int(texts[-1]) + 1
    keys = np.unique(grams[at] * num_texts + texts[at])
    return keys // num_texts, keys % num_texts


class _Grams:
    """Numbers for the n-grams of some texts: equal numbers mean equal words.

    An n-gram is a pair of two halves, which are numbered before it.
    """

    def __init__(self, length: int, ids: Integers) -> None:
        self._length = length
        if length > 1:
            self._left = _Grams(length - length // 2, ids)
            self._right = self._left if length % 2 == 0 else _Grams(length // 2, ids)
            keys = self._keys(ids)
            self._known = np.unique(keys[keys >= 0])
        self.number = len(self._known) if length > 1 else int(ids.max()) + 1

    def find(self, ids: Integers) -> Integers:
        """Return the number of the n-gram that begins at each place but the last ones; −1 where it is not known."""
        if self._length == 1:
            return np.where(ids < self.number, ids, -1)
        keys = self._keys(ids)
        at = np.flatnonzero(keys >= 0)
        places = np.minimum(np.searchsorted(self._known, keys[at]), self.number - 1)
        numbers = np.full(len(keys), -1, np.int64)
        numbers[at] = np.where(self._known[places] == keys[at], places, -1)
        return numbers

    def _keys(self, ids: Integers) -> Integers:
        """Return a number for the pair of halves that begins at each place; −1 where a half is not known."""
        left = self._left.find(ids)
        right = left if self._right is self._left else self._right.find(ids)
        places = max(len(ids) - self._length + 1, 0)
        left, right = left[:places], right[self._length - self._length // 2 :][:places]
        return np.where((left >= 0) & (right >= 0), left * self._right.number + right, -1)
