"""Models behind OpenAI-compatible servers, asked many at a time over HTTP.

Input: requests; each becomes one call, by token ids or through chat (dialect.py). Invariants: every
request is done once; log-probabilities and bytes are the server's own, nothing is filled in. What can
pass is tried again (servers.py); the first failure that cannot, or the end of the budget, ends the
run after what the servers are still writing was delivered.
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
import numpy.typing as npt

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import Ids
from dasd_lite.config.models import EndpointModel
from dasd_lite.console import err
from dasd_lite.data.hub import model_folder
from dasd_lite.data.usage import Usage
from dasd_lite.errors import ConfigError, EndpointError
from dasd_lite.inference import Completion, Request, SamplingParams
from dasd_lite.inference.endpoint.client import Client, RequestRejected, Server, TransientError, backoff, trusted
from dasd_lite.inference.endpoint.continuation import find_continuation
from dasd_lite.inference.endpoint.dispatch import Dispatch, Job, Result
from dasd_lite.inference.endpoint.replies import Reply, TokenCounts, checked
from dasd_lite.inference.endpoint.requests import Continuation, RequestBuilder

_ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/[^\s?#]*)?")

Scores = tuple[int, npt.NDArray[np.float32], None]


def api_key(config: EndpointModel) -> str:
    """Return the key from the environment, or ""; raises ConfigError for what is no address or no key."""
    for url in config.base_urls:
        found = _ADDRESS.fullmatch(url)
        if not found or int((found[2] or ":1")[1:]) > 65535:
            raise ConfigError(f"base_urls: {url!r} is no address; one looks like http://localhost:8000/v1")
    key = os.environ.get(config.api_key_env, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(f"api_key_env: the variable {config.api_key_env} holds characters that no key has")
    return key


def served_context(config: EndpointModel) -> int | None:
    """Ask the servers for the longest prompt plus completion that all of them take; none where they do not say."""

    async def asked() -> list[Server]:
        caller, servers = Client(config, api_key(config), trusted()), [Server(url) for url in config.base_urls]
        try:
            await _describe(caller, servers)
        finally:
            await caller.close()
        return servers

    return min((s.context for s in asyncio.run(asked()) if s.context is not None), default=None)


class EndpointSampler:
    """A model behind one or more servers."""

    def __init__(self, config: EndpointModel, spent: Usage | None = None) -> None:
        """Take the servers' addresses and the key; nothing is sent yet. `spent` counts against the budget.

        Raises ConfigError for what is no address, no key, or no tokenizer.
        """
        self._config, self._key = config, api_key(config)
        self._spent = spent or Usage()
        self.chat = Chat(model_folder(config.tokenizer)) if config.tokenizer else None
        self._run: Dispatch[Any, Any] | None = None

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once; completions come as they finish.

        Raises EndpointError when a server refuses, stays away, or answers without what the method needs, and when the
        budget ends; DataError before anything is sampled when a prompt leaves no room for an answer.
        """
        dialect = RequestBuilder(self._config, self.chat)
        failed: list[int] = []

        async def prepare(caller: Client, servers: list[Server]) -> None:
            await _describe(caller, servers)
            if self.chat is None and any(request.prefix for request in requests):
                dialect.continuation = await _continuation(caller, servers)
            if self.chat is not None and not all(server.is_vllm for server in servers):
                dialect.prompt_as_text = not await _takes_ids(caller, servers[0], dialect)
            if any(server.context is not None for server in servers) and self.chat is not None:
                for request in requests:
                    dialect.body(request, params, min(servers, key=lambda s: s.context or 1 << 62))

        async def ask(caller: Client, server: Server, request: Request) -> tuple[Reply, Completion]:
            reply = Reply(choices=[], usage=TokenCounts(0, 0))
            try:
                reply = await caller.post(server, dialect.path, dialect.body(request, params, server))
                return reply, dialect.read(request, reply, f"{server.base_url}{dialect.path}: {self._config.model!r}")
            except EndpointError as error:
                if len(failed) >= self._config.max_skipped or not (reply.choices or isinstance(error, RequestRejected)):
                    raise
                failed.append(request.position)
                err().print(f"left out ({len(failed)} of {self._config.max_skipped}): {error}", markup=False)
                return reply, _nothing(request, reply)

        yield from self._all(requests, prepare, ask)

    def score(self, sequences: Iterable[tuple[int, Ids]]) -> Iterator[Scores]:
        """Return the log-probability of each token [T] of given sequences, NaN for the first, in any order.

        Servers read a prompt and echo it with log-probabilities (`echo`). They do not tell strict ranks.
        Raises EndpointError where a server cannot.
        """
        if self.chat is None:
            raise EndpointError(
                f"{self._config.base_urls[0]}: reading given answers works by token ids; set teacher.tokenizer"
            )

        async def ask(caller: Client, server: Server, job: tuple[int, Ids]) -> tuple[Reply, Scores]:
            source = f"{server.base_url}/completions: {self._config.model!r}"
            room = 0 if server.context == len(job[1]) else 1  # 1 where it fits, for not every server takes 0
            body = {"prompt": job[1].tolist(), "echo": True, "max_tokens": room, "logprobs": 1, "temperature": 0.0}
            reply = await caller.post(server, "/completions", {"model": self._config.model, **body})
            found = reply.choices[0].logprobs
            values = (found and found.token_logprobs) or []
            if len(values) < len(job[1]) or values[0] is not None:
                raise EndpointError(
                    f"{source} does not echo the prompt's log-probabilities ({len(values)} for {len(job[1])} tokens);"
                    " score.by = 'teacher' needs a server that does (vLLM), or the teacher here"
                )
            if reply.usage is not None and reply.usage.prompt_tokens not in (None, len(job[1])):
                raise EndpointError(f"{source} has read {reply.usage.prompt_tokens} tokens of {len(job[1])}")
            logprobs = checked(values[1 : len(job[1])], source, expected=len(job[1]) > 1)
            return reply, (job[0], np.concatenate([np.full(1, np.nan, np.float32), logprobs]), None)

        yield from self._all(sequences, _describe, ask)

    def _all(
        self,
        jobs: Iterable[Job],
        prepare: Callable[[Client, list[Server]], Awaitable[None]],
        ask: Callable[[Client, Server, Job], Awaitable[tuple[Reply, Result]]],
    ) -> Iterator[Result]:
        waiting = iter(jobs)
        if (first := next(waiting, None)) is None:
            return  # and nobody is asked anything
        run = self._run = Dispatch(self._config, self._key, chain([first], waiting), prepare, ask, self._spent)
        yield from run.results()

    def status(self) -> str:
        """Say in a few words what the servers do: requests tried again, and each server's state."""
        return self._run.status() if self._run else ""

    def close(self) -> None:
        """Do nothing: connections live no longer than an iterator of `complete`."""


