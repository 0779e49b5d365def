"""Long calls into Rust let other threads run, Ctrl-C stops them, and the number of threads changes no byte."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from dasd_lite.method.divergence import sentence_spans, sentence_stats
from dasd_lite.method.packing import balance_rows, gather_rows, pack_rows
from dasd_lite.method.ragged import offsets_of
from dasd_lite.method.sentences import repeated_ngrams, sentence_ends, text_repetition


def slow_ids() -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Random bits repeat everywhere but nowhere for long, which is the most work for the search."""
    ids = np.random.default_rng(0).integers(0, 2, 4_000_000, np.int32)
    return ids, np.arange(0, len(ids) + 1, 100_000)


def packing() -> Callable[[], object]:
    lengths = np.random.default_rng(0).integers(1, 1000, 30_000_000, np.int32)
    return lambda: pack_rows(lengths, 65_536, method="tight")


def one_long_move() -> Callable[[], object]:
    lengths = np.full(100_000_000, 7, np.int32)
    return lambda: pack_rows(lengths, 65_536)


def balancing() -> Callable[[], object]:
    lengths = np.random.default_rng(0).integers(500, 1000, 6_000_000, np.int32)
    plan = pack_rows(lengths, 1000)
    return lambda: balance_rows(plan, lengths, num_ranks=8, micro_steps=1, cost=(1, 1), seed=0)


def gathering() -> Callable[[], object]:
    offsets = offsets_of(np.full(100_000, 1000))
    tokens, plan = np.zeros(offsets[-1], np.int32), pack_rows(np.full(100_000, 1000), 1000)
    rows = np.tile(np.arange(100_000), 10)
    return lambda: gather_rows(tokens, offsets, plan, rows)


def splitting() -> Callable[[], object]:
    texts = pa.array(["A sentence of words. Another one, of 3.14 words! " * 40_000] * 100, pa.large_string())
    return lambda: sentence_ends(texts)


def lines() -> Callable[[], object]:
    texts = pa.array(["".join(f"Line {line} of this text.\n" for line in range(100_000))] * 40, pa.large_string())
    return lambda: text_repetition(texts)


def statistics() -> Callable[[], object]:
    spans = np.arange(0, 60_000_001, 20)
    logprobs, one_response = np.full(spans[-1], -1, np.float32), np.array([0, len(spans) - 1])
    return lambda: sentence_stats(logprobs, spans, logprobs, spans, one_response, 0.1)


def spans() -> Callable[[], object]:
    num_tokens = 100_000_000
    token_bytes, edges = np.ones(num_tokens, np.int32), np.array([0, num_tokens])
    ends = np.arange(20, num_tokens + 1, 20)
    return lambda: sentence_spans(token_bytes, edges, ends, np.array([0, len(ends)]))


def an_open_fence() -> Callable[[], object]:
    text = "```\n" + "a line of code\n" * 12_000_000
    return lambda: sentence_ends(text)


def tiny_sequences() -> Callable[[], object]:
    lengths = np.random.default_rng(0).integers(1, 3, 20_000_000, np.int32)
    return lambda: pack_rows(lengths, 1 << 24, method="tight", alignment=2)


def ngrams() -> Callable[[], object]:
    ids, offsets = slow_ids()
    return lambda: repeated_ngrams(ids, offsets, 8)


def test_other_threads_run_meanwhile() -> None:
    ids, offsets = slow_ids()
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.005):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    repeated_ngrams(ids, offsets, 8)
    end = time.perf_counter()
    stop.set()
    thread.join()
    during = [at for at in ticks if start < at < end]
    assert end - start > 0.1, "too short to tell"
    assert len(during) > (end - start) / 0.1


PREPARED = [packing, one_long_move, tiny_sequences, balancing, gathering, statistics, spans, splitting]
PREPARED += [an_open_fence, lines, ngrams]


