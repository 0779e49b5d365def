"""Many requests to several servers at once: who is asked next, what is tried again, and when it ends.

Input: jobs, and how one is asked of a server. Output: results as they finish. Invariants: every job is done
once; at most `concurrency` per server are in hand, those not yet stored by the consumer included; the first
failure that cannot pass, or the end of the budget, ends the run after what is in flight was delivered.
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

from dasd_lite.config.models import EndpointModel
from dasd_lite.data.usage import Usage
from dasd_lite.errors import DasdError, EndpointError
from dasd_lite.inference.endpoint.client import Client, Server, TransientError, backoff, trusted
from dasd_lite.inference.endpoint.replies import Reply

POLL_S = 0.1  # how soon a worker without work looks again
_FAULTS = 8  # in a row, after which a server is left alone for a while

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(order=True)
class _Retry(Generic[Job]):
    ready: float
    order: int
    job: Job
    failures: int = 0
    tries: int = 0


class Dispatch(Generic[Job, Result]):
    """One call: an event loop in a thread, `concurrency` workers per server, one queue of jobs.

    Any free worker takes the next job, so the least busy server is asked, and a slow one gets fewer.
    """

    def __init__(
        self,
        config: EndpointModel,
        key: str,
        jobs: Iterable[Job],
        prepare: Callable[[Client, list[Server]], Awaitable[None]],
        ask: Callable[[Client, Server, Job], Awaitable[tuple[Reply, Result]]],
        spent: Usage,
    ) -> None:
        """Take the jobs; nothing is sent before `results` is asked for the first."""
        self._config, self._key, self._prepare, self._ask, self._spent = config, key, prepare, ask, spent
        self._servers = [Server(url) for url in config.base_urls]
        self._fresh = enumerate(jobs)
        self._retries: list[_Retry[Job]] = []
        self._taken = self._delivered = self._tried_again = 0
        self._drained = False  # no fresh jobs are left
        self._here = Usage()  # of this run alone
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
        caller = Client(self._config, self._key, trust)
        try:
            await self._prepare(caller, self._servers)
        finally:
            await caller.close()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._config.concurrency):
                for server in self._servers:  # in turn, so that few requests spread over all
                    group.create_task(self._work(Client(self._config, self._key, trust, alone=True), server))
        if self._error is not None:
            raise self._error

    async def _work(self, caller: Client, server: Server) -> None:
        try:
            while (job := await self._next(server)) is not None:
                server.busy += 1
                try:
                    await self._do(caller, server, job)
                finally:
                    server.busy -= 1
        finally:
            await caller.close()

    async def _do(self, caller: Client, server: Server, job: _Retry[Job]) -> None:
        try:
            if not server.described and (wrong := await caller.describe(server)):
                raise EndpointError(f"{server.base_url}: {wrong}")
            if not server.described:
                raise TransientError("it does not say what it is (/models)", unreachable=True)
            reply, result = await self._ask(caller, server, job.job)
            self._account(reply, server)
        except TransientError as failure:
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
            elif self._is_first() and self._busy:
                await self._pause(POLL_S)  # what one answer costs is not known yet
            elif (job := self._job(now)) is None:
                await self._pause(POLL_S)
            elif reason := self._over_budget():
                self._end(EndpointError(reason))
            else:
                return job
        return None

    def _job(self, now: float) -> _Retry[Job] | None:
        """Take the next job that may be asked; the end of them ends the run."""
        if self._retries and self._retries[0].ready <= now:
            return heapq.heappop(self._retries)
        if (fresh := next(self._fresh, None)) is not None:
            self._taken += 1
            return _Retry(now, fresh[0], fresh[1])
        self._drained = True
        if self._delivered == self._taken:
            self._finish()
        return None

    @property
    def _busy(self) -> int:
        return sum(server.busy for server in self._servers)

    def _is_first(self) -> bool:
        """Tell whether there is a budget, and no answer yet to say what the next ones will take."""
        budget = self._config.budget
        return not self._here.answers and (budget.max_tokens is not None or budget.max_cost is not None)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)

    def _put_back(self, job: _Retry[Job], server: Server, failure: TransientError) -> None:
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
            job.tries += 1
            job.failures += 2 if failure.costly else 1  # a late answer may have been paid for
            job.ready = now + backoff(job.tries)
            server.faults += 1
            if failure.wait_s is not None:
                server.rests_until = max(server.rests_until, now + failure.wait_s)
            elif server.faults >= _FAULTS:  # else one that fails at once would draw all requests to itself
                server.rest(now)
            if job.failures > self._config.max_retries:
                self._end(EndpointError(f"{server.base_url}: {failure}; tried {job.tries} times"))
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
            took = (reply.usage.prompt_tokens or 0, reply.usage.completion_tokens or 0)
            self._spent.add(*took)
            self._here.add(*took)
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
        ahead = 1 + self._busy
        mean = ahead / self._here.answers if self._here.answers else 0.0
        expected = Usage(
            spent.prompt_tokens + round(mean * self._here.prompt_tokens),
            spent.completion_tokens + round(mean * self._here.completion_tokens),
        )
        flying = f" and {self._busy} answers under way, which are kept" if self._busy else ""
        remedy = "raise it and run the same command to go on; what is done is kept"
        if budget.max_tokens is not None and expected.tokens > budget.max_tokens:
            return f"teacher.budget.max_tokens = {budget.max_tokens:,}: {spent.tokens:,} are used{flying}; {remedy}"
        cost, expected_cost = spent.cost(self._config.prices), expected.cost(self._config.prices)
        if budget.max_cost is not None and expected_cost is not None and expected_cost > budget.max_cost:
            return f"teacher.budget.max_cost = {budget.max_cost:g}: {cost:.4g} is spent{flying}; {remedy}"
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
