"""Models behind OpenAI-compatible servers, asked many at a time over HTTP.

Input: requests; each becomes one call of /chat/completions with log-probabilities. Invariants: every
request is done once; log-probabilities and bytes are the server's own, nothing is filled in; the key is
never part of a message. What can pass (429, 5xx, a time-out, a cut connection, broken JSON) is tried again;
the first failure that cannot pass ends the run, after what the servers are still writing was delivered.

At a temperature other than 1 some servers return log-probabilities of the tempered distribution, and
a single reply cannot tell. vLLM returns the raw ones unless its `--logprobs-mode` says otherwise.
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
from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from dasd_lite.config import EndpointModel
from dasd_lite.errors import ConfigError, EndpointError
from dasd_lite.sampler import Completion, Request, SamplingParams

Lengths = npt.NDArray[np.int32]

_BACKOFF_S = 1.0  # before the first retry, twice as long before each further one
_BACKOFF_MAX_S = 60.0
_POLL_S = 0.1  # how soon a worker without work looks again
_CONNECT_S = 15.0
_FAULTS = 4  # in a row, after which a server is left alone for a while
_BAD = "\ufffd"  # what a decoder writes for bytes that are no character
_SPACE = " \t\n\r\f\v"
_ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/[^\s?#]*)?")
_OPENED = re.compile(rb"\s*(?:<think>\s*)?")
_CLOSED = re.compile(rb"\s*(?:(</think>)\s*)?")


class EndpointSampler:
    """A model behind one or more servers."""

    def __init__(self, config: EndpointModel) -> None:
        """Take the servers' addresses and the key; nothing is sent yet. Raises ConfigError for what is no address."""
        for url in config.base_urls:
            if not _ADDRESS.fullmatch(url):
                raise ConfigError(f"base_urls: {url!r} is no address; one looks like http://localhost:8000/v1")
        self._config = config
        self._key = os.environ.get(config.api_key_env, "").strip()
        if not re.fullmatch(r"[!-~]*", self._key):
            raise ConfigError(f"api_key_env: the variable {config.api_key_env} holds characters that no key has")

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once; completions come as they finish.

        Raises EndpointError when a server refuses, stays away, or answers without what the method needs.
        """
        if any(request.prefix for request in requests):
            reason = "a chat endpoint cannot go on from a half-written answer"
            remedy = "use a teacher of kind = 'transformers' or 'vllm' for mix"
            raise EndpointError(f"{self._config.base_urls[0]}: {reason}; {remedy}")
        return _Run(self._config, self._key, requests, params).completions()

    def close(self) -> None:
        """Do nothing: connections live no longer than an iterator of `complete`."""


class _Passing(Exception):
    """A failure that can pass."""

    def __init__(self, reason: str, *, wait_s: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # what the server asks for
        self.unreachable = unreachable  # the request never arrived


class _Server:
    """What is known about one server."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.rests_until = 0.0
        self.rests = self.faults = 0  # in a row, without a good reply between
        self.reason = ""

    def rest(self, now: float) -> None:
        """Leave the server alone for a while, the longer the more often; requests that fail together count as one."""
        if now >= self.rests_until:
            self.rests += 1
            self.rests_until = now + _backoff(self.rests)


@dataclass(order=True)
class _Retry:
    ready: float
    order: int
    request: Request
    failures: int


