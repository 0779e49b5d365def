"""The loop that sample, mix and evaluate share: sample whatever a journal does not contain yet.

Input: a journal, and functions that turn a position of its plan into a request and a completion into a row.
Invariants: every answer that has arrived is committed together with its token counts, even if an error or Ctrl-C ends
the loop; nothing is committed that a sampler returned out of shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dasd_lite.config.models import Prices
from dasd_lite.console import progress
from dasd_lite.data.journal import Journal
from dasd_lite.data.usage import Usage
from dasd_lite.errors import DataError
from dasd_lite.inference import Completion, Request, Sampler, SamplingParams
from dasd_lite.inference.custom import array_problem, describe, logprob_problem, sampler_name


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

    Raises:
        DataError: The sampler returned something that is no completion of its requests, or too few.
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
                for completion in _completions(sampler, requests, params):
                    tokens = {
                        "prompt_tokens": completion.prompt_tokens,
                        "completion_tokens": completion.completion_tokens or len(completion.logprobs),
                    }
                    skipped = {"skipped": 1} if completion.finish_reason == "error" else {}
                    journal.commit({completion.position: row(completion)}, tokens | skipped)
                    now.add(**tokens)
                    bar.advance()
        finally:
            sampler.close()
    seconds = time.perf_counter() - start
    timing = totals(journal, prices)
    if requests:
        timing |= {
            "sampled_answers": now.answers,
            "sampled_tokens": now.completion_tokens,
            "tokens_per_second": now.completion_tokens / seconds,
        }
    return timing


def totals(journal: Journal, prices: Prices | None) -> dict[str, float]:
    """Return the tokens and the cost of all answers that a journal has counted, and how many were left out."""
    used = journal_usage(journal)
    timing: dict[str, float] = {"prompt_tokens": used.prompt_tokens, "completion_tokens": used.completion_tokens}
    if num_skipped := journal.counts().get("skipped"):
        timing["skipped"] = num_skipped
    if (cost := used.cost(prices)) is not None:
        timing["cost"] = cost
    return timing


def _completions(sampler: Sampler, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
    """Yield the completion of every request, checked."""
    name = sampler_name(sampler)
    waiting = {request.position: request for request in requests}
    completions = sampler.complete(requests, params)
    if not isinstance(completions, Iterable):
        raise DataError(f"{name}.complete returned {describe(completions)}, not an iterator of completions")
    for completion in completions:
        if not isinstance(completion, Completion):
            raise DataError(f"{name} returned {describe(completion)}, not a Completion")
        request = waiting.pop(completion.position, None) if isinstance(completion.position, int) else None
        if request is None:
            expected = f"one of {len(waiting)} open positions, such as {min(waiting)}" if waiting else "no more"
            raise DataError(
                f"{name} returned a completion for position {completion.position!r}, which was not requested or is"
                f" already complete; expected {expected}"
            )
        if problem := _problem(completion, request):
            raise DataError(f"{name}, completion {completion.position}: {problem}")
        yield completion
    if waiting:
        raise DataError(
            f"{name} returned {len(requests) - len(waiting)} completions for {len(requests)} requests; position"
            f" {min(waiting)} is missing"
        )


def _problem(completion: Completion, request: Request) -> str:
    """Return what is wrong with a completion, or ""."""
    for name in ("text", "finish_reason"):
        if not isinstance(value := getattr(completion, name), str):
            return f"{name} is a {type(value).__name__}, not a str"
    for name in ("prompt_tokens", "completion_tokens"):
        value = getattr(completion, name)
        if not isinstance(value, int) or value < 0:
            return f"{name} is {value!r}, not a count"
    for name, dtype in (("token_ids", np.int32), ("logprobs", np.float32), ("token_bytes", np.int32)):
        if problem := array_problem(name, getattr(completion, name), dtype):
            return problem
    try:
        text = completion.text.encode()
    except UnicodeEncodeError as error:
        return f"text cannot be written as UTF-8: {error.reason} at character {error.start}"
    ids, logprobs, token_bytes = completion.token_ids, completion.logprobs, completion.token_bytes
    if len(logprobs) != len(token_bytes) or len(ids) not in (0, len(logprobs)):
        return (
            f"{len(ids)} token_ids, {len(logprobs)} logprobs and {len(token_bytes)} token_bytes; they must be of equal"
            " length (token_ids may be empty)"
        )
    if not len(logprobs):
        return ""
    if problem := logprob_problem(logprobs):
        return problem
    before = len(text) - int(token_bytes.sum(dtype=np.int64))
    by_template = before > 0 and not request.prefix and text[:before].strip() in (b"", b"<think>")
    if token_bytes.min() < 0 or not (before == 0 or by_template):
        return (
            f"token_bytes sum to {len(text) - before}, the text has {len(text)} bytes; they must be equal, apart from a"
            " <think> that the template wrote"
        )
    return ""


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
        "num_tokens": completion.completion_tokens or len(completion.logprobs) or None,
    }
