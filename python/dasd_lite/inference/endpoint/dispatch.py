"""Many requests to several servers at once: which server gets the next one, what is retried, and when it ends.

Input: jobs, and a function that sends one to a server. Output: results as they finish. Invariants: every job is done
once; at most `concurrency` jobs per server are unfinished, counting results that the consumer has not stored yet; the
first permanent failure, or the end of the budget, ends the run after everything in flight was delivered.
"""

from __future__ import annotations

import asyncio
import heapq
import queue
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from dasd_lite.config.models import Endpoint
from dasd_lite.data.usage import Usage
from dasd_lite.errors import DasdError, EndpointError
from dasd_lite.inference.endpoint.client import Client, Server, TransientError, backoff, trusted_certificates
from dasd_lite.inference.endpoint.replies import Reply

POLL_S = 0.1  # how soon an idle worker checks for work again
_MAX_FAULTS = 8  # consecutive ones, after which a server gets a pause

QueuedRequest = TypeVar("QueuedRequest")
Result = TypeVar("Result")


@dataclass(order=True)
class _Attempt(Generic[QueuedRequest]):
    """A job waiting for its next attempt."""

    not_before: float
    order: int
    job: QueuedRequest
    failures: int = 0
    tries: int = 0


class Dispatch(Generic[QueuedRequest, Result]):
    """One run: an event loop in a thread, `concurrency` workers per server, one queue of jobs.

    Any free worker takes the next job, so the least busy server gets it, and a slow server gets fewer.
    """

    def __init__(
        self,
        config: Endpoint,
        key: str,
        jobs: Iterable[QueuedRequest],
        prepare: Callable[[Client, list[Server]], Awaitable[None]],
        send: Callable[[Client, Server, QueuedRequest], Awaitable[tuple[Reply, Result]]],
        used: Usage,
    ) -> None:
        """Prepare a run; nothing is sent before the first of `results` is requested.

        Args:
            config: Servers, limits and budget.
            key: API key, or "".
            jobs: The work.
            prepare: Called once before the first job.
            send: Sends one job to a server and returns the reply and the result made of it.
            used: Tokens used so far; this run adds its own.
        """
        self._config, self._key, self._prepare, self._send, self._used = config, key, prepare, send, used
        self._servers = [Server(url) for url in config.base_urls]
        self._new_jobs = enumerate(jobs)
        self._retries: list[_Attempt[QueuedRequest]] = []  # a heap
        self._num_started = self._num_delivered = self._num_retried = 0
        self._no_new_jobs = False
        self._used_now = Usage()  # by this run alone
        self._results: queue.SimpleQueue[Result | _End] = queue.SimpleQueue()
        self._started = threading.Event()
        self._task: asyncio.Task[None] | None = None
        self._error: DasdError | None = None
        self._reply_model: str | None = None

    def results(self) -> Iterator[Result]:
        """Yield results as they finish, then raise the error that ended the run early, if any."""
        thread = threading.Thread(target=self._serve, name="endpoint", daemon=True)
        thread.start()
        try:
            while not isinstance(item := self._results.get(), _End):
                yield item
                # The consumer asks for the next result, so it has stored this one. Only now may another request start:
                # a kill loses at most `concurrency` answers.
                with suppress(RuntimeError):  # the loop has already ended
                    self._loop.call_soon_threadsafe(self._permits.release)
            if item.error is not None:
                raise item.error
        finally:
            self._started.wait()
            if self._task is not None:
                with suppress(RuntimeError):  # the loop has already ended
                    self._task.get_loop().call_soon_threadsafe(self._task.cancel)
            thread.join()

    def status(self) -> str:
        """Return how many requests were retried, and the state of each server."""
        now = time.monotonic()
        return ", ".join([f"{self._num_retried} retried", *(server.state(now) for server in self._servers)])

    def _serve(self) -> None:
        end: BaseException | None = None
        try:
            asyncio.run(self._work_all())
        except (Exception, asyncio.CancelledError) as error:  # raised in the consumer's thread
            end = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
        finally:
            self._results.put(_End(end))
            self._started.set()

    async def _work_all(self) -> None:
        self._stop, self._task, self._loop = asyncio.Event(), asyncio.current_task(), asyncio.get_running_loop()
        self._permits = asyncio.Semaphore(self._config.concurrency * len(self._servers))
        self._started.set()
        certificates = trusted_certificates()
        client = Client(self._config, self._key, certificates)
        try:
            await self._prepare(client, self._servers)
        finally:
            await client.close()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._config.concurrency):
                for server in self._servers:  # alternating, so that a few requests spread over all servers
                    client = Client(self._config, self._key, certificates, serial=True)
                    group.create_task(self._work(client, server))
        if self._error is not None:
            raise self._error

    async def _work(self, client: Client, server: Server) -> None:
        try:
            while (attempt := await self._next(server)) is not None:
                server.busy += 1
                try:
                    await self._try(client, server, attempt)
                finally:
                    server.busy -= 1
        finally:
            await client.close()

    async def _try(self, client: Client, server: Server, attempt: _Attempt[QueuedRequest]) -> None:
        try:
            if not server.described and (problem := await client.describe(server)):
                raise EndpointError(f"{server.base_url}: {problem}")
            if not server.described:
                raise TransientError("no answer to /models", unreachable=True)
            reply, result = await self._send(client, server, attempt.job)
            self._account(reply, server)
        except TransientError as failure:
            self._put_back(attempt, server, failure)
            self._permits.release()
        except DasdError as error:
            self._end(error)
        else:
            server.pauses = server.faults = 0
            server.done += 1
            self._results.put(result)
            self._num_delivered += 1
            if self._no_new_jobs and self._num_delivered == self._num_started:
                self._finish()

    async def _next(self, server: Server) -> _Attempt[QueuedRequest] | None:
        """Wait for a job that `server` may get now; None when the run is over."""
        await self._permits.acquire()
        while not self._stop.is_set():
            now = time.monotonic()
            if now < server.paused_until:  # its workers resume one by one, not all at once
                await self._sleep((server.paused_until - now) * random.uniform(1.0, 1.25))
            elif self._is_first() and self._busy:
                await self._sleep(POLL_S)  # what one answer costs is not known yet
            elif (attempt := self._pop(now)) is None:
                await self._sleep(POLL_S)
            elif reason := self._over_budget():
                self._end(EndpointError(reason))
            else:
                return attempt
        return None

    def _pop(self, now: float) -> _Attempt[QueuedRequest] | None:
        """Take the next job that may be sent; end the run after the last one."""
        if self._retries and self._retries[0].not_before <= now:
            return heapq.heappop(self._retries)
        if (new := next(self._new_jobs, None)) is not None:
            self._num_started += 1
            return _Attempt(now, new[0], new[1])
        self._no_new_jobs = True
        if self._num_delivered == self._num_started:
            self._finish()
        return None

    @property
    def _busy(self) -> int:
        return sum(server.busy for server in self._servers)

    def _is_first(self) -> bool:
        """Return whether there is a budget, but no answer yet from which to estimate what the next ones will use."""
        budget = self._config.budget
        return not self._used_now.answers and (budget.max_tokens is not None or budget.max_cost is not None)

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def _put_back(self, attempt: _Attempt[QueuedRequest], server: Server, failure: TransientError) -> None:
        """Queue a job to be retried by whichever server is free; end the run after too many failures."""
        now = time.monotonic()
        server.reason = str(failure)
        self._num_retried += 1
        if failure.unreachable:  # not the request's fault, so not counted as its failure
            server.pause(now)
            if all(s.pauses > self._config.max_retries for s in self._servers):
                reasons = "; ".join(f"{s.base_url}: {s.reason}" for s in self._servers)
                self._end(EndpointError(f"no server can be reached, tried {server.pauses} times: {reasons}"))
        else:
            attempt.tries += 1
            attempt.failures += 2 if failure.costly else 1  # a late answer may have been charged for
            attempt.not_before = now + backoff(attempt.tries)
            server.faults += 1
            if failure.wait_s is not None:
                server.paused_until = max(server.paused_until, now + failure.wait_s)
            elif server.faults >= _MAX_FAULTS:  # otherwise a server that fails at once would draw all requests
                server.pause(now)
            if attempt.failures > self._config.max_retries:
                self._end(EndpointError(f"{server.base_url}: {failure}; tried {attempt.tries} times"))
        heapq.heappush(self._retries, attempt)

    def _account(self, reply: Reply, server: Server) -> None:
        """Count the tokens of a reply, and check that its model is the same as before."""
        if reply.model and self._reply_model not in (None, reply.model):
            raise EndpointError(
                f"{server.base_url}: replies as {reply.model!r}, but earlier replies came from {self._reply_model!r};"
                " a run must use one teacher"
            )
        self._reply_model = reply.model or self._reply_model
        budget = self._config.budget
        if reply.usage is not None:
            tokens = (reply.usage.prompt_tokens or 0, reply.usage.completion_tokens or 0)
            self._used.add(*tokens)
            self._used_now.add(*tokens)
        elif budget.max_tokens is not None or budget.max_cost is not None:
            raise EndpointError(
                f"{server.base_url}: replies do not report `usage`, so a budget cannot be kept; remove teacher.budget"
            )

    def _over_budget(self) -> str:
        """Return which limit one more request would exceed, or ""; requests in flight count as average ones."""
        budget, used = self._config.budget, self._used
        if budget.max_tokens is None and budget.max_cost is None:
            return ""
        num_pending = 1 + self._busy
        ratio = num_pending / self._used_now.answers if self._used_now.answers else 0.0
        expected = Usage(
            used.prompt_tokens + round(ratio * self._used_now.prompt_tokens),
            used.completion_tokens + round(ratio * self._used_now.completion_tokens),
        )
        flying = f", and {self._busy} answers in flight will be kept" if self._busy else ""
        remedy = "raise it and run the same command to resume; finished answers are kept"
        if budget.max_tokens is not None and expected.tokens > budget.max_tokens:
            spent = f"{used.tokens:,} tokens have been used"
            return f"teacher.budget.max_tokens = {budget.max_tokens:,}: {spent}{flying}; {remedy}"
        cost, expected_cost = used.cost(self._config.prices), expected.cost(self._config.prices)
        if budget.max_cost is not None and expected_cost is not None and expected_cost > budget.max_cost:
            return f"teacher.budget.max_cost = {budget.max_cost:g}: {cost:.4g} has been spent{flying}; {remedy}"
        return ""

    def _end(self, error: DasdError) -> None:
        self._error = self._error or error
        self._finish()

    def _finish(self) -> None:
        self._stop.set()
        for _ in range(self._config.concurrency * len(self._servers)):  # wake the workers that wait for a permit
            self._permits.release()


@dataclass(frozen=True)
class _End:
    error: BaseException | None