class _Run:
    """One call of `complete`: an event loop in a thread, `concurrency` workers per server, one queue of requests.

    Any free worker takes the next request, so the least busy server is asked, and a slow one gets fewer.
    """

    def __init__(self, config: EndpointModel, key: str, requests: Sequence[Request], params: SamplingParams) -> None:
        self._config, self._key, self._params = config, key, params
        self._servers = [_Server(url) for url in config.base_urls]
        self._fresh = iter(requests)
        self._retries: list[_Retry] = []
        self._left = len(requests)
        self._most_waiting = 2 * config.concurrency * len(self._servers)
        self._finished: queue.SimpleQueue[Completion | BaseException | None] = queue.SimpleQueue()
        self._started = threading.Event()
        self._task: asyncio.Task[None] | None = None
        self._error: EndpointError | None = None

    def completions(self) -> Iterator[Completion]:
        """Yield completions as they finish, then raise what ended the run early."""
        thread = threading.Thread(target=self._serve, name="endpoint", daemon=True)
        thread.start()
        try:
            while (item := self._finished.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._started.wait()
            if self._task is not None:
                with suppress(RuntimeError):  # the loop has ended by itself
                    self._task.get_loop().call_soon_threadsafe(self._task.cancel)
            thread.join()

    def _serve(self) -> None:
        end: BaseException | None = None
        try:
            asyncio.run(self._work_all())
        except (Exception, asyncio.CancelledError) as error:  # handed to the thread that asked
            end = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
        finally:
            self._finished.put(end)
            self._started.set()

    async def _work_all(self) -> None:
        self._over, self._task = asyncio.Event(), asyncio.current_task()
        self._started.set()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=min(_CONNECT_S, self._config.timeout_s))
        client = httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout)
        async with client, asyncio.TaskGroup() as group:
            for _ in range(min(self._config.concurrency, self._left)):
                for server in self._servers:  # in turn, so that few requests spread over all
                    group.create_task(self._work(client, server))
        if self._error is not None:
            raise self._error

    async def _work(self, client: httpx.AsyncClient, server: _Server) -> None:
        while (job := await self._next(server)) is not None:
            try:
                completion = await self._ask(client, server, job.request)
            except _Passing as failure:
                self._put_back(job, server, failure)
            except EndpointError as error:
                self._end(error)
            else:
                self._finished.put(completion)
                self._left -= 1
                if not self._left:
                    self._over.set()

    async def _next(self, server: _Server) -> _Retry | None:
        """Wait for a request that `server` may be asked now; none when the run is over."""
        while not self._over.is_set():
            now = time.monotonic()
            if now < server.rests_until:  # its workers come back one by one, not all at once
                await self._pause(server.rests_until - now + random.uniform(0, _BACKOFF_S))
            elif self._finished.qsize() > self._most_waiting:
                await self._pause(_POLL_S)
            elif self._retries and self._retries[0].ready <= now:
                return heapq.heappop(self._retries)
            elif (request := next(self._fresh, None)) is not None:
                return _Retry(now, request.position, request, failures=0)
            else:
                await self._pause(_POLL_S)
        return None

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)

    def _put_back(self, job: _Retry, server: _Server, failure: _Passing) -> None:
        """Let `job` be tried again, later, by whichever server is free; end the run when that is hopeless."""
        now = time.monotonic()
        server.reason = str(failure)
        if failure.unreachable:  # no fault of the request, so it does not count against it
            server.rest(now)
            if all(s.rests > self._config.max_retries for s in self._servers):
                reasons = "; ".join(f"{s.base_url}: {s.reason}" for s in self._servers)
                self._end(EndpointError(f"no server can be reached, tried {server.rests} times: {reasons}"))
        else:
            job.failures += 1
            job.ready = now + _backoff(job.failures)
            server.faults += 1
            if failure.wait_s is not None:
                server.rests_until = max(server.rests_until, now + failure.wait_s)
            elif server.faults >= _FAULTS:  # else one that fails at once would draw all requests to itself
                server.rest(now)
            if job.failures > self._config.max_retries:
                self._end(EndpointError(f"{server.url}: {failure}; tried {job.failures} times"))
        heapq.heappush(self._retries, job)

    def _end(self, error: EndpointError) -> None:
        self._error = self._error or error
        self._over.set()

    async def _ask(self, client: httpx.AsyncClient, server: _Server, request: Request) -> Completion:
        try:
            async with asyncio.timeout(self._config.timeout_s):
                response = await client.post(server.url, json=self._body(request))
        except TimeoutError as error:
            raise _Passing(f"no reply within timeout_s = {self._config.timeout_s:g}") from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Passing(str(error) or "no connection", unreachable=True) from error
        except httpx.RequestError as error:
            raise _Passing(f"the connection was cut: {error or type(error).__name__}") from error
        if response.status_code != 200:
            self._raise_status(server, response, request)
        try:
            answer = _read(response.json())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Passing(f"the reply is not a chat completion: {self._says(response)}") from error
        server.rests = server.faults = 0
        return _completion(request.position, answer, f"{server.url}: {self._config.model!r}")

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": list(request.messages),
            "max_tokens": request.max_tokens,
            "temperature": self._params.temperature,
            "top_p": self._params.top_p,
            "seed": request.seed % 2**31,  # some servers read 32 bits, some a double
            "logprobs": True,
        }
        if self._params.top_k:  # no part of OpenAI's interface
            body["top_k"] = self._params.top_k
        return body

    def _raise_status(self, server: _Server, response: httpx.Response, request: Request) -> None:
        status = f"{response.status_code} {response.reason_phrase}: {self._says(response)}"
        if response.status_code in (408, 425, 429) or response.status_code >= 500:
            wait_s = _retry_after(response)
            if wait_s is None or wait_s <= self._config.timeout_s:
                raise _Passing(status, wait_s=wait_s)
            status += f"; it asks to wait {wait_s:.0f} s, which is over timeout_s = {self._config.timeout_s:g}"
        elif response.status_code in (401, 403):
            status += f"; the key is read from the environment variable {self._config.api_key_env}"
            status += "" if self._key else ", which is not set"
        elif response.status_code == 404:
            status += f"; base_urls end with /v1, and the server must know model = {self._config.model!r}"
        elif response.status_code in (400, 413, 422):
            status += f"; it was asked {request.messages[-1]['content'][:40]!r}"
        raise EndpointError(f"{server.url}: {status}")

    def _says(self, response: httpx.Response) -> str:
        """Return the server's message on one line, without the key, which some servers repeat."""
        text = response.text
        with suppress(ValueError, LookupError, TypeError):
            error = response.json()["error"]
            text = error if isinstance(error, str) else error["message"]
        text = " ".join(str(text).split())
        return (text.replace(self._key, "[key]") if self._key else text)[:300] or "(no message)"


