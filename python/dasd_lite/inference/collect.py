"""The loop that sample, mix and evaluate share: sample whatever a journal does not contain yet.

Input: a journal, and functions that turn a position of its plan into a request and a completion into a row.
Invariant: every answer that has arrived is committed together with its token counts, even if an error or Ctrl-C ends
the loop.
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
    open_with: Callable[[Usage], Sampler],
    params: SamplingParams,
    label: str,
    *,
    prices: Prices | None = None,
    used: Usage | None = None,
) -> dict[str, float]:
    """Fill the journal with answers.

    Args:
        journal: Rows to fill, one per position of its plan.
        request: The request at a position.
        row: The journal's row for a completion.
        open_with: Opens the sampler, given the tokens used so far by this stage and by others (`used`). Called only if
            an answer is missing; the sampler is always closed.
        params: How tokens are drawn.
        label: Description in the progress bar.
        prices: What tokens cost.
        used: Tokens that other stages have used.

    Returns:
        Tokens, answers and cost of the stage so far, and tokens per second of this call.
    """
    done = journal.done()
    requests = [request(position) for position in range(journal.total) if position not in done]
    start, now, before = time.perf_counter(), Usage(), journal_usage(journal)
    if requests:
        sampler = open_with(before + (used or Usage()))

        def status() -> str:
            return _status(before + now, now, time.perf_counter() - start, prices, sampler.status())

        try:
            with progress(label, journal.total, "answers", len(done), status) as bar:
                for completion in sampler.complete(requests, params):
                    tokens = {
                        "prompt_tokens": completion.prompt_tokens,
                        "completion_tokens": completion.completion_tokens or len(completion.logprobs),
                    }
                    skipped = {"left_out": 1} if completion.finish_reason == "error" else {}
                    journal.commit({completion.position: row(completion)}, tokens | skipped)
                    now.add(**tokens)
                    bar.advance()
        finally:
            sampler.close()
    seconds = time.perf_counter() - start
    total = before + now
    timing: dict[str, float] = {
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
    }
    if num_skipped := journal.counts().get("left_out"):
        timing["left_out"] = num_skipped
    if (cost := total.cost(prices)) is not None:
        timing["cost"] = cost
    if requests:
        timing |= {"sampled_answers": now.answers, "tokens_per_second": now.completion_tokens / seconds}
    return timing


def journal_usage(journal: Journal) -> Usage:
    """Return the tokens that the journal's items have used."""
    counts = journal.counts()
    return Usage(counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0))


def _status(total: Usage, now: Usage, seconds: float, prices: Prices | None, sampler: str) -> str:
    rates = f"{now.prompt_tokens / seconds:,.0f} tokens/s in, {now.completion_tokens / seconds:,.0f} out"
    cost = total.cost(prices)
    return ", ".join(filter(None, [rates, "" if cost is None else f"cost {cost:,.2f}", sampler]))


def token_columns(completion: Completion) -> dict[str, Any]:
    """Return the columns of a rollout that hold its tokens; what the source did not report is null."""
    has_logprobs = len(completion.logprobs) > 0 or not completion.text
    return {
        "token_ids": completion.token_ids if len(completion.token_ids) else None,
        "logprobs": completion.logprobs if has_logprobs else None,
        "token_bytes": completion.token_bytes if has_logprobs else None,
    }
