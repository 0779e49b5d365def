"""Sentence statistics, written with numpy, pandas, polars and numba.

    python benchmarks/peers/stats.py FOLDER BETA

FOLDER has the columns of bench_stats.py as .npy. What a library needs prepared (the sentence of each token, list
columns, the response of each sentence) is prepared before the clock starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timing import best, measure

FOLDER = Path(sys.argv[1])
BETA = float(sys.argv[2])
LOGPROBS = [np.load(FOLDER / f"{model}_logprobs.npy") for model in ("teacher", "student")]
SPANS = [np.load(FOLDER / f"{model}_spans.npy") for model in ("teacher", "student")]
RESPONSES = np.load(FOLDER / "response_offsets.npy")


def main() -> None:
    """Measure each library."""
    measure(
        {
            "numpy reduceat, float32 sums": lambda: with_numpy(np.float32),
            "numpy reduceat, float64 sums": lambda: with_numpy(np.float64),
            "pandas groupby": with_pandas,
            "polars list.mean": with_polars,
            "numba loop": with_numba,
        }
    )


def checked(work: Callable[[], tuple[Any, Any, Any, Any]], times: int) -> dict[str, Any]:
    """Time `work`, which returns both probabilities, classes and counts; compare its results with float64."""
    seconds, (p_teacher, p_student, classes, counts) = best(work, times=times)
    reference = np.load(FOLDER / "reference.npy")
    error = max(float(np.abs(reference[0] - p_teacher).max()), float(np.abs(reference[1] - p_student).max()))
    difference = reference[0] - reference[1]
    expected = np.where(difference > BETA, 1, np.where(difference < -BETA, 2, 0))
    assert int(np.asarray(counts).sum()) == len(expected), "every sentence is counted"
    return {"seconds": seconds, "error": error, "differing": int((expected != classes).sum())}


def classify(p_teacher: Any, p_student: Any) -> tuple[Any, Any, Any, Any]:
    """Classes and their counts per response, with numpy."""
    difference = p_teacher.astype(np.float64) - p_student
    classes = np.where(difference > BETA, 1, np.where(difference < -BETA, 2, 0)).astype(np.int8)
    counts = np.stack([np.add.reduceat(classes == kind, RESPONSES[:-1], dtype=np.int64) for kind in range(3)], 1)
    return p_teacher, p_student, classes, counts


def with_numpy(dtype: type) -> dict[str, Any]:
    """Sums by reduceat, the rest by operations on whole columns."""

    def run() -> tuple[Any, Any, Any, Any]:
        p = [
            np.exp(np.add.reduceat(logprobs, spans[:-1], dtype=dtype) / np.diff(spans)).astype(np.float32)
            for logprobs, spans in zip(LOGPROBS, SPANS, strict=True)
        ]
        return classify(*p)

    return checked(run, 3)


def with_pandas() -> dict[str, Any]:
    """Means by groupby over the sentence number of each token; counts by groupby too."""
    import pandas as pd

    series = [pd.Series(logprobs) for logprobs in LOGPROBS]
    sentences = [np.repeat(np.arange(len(spans) - 1, dtype=np.int32), np.diff(spans)) for spans in SPANS]
    responses = np.repeat(np.arange(len(RESPONSES) - 1, dtype=np.int32), np.diff(RESPONSES))

    def run() -> tuple[Any, Any, Any, Any]:
        p = [np.exp(one.groupby(number, sort=False).mean()) for one, number in zip(series, sentences, strict=True)]
        difference = (p[0].astype("float64") - p[1]).to_numpy()
        classes = np.select([difference > BETA, difference < -BETA], [1, 2], 0)
        counts = pd.DataFrame({"response": responses, "class": classes}).groupby(["response", "class"]).size()
        return p[0].to_numpy(), p[1].to_numpy(), classes, counts

    return checked(run, 1)


def with_polars() -> dict[str, Any]:
    """Means by list.mean over list columns, classes by when/then, counts by group_by."""
    import polars as pl
    import pyarrow as pa

    lists = [
        pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(spans), pa.array(logprobs)))
        for logprobs, spans in zip(LOGPROBS, SPANS, strict=True)
    ]
    responses = np.repeat(np.arange(len(RESPONSES) - 1, dtype=np.uint32), np.diff(RESPONSES))
    frame = pl.DataFrame({"teacher": lists[0], "student": lists[1], "response": responses})
    difference = pl.col("p_teacher").cast(pl.Float64) - pl.col("p_student")
    query = (
        frame.lazy()
        .select(
            "response", p_teacher=pl.col("teacher").list.mean().exp(), p_student=pl.col("student").list.mean().exp()
        )
        .with_columns(
            kind=pl.when(difference > BETA).then(1).when(difference < -BETA).then(2).otherwise(0).cast(pl.Int8)
        )
    )

    def run() -> tuple[Any, Any, Any, Any]:
        sentences = query.collect()
        counts = sentences.group_by("response", maintain_order=True).agg(
            [(pl.col("kind") == kind).sum().alias(str(kind)) for kind in range(3)]
        )
        columns = [sentences[name].to_numpy() for name in ("p_teacher", "p_student", "kind")]
        return *columns, counts.select("0", "1", "2").to_numpy()

    return checked(run, 2)


def with_numba() -> dict[str, Any]:
    """One compiled loop over responses, sentences and tokens, with float64 sums."""
    import numba

    @numba.njit(error_model="numpy")
    def loop(t_logprobs, t_spans, s_logprobs, s_spans, responses, beta):  # type: ignore[no-untyped-def]
        num = len(t_spans) - 1
        p_teacher, p_student = np.empty(num, np.float32), np.empty(num, np.float32)
        classes = np.empty(num, np.int8)
        counts = np.zeros((len(responses) - 1, 3), np.int64)
        for response in range(len(responses) - 1):
            for sentence in range(responses[response], responses[response + 1]):
                sums = 0.0
                for at in range(t_spans[sentence], t_spans[sentence + 1]):
                    sums += t_logprobs[at]
                p_teacher[sentence] = np.exp(sums / (t_spans[sentence + 1] - t_spans[sentence]))
                sums = 0.0
                for at in range(s_spans[sentence], s_spans[sentence + 1]):
                    sums += s_logprobs[at]
                p_student[sentence] = np.exp(sums / (s_spans[sentence + 1] - s_spans[sentence]))
                difference = np.float64(p_teacher[sentence]) - np.float64(p_student[sentence])
                kind = 1 if difference > beta else 2 if difference < -beta else 0
                classes[sentence] = kind
                counts[response, kind] += 1
        return p_teacher, p_student, classes, counts

    return checked(lambda: loop(LOGPROBS[0], SPANS[0], LOGPROBS[1], SPANS[1], RESPONSES, BETA), 3)


if __name__ == "__main__":
    main()
