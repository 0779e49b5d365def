"""Models behind OpenAI-compatible servers, asked many at a time over HTTP.

Input: requests; each becomes one call, by token ids or through chat (dialect.py). Invariants: every
request is done once; log-probabilities and bytes are the server's own, nothing is filled in. What can
pass is tried again (servers.py); the first failure that cannot, or the end of the budget, ends the
run after what the servers are still writing was delivered.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import queue
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from dasd_lite.chat import Chat, Ids, model_folder
from dasd_lite.config import EndpointModel
from dasd_lite.errors import ConfigError, DasdError, EndpointError
from dasd_lite.sampler import Completion, Request, SamplingParams, Tally
from dasd_lite.sampler.continuation import find_continuation
from dasd_lite.sampler.dialect import Continuation, Dialect
from dasd_lite.sampler.replies import Reply, checked
from dasd_lite.sampler.servers import Caller, Passing, Server, backoff, trusted

_POLL_S = 0.1  # how soon a worker without work looks again
_FAULTS = 8  # in a row, after which a server is left alone for a while
_ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/[^\s?#]*)?")

Job = TypeVar("Job")
Result = TypeVar("Result")
Scores = tuple[int, npt.NDArray[np.float32], None]


def api_key(config: EndpointModel) -> str:
    """Return the key from the environment, or ""; raises ConfigError for what is no address or no key."""
    for url in config.base_urls:
        if not _ADDRESS.fullmatch(url):
            raise ConfigError(f"base_urls: {url!r} is no address; one looks like http://localhost:8000/v1")
    key = os.environ.get(config.api_key_env, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(f"api_key_env: the variable {config.api_key_env} holds characters that no key has")
    return key


class EndpointSampler:
    """A model behind one or more servers."""

    def __init__(self, config: EndpointModel, spent: Tally | None = None) -> None:
        """Take the servers' addresses and the key; nothing is sent yet. `spent` counts against the budget.

        Raises ConfigError for what is no address, no key, or no tokenizer.
        """
        self._config, self._key = config, api_key(config)
        self._spent = spent or Tally()
        self.chat = Chat(model_folder(config.tokenizer)) if config.tokenizer else None
        self._run: _Run[Any, Any] | None = None

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once; completions come as they finish.

        Raises EndpointError when a server refuses, stays away, or answers without what the method needs, and when the
        budget ends; DataError before anything is sampled when a prompt leaves no room for an answer.
        """
        dialect = Dialect(self._config, self.chat)

        async def prepare(caller: Caller, servers: list[Server]) -> None:
            await _describe(caller, servers)
            if self.chat is None and any(request.prefix for request in requests):
                dialect.continuation = await _continuation(caller, servers)
            if self.chat is not None and not all(server.is_vllm for server in servers):
                dialect.prompt_as_text = not await _takes_ids(caller, servers[0], dialect)
            if any(server.context is not None for server in servers) and self.chat is not None:
                for request in requests:
                    dialect.body(request, params, min(servers, key=lambda s: s.context or 1 << 62))

        async def ask(caller: Caller, server: Server, request: Request) -> tuple[Reply, Completion]:
            reply = await caller.post(server, dialect.path, dialect.body(request, params, server))
            return reply, dialect.read(request, reply, f"{server.base_url}{dialect.path}: {self._config.model!r}")

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

        async def ask(caller: Caller, server: Server, job: tuple[int, Ids]) -> tuple[Reply, Scores]:
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
            logprobs = checked(values[1 : len(job[1])], source, expected=len(job[1]) > 1)
            return reply, (job[0], np.concatenate([np.full(1, np.nan, np.float32), logprobs]), None)

        yield from self._all(sequences, _describe, ask)

    def _all(
        self,
        jobs: Iterable[Job],
        prepare: Callable[[Caller, list[Server]], Awaitable[None]],
        ask: Callable[[Caller, Server, Job], Awaitable[tuple[Reply, Result]]],
    ) -> Iterator[Result]:
        waiting = iter(jobs)
        if (first := next(waiting, None)) is None:
            return  # and nobody is asked anything
        run = self._run = _Run(self._config, self._key, chain([first], waiting), prepare, ask, self._spent)
        yield from run.results()

    def status(self) -> str:
        """Say in a few words what the servers do: requests tried again, and each server's state."""
        return self._run.status() if self._run else ""

    def close(self) -> None:
        """Do nothing: connections live no longer than an iterator of `complete`."""


async def _describe(caller: Caller, servers: list[Server]) -> None:
    await asyncio.gather(*(caller.describe(server) for server in servers))


