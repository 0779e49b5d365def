"""Sentence splitters that can be installed, on the first texts.

    python benchmarks/peers/sentences.py FOLDER

FOLDER has the file `text` and offsets.npy of the texts to split. NLTK's Punkt runs without its trained abbreviations,
which are a separate download and do not change its speed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from timing import measure

FOLDER = Path(sys.argv[1])
OFFSETS = np.load(FOLDER / "offsets.npy")
TEXT = (FOLDER / "text").read_bytes()[: OFFSETS[-1]]
TEXTS = [TEXT[begin:end].decode() for begin, end in pairwise(OFFSETS)]
PATIENCE = 10.0


def main() -> None:
    """Measure each splitter."""
    measure({"BlingFire": blingfire, "NLTK Punkt, untrained": punkt, "pySBD": pysbd})


def split(splitter: Callable[[str], int]) -> dict[str, Any]:
    """Split the texts one by one, in up to three rounds within PATIENCE seconds; return the fastest round."""
    splitter(TEXTS[0][:1_000])
    rounds = []
    begin = time.perf_counter()
    while len(rounds) < 3 and time.perf_counter() - begin < PATIENCE:
        sentences = num = 0
        start = time.perf_counter()
        for text in TEXTS:
            sentences += splitter(text)
            num += len(text.encode())
            if time.perf_counter() - start > PATIENCE:
                break
        rounds.append({"seconds": time.perf_counter() - start, "num": num, "sentences": sentences})
    return min(rounds, key=lambda one: one["seconds"] / one["num"])


def blingfire() -> dict[str, Any]:
    """BlingFire, in C++, returns character offsets."""
    import blingfire

    return split(lambda text: len(blingfire.text_to_sentences_and_offsets(text)[1]))


def punkt() -> dict[str, Any]:
    """NLTK's Punkt returns offsets too."""
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    tokenizer = PunktSentenceTokenizer()
    return split(lambda text: sum(1 for _ in tokenizer.span_tokenize(text)))


def pysbd() -> dict[str, Any]:
    """pySBD: strings, because offsets are slower; by paragraph, because its time grows faster than the text."""
    import pysbd

    segmenter = pysbd.Segmenter(language="en", clean=False)
    return split(lambda text: sum(len(segmenter.segment(part)) for part in text.split("\n\n")))


if __name__ == "__main__":
    main()