def _nothing(request: Request, reply: Reply) -> Completion:
    """Return an empty answer in place of one that a server refuses; select rejects it as unfinished."""
    none, usage = np.zeros(0, np.int32), reply.usage or TokenCounts()
    tokens = (usage.prompt_tokens or 0, usage.completion_tokens or 0)
    return Completion(request.position, "", none, none.astype(np.float32), none, "error", *tokens)


async def _describe(caller: Client, servers: list[Server]) -> None:
    await asyncio.gather(*(caller.describe(server) for server in servers))


async def _continuation(caller: Client, servers: list[Server]) -> Continuation:
    """Return how these servers of one model continue a given answer; one of them may be dead."""
    for server in servers[:-1]:
        with suppress(EndpointError):
            return await find_continuation(caller, server)
    return await find_continuation(caller, servers[-1])


async def _takes_ids(caller: Client, server: Server, dialect: RequestBuilder) -> bool:
    """Tell whether the server takes token ids as a prompt; raises EndpointError when it completes none at all."""
    request = Request(0, ({"role": "user", "content": "Hi"},), 1, seed=0)
    for attempt in range(3):
        try:
            await caller.post(server, dialect.path, dialect.body(request, SamplingParams(), server))
            return True
        except RequestRejected:
            return False
        except TransientError:
            await asyncio.sleep(backoff(attempt + 1))
    return True  # it has other troubles, which the run will tell
