"""A model behind OpenAI-compatible servers, with many requests in flight over HTTP.

Input: requests; each becomes one call, by token ids or through chat (requests.py). Invariants: every request is done
once; log-probabilities and bytes are the server's own, and missing values are never filled in. Transient failures are
retried (client.py, dispatch.py); the first permanent failure, or the end of the budget, ends the run after the answers
in flight were delivered.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import TokenIds
from dasd_lite.config.models import Endpoint
from dasd_lite.console import note
from dasd_lite.data.hub import model_folder
from dasd_lite.data.usage import Usage
from dasd_lite.errors import ConfigError, EndpointError
from dasd_lite.inference import Completion, Request, SamplingParams, TokenScores
from dasd_lite.inference.endpoint.client import (
    Client,
    RequestRejected,
    Server,
    TransientError,
    backoff,
    trusted_certificates,
)
from dasd_lite.inference.endpoint.continuation import find_continuation
from dasd_lite.inference.endpoint.dispatch import Dispatch, QueuedRequest, Result
from dasd_lite.inference.endpoint.replies import Reply, TokenCounts, check_logprobs
from dasd_lite.inference.endpoint.requests import Continuation, RequestBuilder

_ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/[^\s?#]*)?")


def api_key(config: Endpoint) -> str:
    """Return the key from the environment, or ""; raises ConfigError for an invalid address or key."""
    for url in config.base_urls:
        match = _ADDRESS.fullmatch(url)
        if not match or int((match[2] or ":1")[1:]) > 65535:
            raise ConfigError(f"base_urls: {url!r} is not an address; write one like http://localhost:8000/v1")
    key = os.environ.get(config.api_key_env, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(
            f"api_key_env: the variable {config.api_key_env} contains spaces, line breaks or other characters that are"
            " not part of a key"
        )
    return key


def served_context(config: Endpoint) -> int | None:
    """Return the longest prompt plus completion in tokens that all servers accept; None if they do not report it."""

    async def describe() -> list[Server]:
        client = Client(config, api_key(config), trusted_certificates())
        servers = [Server(url) for url in config.base_urls]
        try:
            await _describe(client, servers)
        finally:
            await client.close()
        return servers

    return min((s.context for s in asyncio.run(describe()) if s.context is not None), default=None)


class EndpointSampler:
    """A model behind one or more servers."""

    def __init__(self, config: Endpoint, used: Usage | None = None) -> None:
        """Check addresses, key and tokenizer; nothing is sent yet.

        Args:
            config: The model and its servers.
            used: Tokens used so far, which count against the budget.

        Raises:
            ConfigError: An address, the key or the tokenizer is invalid.
        """
        self._config, self._key = config, api_key(config)
        self._used = used or Usage()
        self.chat = Chat(model_folder(config.tokenizer)) if config.tokenizer else None
        self._dispatch: Dispatch[Any, Any] | None = None

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once; completions come as they finish.

        Raises:
            EndpointError: A server rejects requests, cannot be reached, or replies without what the method needs; or
                the budget is used up.
            DataError: A prompt leaves no room for an answer; raised before anything is sampled.
        """
        builder = RequestBuilder(self._config, self.chat)
        skipped: list[int] = []

        async def prepare(client: Client, servers: list[Server]) -> None:
            await _describe(client, servers)
            if self.chat is None and any(request.prefix for request in requests):
                builder.continuation = await _continuation(client, servers)
            if self.chat is not None and not all(server.is_vllm for server in servers):
                builder.prompt_as_text = not await _accepts_ids(client, servers[0], builder)
            if any(server.context is not None for server in servers) and self.chat is not None:
                for request in requests:
                    builder.body(request, params, min(servers, key=lambda s: s.context or 1 << 62))

        async def send(client: Client, server: Server, request: Request) -> tuple[Reply, Completion]:
            source = f"{server.base_url}{builder.path}: {self._config.model!r}"
            reply = Reply(choices=[], usage=TokenCounts(0, 0))
            try:
                reply = await client.post(server, builder.path, builder.body(request, params, server))
                return reply, builder.completion(request, reply, source)
            except EndpointError as error:
                can_skip = reply.choices or isinstance(error, RequestRejected)
                if len(skipped) >= self._config.max_skipped or not can_skip:
                    raise
                skipped.append(request.position)
                note(f"skipped a question ({len(skipped)} of {self._config.max_skipped}): {error}")
                return reply, _empty(request, reply)

        yield from self._run(requests, prepare, send)

    def score(self, sequences: Iterable[tuple[int, TokenIds]]) -> Iterator[TokenScores]:
        """Score given sequences, in any order: servers echo a prompt with its log-probabilities (`echo`).

        Args:
            sequences: Position, which is returned with the scores, and token ids [T].

        Yields:
            Position; log-probabilities float32 [T], NaN for the first token; None, as servers report no strict ranks.

        Raises:
            EndpointError: A server does not echo log-probabilities, or as `complete` does.
        """
        if self.chat is None:
            raise EndpointError(
                f"{self._config.base_urls[0]}: servers score given answers by token ids; set teacher.tokenizer"
            )

        async def send(client: Client, server: Server, job: tuple[int, TokenIds]) -> tuple[Reply, TokenScores]:
            position, ids = job
            source = f"{server.base_url}/completions: {self._config.model!r}"
            room = 0 if server.context == len(ids) else 1  # 1 if it fits, because not every server accepts 0
            body = {"prompt": ids.tolist(), "echo": True, "max_tokens": room, "logprobs": 1, "temperature": 0.0}
            reply = await client.post(server, "/completions", {"model": self._config.model, **body})
            reported = reply.choices[0].logprobs
            values = (reported and reported.token_logprobs) or []
            if len(values) < len(ids) or values[0] is not None:
                raise EndpointError(
                    f"{source} does not echo the prompt's log-probabilities ({len(values)} for {len(ids)} tokens);"
                    " score.by = 'teacher' needs a server that does (vLLM), or the teacher on this machine"
                )
            if reply.usage is not None and reply.usage.prompt_tokens not in (None, len(ids)):
                raise EndpointError(f"{source} counts {reply.usage.prompt_tokens} tokens, but {len(ids)} were sent")
            logprobs = check_logprobs(values[1 : len(ids)], source, expected=len(ids) > 1)
            return reply, (position, np.concatenate([np.full(1, np.nan, np.float32), logprobs]), None)

        yield from self._run(sequences, _describe, send)

    def _run(
        self,
        jobs: Iterable[QueuedRequest],
        prepare: Callable[[Client, list[Server]], Awaitable[None]],
        send: Callable[[Client, Server, QueuedRequest], Awaitable[tuple[Reply, Result]]],
    ) -> Iterator[Result]:
        waiting = iter(jobs)
        if (first := next(waiting, None)) is None:
            return  # without a request to any server
        dispatch = Dispatch(self._config, self._key, chain([first], waiting), prepare, send, self._used)
        self._dispatch = dispatch
        yield from dispatch.results()

    def status(self) -> str:
        """Return how many requests were retried, and the state of each server."""
        return self._dispatch.status() if self._dispatch else ""

    def close(self) -> None:
        """Do nothing: connections are closed at the end of `complete`."""


def _empty(request: Request, reply: Reply) -> Completion:
    """Return an empty answer in place of one that a server rejects; select rejects it as unfinished."""
    usage = reply.usage or TokenCounts()
    return Completion(
        request.position,
        "",
        finish_reason="error",
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
    )


async def _describe(client: Client, servers: list[Server]) -> None:
    await asyncio.gather(*(client.describe(server) for server in servers))


async def _continuation(client: Client, servers: list[Server]) -> Continuation:
    """Return how these servers of one model continue a given answer; some of them may be down."""
    for server in servers[:-1]:
        with suppress(EndpointError):
            return await find_continuation(client, server)
    return await find_continuation(client, servers[-1])


async def _accepts_ids(client: Client, server: Server, builder: RequestBuilder) -> bool:
    """Return whether the server accepts token ids as a prompt; raises EndpointError if it completes no prompt."""
    request = Request(0, ({"role": "user", "content": "Hi"},), 1, seed=0)
    for attempt in range(3):
        try:
            await client.post(server, builder.path, builder.body(request, SamplingParams(), server))
            return True
        except RequestRejected:
            return False
        except TransientError:
            await asyncio.sleep(backoff(attempt + 1))
    return True  # it has other problems, which the run will report
