"""Sample what a journal does not have yet: the loop that sample, mix and evaluate share.

Input: a journal, and how a position of its plan becomes a request and a completion becomes a row.
Invariant: every answer that has arrived is committed, with the tokens that it took, also when an error
or Ctrl-C ends the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from dasd_lite.config.models import Prices
from dasd_lite.console import progress
from dasd_lite.data.journal import Journal
from dasd_lite.data.usage import Usage
from dasd_lite.inference import Completion, Request, Sampler, SamplingParams


def collect(
    journal: Journal,
    request: Callable[[int], Request],
    row: Callable[[Completion], Mapping[str, Any]],
    opened: Callable[[Usage], Sampler],
    params: SamplingParams,
    label: str,
    *,
    prices: Prices | None = None,
    spent: Usage | None = None,
) -> dict[str, float]:
    """Fill the journal; return what the stage took: tokens, answers, cost, and tokens per second of this call.

    The sampler is opened only when there is something to do, and closed in any case; it is told what this stage, and
    `spent` outside of it, have read and written before.
    """
    done = journal.done()
    requests = [request(position) for position in range(journal.total) if position not in done]
    start, here, before = time.perf_counter(), Usage(), journal_usage(journal)
    if requests:
        sampler = opened(before + (spent or Usage()))

        def status() -> str:
            return _status(before + here, here, time.perf_counter() - start, prices, sampler.status())

        try:
            with progress(label, journal.total, "answers", len(done), status) as bar:
                for completion in sampler.complete(requests, params):
                    took = {
                        "prompt_tokens": completion.prompt_tokens,
                        "completion_tokens": completion.completion_tokens or len(completion.logprobs),
                    }
                    left_out = {"left_out": 1} if completion.finish_reason == "error" else {}
                    journal.commit({completion.position: row(completion)}, took | left_out)
                    here.add(**took)
                    bar.advance()
        finally:
            sampler.close()
    seconds = time.perf_counter() - start
    whole = before + here
    timing: dict[str, float] = {
        "prompt_tokens": whole.prompt_tokens,
        "completion_tokens": whole.completion_tokens,
    }
    if num_left_out := journal.tally().get("left_out"):
        timing["left_out"] = num_left_out
    if (cost := whole.cost(prices)) is not None:
        timing["cost"] = cost
    if requests:
        timing |= {"sampled_answers": here.answers, "tokens_per_second": here.completion_tokens / seconds}
    return timing


def journal_usage(journal: Journal) -> Usage:
    """Return the tokens that the journal's items took."""
    found = journal.tally()
    return Usage(found.get("prompt_tokens", 0), found.get("completion_tokens", 0))


def _status(whole: Usage, here: Usage, seconds: float, prices: Prices | None, sampler: str) -> str:
    rates = f"{here.prompt_tokens / seconds:,.0f} tokens/s in, {here.completion_tokens / seconds:,.0f} out"
    cost = whole.cost(prices)
    return ", ".join(filter(None, [rates, "" if cost is None else f"cost {cost:,.2f}", sampler]))


def token_columns(completion: Completion) -> dict[str, Any]:
    """Return the columns of a rollout that hold its tokens; what the source did not tell is null."""
    told = len(completion.logprobs) > 0 or not completion.text
    return {
        "token_ids": completion.token_ids if len(completion.token_ids) else None,
        "logprobs": completion.logprobs if told else None,
        "token_bytes": completion.token_bytes if told else None,
    }
