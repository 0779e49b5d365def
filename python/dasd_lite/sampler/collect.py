"""Sample what a journal does not have yet: the loop that sample, mix and evaluate share.

Input: a journal, and how a position of its plan becomes a request and a completion becomes a row.
Invariant: every finished answer is committed, also when an error or Ctrl-C ends the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dasd_lite.console import progress
from dasd_lite.journal import Journal
from dasd_lite.sampler import Completion, Request, Sampler, SamplingParams


def collect(
    journal: Journal,
    request: Callable[[int], Request],
    row: Callable[[Completion], Mapping[str, Any]],
    opened: Callable[[], Sampler],
    params: SamplingParams,
    label: str,
) -> dict[str, float]:
    """Fill the journal; return what this call sampled: tokens, answers, and tokens per second of sampling.

    The sampler is opened only when there is something to do, and closed in any case.
    """
    done = journal.done()
    requests = [request(position) for position in range(journal.total) if position not in done]
    if not requests:
        return {}
    sampler = opened()
    start, tokens = time.perf_counter(), 0
    try:
        with progress(label, journal.total, "answers", len(done)) as bar:

            def rows() -> Iterator[tuple[int, Mapping[str, Any]]]:
                nonlocal tokens
                for completion in sampler.complete(requests, params):
                    tokens += len(completion.logprobs)
                    yield completion.position, row(completion)
                    bar.advance()

            journal.commit_each(rows())
    finally:
        sampler.close()
    seconds = time.perf_counter() - start
    return {"sampled_tokens": tokens, "sampled_answers": len(requests), "tokens_per_second": tokens / seconds}


def token_columns(completion: Completion) -> dict[str, Any]:
    """Return the columns of a rollout that hold its tokens; ids that the source did not tell are null."""
    return {
        "token_ids": completion.token_ids if len(completion.token_ids) else None,
        "logprobs": completion.logprobs,
        "token_bytes": completion.token_bytes,
    }