@pytest.mark.parametrize("prepare", PREPARED)
def test_ctrl_c_stops_a_long_call(prepare: Callable[[], Callable[[], object]]) -> None:
    call = prepare()
    raised_at: list[float] = []

    def press() -> None:
        raised_at.append(time.perf_counter())
        signal.raise_signal(signal.SIGINT)

    timer = threading.Timer(0.1, press)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(200):
            call()
    stopped_at = time.perf_counter()
    timer.join()
    assert stopped_at - raised_at[0] < 0.5, "0.2 s, and as much again for a busy machine"


def test_the_next_call_is_as_if_nothing_had_happened() -> None:
    ids, offsets = slow_ids()
    repetition = repeated_ngrams(ids[:100_000], offsets[:2], 8)
    assert repetition.num_repeated[0] == 100_000 - 8 + 1 - 256


EVERYTHING = """
import hashlib, numpy as np, pyarrow as pa
from dasd_lite.method import divergence, packing, sentences as text
from dasd_lite.method.ragged import offsets_of

rng = np.random.default_rng(0)
lengths = rng.integers(1, 3000, 500)
offsets = offsets_of(lengths)
ids = rng.integers(0, 50, offsets[-1], np.int32)
plan = packing.pack_rows(lengths, 4096, method="tight")
order = packing.balance_rows(plan, lengths, num_ranks=4, micro_steps=2, cost=(1, 1), seed=0)
rows = np.tile(order.rows.ravel(), 12)  # large enough to be written past the cache, the second time
batch = packing.gather_rows(ids, offsets, plan, rows, loss_mask=ids < 25)
batch.ids[:] = 0
batch = packing.gather_rows(ids, offsets, plan, rows, loss_mask=ids < 25, out=batch)
assert batch.ids.nbytes > 32 << 20
texts = pa.array(["".join(rng.choice(["One. ", "Two! ", "$3.1$ ", "4. 5\\n", "<think>"], 900)) for _ in range(300)])
ends = text.sentence_ends(texts)
sizes = [len(one.as_py()) for one in texts]
token_bytes = np.concatenate([np.diff(np.unique([0, *rng.integers(0, size, 300), size])) for size in sizes])
token_edges = np.searchsorted(np.cumsum(token_bytes), np.cumsum(sizes)) + 1
spans = divergence.sentence_spans(token_bytes.astype(np.int32), np.append(0, token_edges), *ends)
logprobs = -rng.random(len(token_bytes), dtype=np.float32)
stats = divergence.sentence_stats(logprobs, spans, logprobs * 2, spans, ends.offsets, 0.1)
results = [plan.items, plan.offsets, order.rows, batch.ids, batch.position_ids, batch.labels, batch.cu_seqlens, *ends,
    spans, *stats, *text.repeated_ngrams(ids, offsets, 3), *text.text_repetition(texts)]
print(len(results), hashlib.sha256(b"".join(np.ascontiguousarray(one).tobytes() for one in results)).hexdigest())
"""


def test_threads_and_instructions_change_no_byte() -> None:
    def run(**environment: str) -> str:
        command = [sys.executable, "-c", EVERYTHING]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run(RAYON_NUM_THREADS="1")
    assert first.startswith("18 ")
    assert run(RAYON_NUM_THREADS="7") == first
    assert run(DASD_LITE_SIMD="portable", RAYON_NUM_THREADS="2") == first
    assert run(DASD_LITE_SIMD="avx2", RAYON_NUM_THREADS="3") == first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_sentences", [10_000, 200_000])
def test_a_forked_process_works_on(num_sentences: int) -> None:
    spans, logprobs = np.arange(num_sentences + 1), np.full(num_sentences, -1, np.float32)
    responses = np.arange(0, num_sentences + 1, 100)

    def call() -> int:
        return int(sentence_stats(logprobs, spans, logprobs, spans, responses, 0.1).counts.sum())

    assert call() == num_sentences
    child = os.fork()
    if child == 0:
        os._exit(0 if call() == num_sentences else 1)
    deadline = time.monotonic() + 20
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked process hangs")
        time.sleep(0.01)
