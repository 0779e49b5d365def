"""Long calls into Rust let other threads run, Ctrl-C stops them, and the number of threads changes no byte."""

import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import starmap
from pathlib import Path

import calls
import numpy as np
import pytest

from dasd_lite import _rust
from dasd_lite.method.divergence import sentence_stats
from dasd_lite.method.sentences import repeated_ngrams

LONG: dict[str, tuple[str, Callable[[int], calls.Arguments], int]] = {
    # at least a tenth of a second on one thread; more than one for a function whose loops are checked separately
    "pack": ("pack", calls.packing, 8_000_000),
    "one long move": ("pack", calls.one_long_move, 100_000_000),
    "tiny sequences": ("pack", calls.tiny_sequences, 20_000_000),
    "balance_rows": ("balance_rows", calls.balancing, 20_000_000),
    "gather_layout": ("gather_layout", calls.layout, 20_000_000),
    "gather_rows": ("gather_rows", calls.gathering, 80_000_000),
    "sentence_ends": ("sentence_ends", calls.splitting, 50_000_000),
    "an open fence": ("sentence_ends", calls.an_open_fence, 200_000_000),
    "text_repetition": ("text_repetition", calls.repetition_of_texts, 80_000_000),
    "repeated_ngrams": ("repeated_ngrams", calls.repetition_of_ids, 5_000_000),
    "sentence_spans": ("sentence_spans", calls.spans, 150_000_000),
    "sentence_stats": ("sentence_stats", calls.statistics, 300_000_000),
    "classify": ("classify", calls.classifying, 100_000_000),
    "class_counts": ("class_counts", calls.counting, 100_000_000),
}
ATTEMPTS = 20


def long_call(name: str) -> Callable[[], object]:
    function, prepare, num = LONG[name]
    for size in (1_000, num):  # numpy imports more of itself at the first call
        arguments, options = prepare(size)
        long = partial(getattr(_rust, function), *arguments, **options)
        if size < num:
            long()
    return long


def test_every_function_that_takes_arrays_is_here() -> None:
    assert {function for function, _, _ in LONG.values()} == set(calls.CALLS)


def test_other_threads_run_meanwhile() -> None:
    long, ticks, stop = long_call("repeated_ngrams"), [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(ATTEMPTS):  # a busy machine may not run the other thread during a single call
            before = ticks[0]
            long()
            if ticks[0] - before > 100:
                return
    finally:
        stop.set()
        thread.join()
    pytest.fail("no other thread ran during the calls")


def is_stopped_midway(long: Callable[[], object]) -> bool:
    """Return whether Ctrl-C during a call stops it.

    All is done by one expression in C, so that Python itself does not handle the signal before the call ends.
    """
    begun, calling = threading.Lock(), False

    def handle(*_: object) -> None:
        if calling:
            raise KeyboardInterrupt

    def press() -> None:
        with begun:
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, handle)
    for _ in range(ATTEMPTS):  # the call may be done before the signal comes
        begun.acquire()
        thread = threading.Thread(target=press)
        thread.start()
        results: list[object] = []
        calling = True
        try:
            results.extend(starmap(operator.call, [(begun.release,), (long,)]))
            calling = False
        except KeyboardInterrupt:
            calling = False
        thread.join()
        if len(results) == 1:
            return True
    return False


def press_ctrl_c() -> None:
    """Print the names of the long calls that Ctrl-C does not stop."""
    for name in LONG:
        if not is_stopped_midway(long_call(name)):
            print(name)


def test_ctrl_c_stops_a_long_call() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_boundary as t; t.press_ctrl_c()"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_next_call_is_as_if_nothing_had_happened() -> None:
    ids = np.random.default_rng(0).integers(0, 2, 100_000, np.int32)
    repetition = repeated_ngrams(ids, np.array([0, 100_000]), 8)
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
spans = divergence.sentence_spans(texts, token_bytes.astype(np.int32), np.append(0, token_edges), *ends)
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
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:  # the test's timeout: the child hangs
        os.kill(child, signal.SIGKILL)
        raise
    assert os.waitstatus_to_exitcode(status) == 0