async def _continuation(caller: Caller, servers: list[Server]) -> Continuation:
    """Return how these servers of one model continue a given answer; one of them may be dead."""
    for server in servers[:-1]:
        with suppress(EndpointError):
            return await find_continuation(caller, server)
    return await find_continuation(caller, servers[-1])


async def _takes_ids(caller: Caller, server: Server, dialect: Dialect) -> bool:
    """Tell whether the server takes token ids as a prompt; raises EndpointError when it completes none at all."""
    request = Request(0, ({"role": "user", "content": "Hi"},), 1, seed=0)
    for attempt in range(3):
        try:
            await caller.post(server, dialect.path, dialect.body(request, SamplingParams(), server))
            return True
        except EndpointError as error:
            if ": 400 " not in str(error) and ": 422 " not in str(error):
                raise
            return False
        except Passing:
            await asyncio.sleep(backoff(attempt + 1))
    return True  # it has other troubles, which the run will tell


@dataclass(order=True)
class _Retry(Generic[Job]):
    ready: float
    order: int
    job: Job
    failures: int


class _Run(Generic[Job, Result]):
    """One call: an event loop in a thread, `concurrency` workers per server, one queue of jobs.

    Any free worker takes the next job, so the least busy server is asked, and a slow one gets fewer.
    """

    def __init__(
        self,
        config: EndpointModel,
        key: str,
        jobs: Iterable[Job],
        prepare: Callable[[Caller, list[Server]], Awaitable[None]],
        ask: Callable[[Caller, Server, Job], Awaitable[tuple[Reply, Result]]],
        spent: Tally,
    ) -> None:
        self._config, self._key, self._prepare, self._ask, self._spent = config, key, prepare, ask, spent
        self._servers = [Server(url) for url in config.base_urls]
        self._fresh = enumerate(jobs)
        self._retries: list[_Retry[Job]] = []
        self._taken = self._delivered = self._tried_again = 0
        self._drained = False  # no fresh jobs are left
        self._here = Tally()  # of this run alone
        self._finished: queue.SimpleQueue[Result | _End] = queue.SimpleQueue()
        self._started = threading.Event()
        self._task: asyncio.Task[None] | None = None
        self._error: DasdError | None = None
        self._answers_as: str | None = None

    def results(self) -> Iterator[Result]:
        """Yield results as they finish, then raise what ended the run early."""
        thread = threading.Thread(target=self._serve, name="endpoint", daemon=True)
        thread.start()
        try:
            while not isinstance(item := self._finished.get(), _End):
                yield item
                # Asked for the next one, the consumer has stored this one: only now may another request be in hand, so
                # that a kill loses no more of them than `concurrency`.
                with suppress(RuntimeError):  # the loop has ended by itself
                    self._loop.call_soon_threadsafe(self._permits.release)
            if item.error is not None:
                raise item.error
        finally:
            self._started.wait()
            if self._task is not None:
                with suppress(RuntimeError):  # the loop has ended by itself
                    self._task.get_loop().call_soon_threadsafe(self._task.cancel)
            thread.join()

    def status(self) -> str:
        """Say how many requests were sent again, and how each server is."""
        now = time.monotonic()
        return ", ".join([f"{self._tried_again} tried again", *(server.state(now) for server in self._servers)])

    def _serve(self) -> None:
        end: BaseException | None = None
        try:
            asyncio.run(self._work_all())
        except (Exception, asyncio.CancelledError) as error:  # handed to the thread that asked
            end = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
        finally:
            self._finished.put(_End(end))
            self._started.set()

    async def _work_all(self) -> None:
        self._over, self._task, self._loop = asyncio.Event(), asyncio.current_task(), asyncio.get_running_loop()
        self._permits = asyncio.Semaphore(self._config.concurrency * len(self._servers))
        self._started.set()
        trust = trusted()
        caller = Caller(self._config, self._key, trust)
        try:
            await self._prepare(caller, self._servers)
        finally:
            await caller.close()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._config.concurrency):
                for server in self._servers:  # in turn, so that few requests spread over all
                    group.create_task(self._work(Caller(self._config, self._key, trust), server))
        if self._error is not None:
            raise self._error

    async def _work(self, caller: Caller, server: Server) -> None:
        try:
            while (job := await self._next(server)) is not None:
                server.busy += 1
                try:
                    await self._do(caller, server, job)
                finally:
                    server.busy -= 1
        finally:
            await caller.close()

    async def _do(self, caller: Caller, server: Server, job: _Retry[Job]) -> None:
        try:
            reply, result = await self._ask(caller, server, job.job)
            self._account(reply, server)
        except Passing as failure:
            self._put_back(job, server, failure)
            self._permits.release()
        except DasdError as error:
            self._end(error)
        else:
            server.rests = server.faults = 0
            server.done += 1
            self._finished.put(result)
            self._delivered += 1
            if self._drained and self._delivered == self._taken:
                self._finish()

    async def _next(self, server: Server) -> _Retry[Job] | None:
        """Wait for a job that `server` may be asked now; none when the run is over."""
        await self._permits.acquire()
        while not self._over.is_set():
            now = time.monotonic()
            if now < server.rests_until:  # its workers come back one by one, not all at once
                await self._pause((server.rests_until - now) * random.uniform(1.0, 1.25))
            elif reason := self._over_budget():
                self._end(EndpointError(reason))
            elif self._retries and self._retries[0].ready <= now:
                return heapq.heappop(self._retries)
            elif (fresh := next(self._fresh, None)) is not None:
                self._taken += 1
                return _Retry(now, fresh[0], fresh[1], failures=0)
            else:
                self._drained = True
                if self._delivered == self._taken:
                    self._finish()
                await self._pause(_POLL_S)
        return None

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)

    def _put_back(self, job: _Retry[Job], server: Server, failure: Passing) -> None:
        """Let `job` be tried again, later, by whichever server is free; end the run when that is hopeless."""
        now = time.monotonic()
        server.reason = str(failure)
        self._tried_again += 1
        if failure.unreachable:  # no fault of the request, so it does not count against it
            server.rest(now)
            if all(s.rests > self._config.max_retries for s in self._servers):
                reasons = "; ".join(f"{s.base_url}: {s.reason}" for s in self._servers)
                self._end(EndpointError(f"no server can be reached, tried {server.rests} times: {reasons}"))
        else:
            job.failures += 1
            job.ready = now + backoff(job.failures)
            server.faults += 1
            if failure.wait_s is not None:
                server.rests_until = max(server.rests_until, now + failure.wait_s)
            elif server.faults >= _FAULTS:  # else one that fails at once would draw all requests to itself
                server.rest(now)
            if job.failures > self._config.max_retries:
                self._end(EndpointError(f"{server.base_url}: {failure}; tried {job.failures} times"))
        heapq.heappush(self._retries, job)

    def _account(self, reply: Reply, server: Server) -> None:
        """Count what a reply cost, and hold the model's name in it against those before."""
        if reply.model and self._answers_as not in (None, reply.model):
            raise EndpointError(
                f"{server.base_url}: answers as {reply.model!r}, earlier replies came from {self._answers_as!r};"
                " one run has one teacher"
            )
        self._answers_as = reply.model or self._answers_as
        budget = self._config.budget
        if reply.usage is not None:
            self._spent.add(reply.usage.prompt_tokens, reply.usage.completion_tokens)
            self._here.add(reply.usage.prompt_tokens, reply.usage.completion_tokens)
        elif budget.max_tokens is not None or budget.max_cost is not None:
            raise EndpointError(
                f"{server.base_url}: its replies do not tell `usage`, so no budget can be held: leave it out"
            )

    def _over_budget(self) -> str:
        """Say which limit is reached, requests in flight counted as what one has cost so far."""
        budget, spent = self._config.budget, self._spent
        if budget.max_tokens is None and budget.max_cost is None:
            return ""
        # What is in flight will cost about what those before it did, and so will one more.
        ahead = 1 + sum(server.busy for server in self._servers)
        mean = ahead / self._here.answers if self._here.answers else 0.0
        expected = Tally(
            spent.prompt_tokens + round(mean * self._here.prompt_tokens),
            spent.completion_tokens + round(mean * self._here.completion_tokens),
        )
        remedy = "raise it and run the same command to go on; what is done is kept"
        if budget.max_tokens is not None and expected.tokens > budget.max_tokens:
            return f"teacher.budget.max_tokens = {budget.max_tokens:,}: {spent.tokens:,} are used; {remedy}"
        cost, expected_cost = spent.cost(self._config.prices), expected.cost(self._config.prices)
        if budget.max_cost is not None and expected_cost is not None and expected_cost > budget.max_cost:
            return f"teacher.budget.max_cost = {budget.max_cost:g}: {cost:.4g} is spent; {remedy}"
        return ""

    def _end(self, error: DasdError) -> None:
        self._error = self._error or error
        self._finish()

    def _finish(self) -> None:
        self._over.set()
        for _ in range(self._config.concurrency * len(self._servers)):  # wake who waits for a permit
            self._permits.release()


@dataclass(frozen=True)
class _End:
    error: BaseException | None