def _backoff(failures: int) -> float:
    """Seconds to wait after the n-th failure: doubling, with jitter so that requests do not come back in step."""
    return min(_BACKOFF_S * 2.0 ** min(failures - 1, 60), _BACKOFF_MAX_S) * random.uniform(0.5, 1.0)


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    with suppress(ValueError):
        return max(float(value), 0.0)
    with suppress(ValueError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None


@dataclass(frozen=True)
class _Answer:
    """A reply, read but not judged."""

    reasoning: str
    content: str
    pieces: list[bytes]
    logprobs: list[float | None]
    finish_reason: str


def _read(reply: Any) -> _Answer:
    choice = reply["choices"][0]
    message = choice["message"]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return _Answer(
        reasoning=(message.get("reasoning_content") or message.get("reasoning") or "").strip(_SPACE),
        content=message.get("content") or "",
        pieces=[bytes(b) if (b := t.get("bytes")) is not None else t["token"].encode() for t in tokens],
        logprobs=[t.get("logprob") for t in tokens],
        finish_reason=str(choice.get("finish_reason") or "unknown"),
    )


def _completion(position: int, answer: _Answer, source: str) -> Completion:
    """Turn a reply into a completion; raises EndpointError where it lacks what the method needs."""
    logprobs = np.array([np.nan if p is None else p for p in answer.logprobs], dtype=np.float32)
    if not np.isfinite(logprobs).all() or (not answer.pieces and (answer.reasoning or answer.content)):
        raise EndpointError(
            f"{source} returns no log-probabilities; the method needs them: switch `logprobs` on at the server,"
            " take a provider that supports it, or run the model here with kind = 'vllm'"
        )
    text, token_bytes = align(answer.pieces, answer.reasoning, answer.content, ended=answer.finish_reason == "stop")
    if token_bytes is None:
        raise EndpointError(
            f"{source}: its tokens spell {sum(map(len, answer.pieces))} bytes, its text has {len(text.encode())};"
            " the server must give `logprobs` with `bytes` for the whole answer, reasoning included"
        )
    return Completion(position, text, np.zeros(0, np.int32), logprobs, token_bytes, answer.finish_reason)


def align(pieces: list[bytes], reasoning: str, content: str, *, ended: bool) -> tuple[str, Lengths | None]:
    """Join an answer that the server has split; return each token's bytes of it, or none if the tokens spell another.

    The text is `<think>`, reasoning, `</think>`, content, with the line breaks usual between them. Tokens may spell
    the tags in this way, otherwise, or not at all: then the tags' bytes belong to the token before (the opening's to
    the first). A last token behind the text has no bytes: one that `ended` the turn, or half a character.
    """
    text, lengths = _fit(pieces, reasoning, content, ended=ended)
    if lengths is None and _BAD in text:
        # vLLM's server gives no bytes to a token that is none or half of a character, and U+FFFD to the text.
        bare, found = _fit(pieces, reasoning.replace(_BAD, ""), content.replace(_BAD, ""), ended=ended)
        if found is not None and bare == text.replace(_BAD, ""):
            gaps = np.cumsum([len(part.encode()) for part in text.split(_BAD)[:-1]])
            edges = np.cumsum([0, *found])
            last = np.append(edges[1:] > edges[:-1], True)  # of several edges at one place
            before = np.where(last, np.searchsorted(gaps, edges, "right"), np.searchsorted(gaps, edges))
            before[0] = 0
            lengths = np.diff(edges + len(_BAD.encode()) * before).astype(np.int32)
    return text, lengths


def _fit(pieces: list[bytes], reasoning: str, content: str, *, ended: bool) -> tuple[str, Lengths | None]:
    pieces = _whole_characters(pieces)
    raw = b"".join(pieces)
    think, answer = reasoning.encode(), content.encode()
    think_at = closing_at = answer_at = 0
    opening = closing = b""
    if think:
        opening, answer = b"<think>\n", content.lstrip(_SPACE).encode()
        think_at = found.end() if (found := _OPENED.match(raw)) else 0
        closing_at = answer_at = think_at + len(think)
        found = _CLOSED.match(raw, closing_at)
        # Where neither an answer nor a tag shows that the thought was ended, the text does not say so.
        if found and (answer or found.group(1)):
            closing, answer_at = b"\n</think>\n\n", found.end()
    end, text = answer_at + len(answer), opening + think + closing + answer
    rest = raw[end:].strip()
    fits = raw[think_at:closing_at] == think and raw[answer_at:end] == answer
    if not fits or rest not in (b"", _BAD.encode(), *([pieces[-1].strip()] if ended and pieces else [])):
        return text.decode(), None
    raw_bounds = np.array([0, think_at, closing_at, answer_at, end])
    text_bounds = np.cumsum([0, len(opening), len(think), len(closing), len(answer), 0])
    edges = np.cumsum([0, *map(len, pieces)])
    part = np.searchsorted(raw_bounds, edges, side="right") - 1
    moved = np.minimum(text_bounds[part] + edges - raw_bounds[part], text_bounds[part + 1])
    moved[0] = 0
    return text.decode(), np.diff(moved).astype(np.int32)


def _whole_characters(pieces: list[bytes]) -> list[bytes]:
    """Write bytes that are no UTF-8 as U+FFFD, as servers do in the text; a split character goes to its last token."""
    with suppress(UnicodeDecodeError):
        b"".join(pieces).decode()
        return pieces
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(p, final=i + 1 == len(pieces)).encode() for i, p in enumerate(pieces)]
