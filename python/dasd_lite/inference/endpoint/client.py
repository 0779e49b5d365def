"""HTTP requests to one server: what its failures mean, and when it gets a pause.

Input: a request's JSON body. Output: the reply, or an error. Invariants: no message contains the key; a failure that
may not happen again (429, 5xx, a timeout, a dropped connection, broken JSON) is a TransientError; any other (a wrong
key, path, model or certificate) is an EndpointError that says how to fix it.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import ssl
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from dasd_lite.config.models import Endpoint
from dasd_lite.errors import EndpointError
from dasd_lite.inference.endpoint.replies import Reply, StreamAssembler, parse_reply

BACKOFF_S = 0.5  # before the first retry; doubles with each further one
_BACKOFF_MAX_S = 60.0
_CONNECT_S = 15.0
_DESCRIBE_S = 10.0
_MAX_DESCRIBE_TRIES = 3
_MAX_RETRY_AFTER_S = 600.0  # longest wait that a server may request; a longer `timeout_s` allows more


class TransientError(Exception):
    """A failure that may not happen again if the request is repeated."""

    def __init__(
        self, reason: str, *, wait_s: float | None = None, unreachable: bool = False, costly: bool = False
    ) -> None:
        """Create the error.

        Args:
            reason: What happened.
            wait_s: Seconds that the server asks to wait.
            unreachable: The request never arrived.
            costly: The request may have been charged for although no reply arrived.
        """
        super().__init__(reason)
        self.costly = costly
        self.wait_s = wait_s
        self.unreachable = unreachable


class RequestRejected(EndpointError):
    """A request that its server will never answer, or not in a readable way; other requests may succeed."""


class Server:
    """What is known about one server."""

    def __init__(self, base_url: str) -> None:
        """Start with the address alone."""
        self.base_url = base_url.rstrip("/")
        self.paused_until = 0.0
        self.pauses = self.faults = 0  # consecutive, since its last good reply
        self.reason = ""  # of its last failure
        self.busy = self.done = 0  # requests
        self.described = False  # whether it has answered `describe`
        self.models: list[str] = []  # that it lists
        self.context: int | None = None  # prompt plus completion in tokens, if it reports that
        self.is_vllm = False
        self.root = ""  # what a vLLM server loaded the model from

    def pause(self, now: float) -> None:
        """Send nothing for a while, longer each time in a row; requests that fail together count as one."""
        if now >= self.paused_until:
            self.pauses += 1
            self.paused_until = now + backoff(self.pauses)

    def state(self, now: float) -> str:
        """Return the server's state in a few words."""
        name = self.base_url.split("://", 1)[-1].removesuffix("/v1")
        if now < self.paused_until:
            return f"{name} paused for {self.paused_until - now:.0f} s ({self.reason[:40]})"
        return f"{name} {self.busy} in flight, {self.done} done"


class Client:
    """Sends requests to servers with one configuration and key.

    A `serial` client sends one request at a time over one connection. It notices a reply that was sent twice, which
    would otherwise be taken for the answer to the next request.
    """

    def __init__(self, config: Endpoint, key: str, certificates: ssl.SSLContext, *, serial: bool = False) -> None:
        """Create the connection pool; nothing is sent yet."""
        self.config, self._key, self._certificates, self._serial = config, key, certificates, serial
        self._last: Reply | None = None
        self._describe_failures = 0
        self._client = self._open()

    def _open(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=min(_CONNECT_S, self.config.timeout_s))
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, verify=self._certificates)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def post(self, server: Server, path: str, body: dict[str, Any]) -> Reply:
        """Send a request and return the reply; raises TransientError or EndpointError."""
        try:
            reply = await (self._post_streaming if self.config.stream else self._post)(server, path, body)
        except TimeoutError as error:
            remedy = "" if self.config.stream else "; for long answers raise it, or set teacher.stream = true"
            raise TransientError(
                f"no reply within timeout_s = {self.config.timeout_s:g}{remedy}", costly=True
            ) from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._unreachable(server, error) from error
        except httpx.RequestError as error:
            raise TransientError(f"the connection was dropped: {error or type(error).__name__}") from error
        last, self._last = self._last, reply if self._serial else None
        if last is not None and reply.id and reply.id == last.id and reply.choices == last.choices:
            await self.close()  # later replies on this connection would be out of step
            self._client, self._last = self._open(), None
            raise TransientError(f"reply {reply.id[:40]} was sent twice")
        return reply

    async def _post(self, server: Server, path: str, body: dict[str, Any]) -> Reply:
        async with asyncio.timeout(self.config.timeout_s):
            response = await self._client.post(server.base_url + path, json=body)
        if response.status_code != 200:
            self._raise_status(server, path, response, body)
        try:
            return parse_reply(response.content)
        except ValueError as error:
            raise TransientError(f"the reply is not a completion ({error}): {self._message(response)}") from error

    async def _post_streaming(self, server: Server, path: str, body: dict[str, Any]) -> Reply:
        """Request the reply as a stream of events; `timeout_s` is the longest silence between two of them."""
        stream = StreamAssembler()
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with asyncio.timeout(self.config.timeout_s) as limit:
            async with self._client.stream("POST", server.base_url + path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._raise_status(server, path, response, body)
                async for line in response.aiter_lines():
                    limit.reschedule(asyncio.get_running_loop().time() + self.config.timeout_s)
                    if not line.startswith("data:"):
                        continue
                    try:
                        if stream.add(line.removeprefix("data:").strip()):
                            break
                    except ValueError as error:
                        reason = f"an event of the stream is not part of a completion: {self._clean(line)}"
                        raise TransientError(reason) from error
        try:
            return stream.reply()
        except ValueError as error:
            raise TransientError(str(error)) from error

    async def describe(self, server: Server) -> str:
        """Ask which models the server has; return what is wrong with the key, or "".

        Many providers do not answer this, which is not an error.
        """
        try:
            async with asyncio.timeout(min(_DESCRIBE_S, self.config.timeout_s)):
                response = await self._client.get(f"{server.base_url}/models")
        except (httpx.RequestError, TimeoutError):
            self._describe_failures += 1
            server.described = self._describe_failures > _MAX_DESCRIBE_TRIES  # without such a page, some never answer
            return ""
        server.described = response.status_code not in (502, 503, 504)  # sent by a gateway, not by the server
        if response.status_code in (401, 403):
            return self._status(response) + self._key_hint()
        models: list[dict[str, Any]] = []
        with suppress(ValueError, LookupError, TypeError):
            models = [m for m in response.json()["data"] if isinstance(m, dict)]
        server.models = [str(m.get("id")) for m in models]
        for model in models:
            if model.get("id") == self.config.model:
                server.is_vllm = model.get("owned_by") == "vllm"
                server.root = str(model.get("root") or "")
                context = model.get("max_model_len")
                server.context = context if isinstance(context, int) else None
        return ""

    def _unreachable(self, server: Server, error: httpx.TransportError) -> Exception:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError) or "WRONG_VERSION_NUMBER" in str(cause):
                remedy = "use http:// if the server has no TLS, or trust its certificate (SSL_CERT_FILE)"
                return EndpointError(f"{server.base_url}: no TLS connection: {cause}; {remedy}")
            cause = cause.__cause__ or cause.__context__
        return TransientError(str(error) or "no connection", unreachable=True)

    def _raise_status(self, server: Server, path: str, response: httpx.Response, body: dict[str, Any]) -> None:
        status = self._status(response)
        if response.status_code in (408, 425, 429) or response.status_code >= 500:
            wait_s = _retry_after(response)
            longest = max(self.config.timeout_s, _MAX_RETRY_AFTER_S)
            if wait_s is None or wait_s <= longest:
                raise TransientError(status, wait_s=wait_s)
            status += f"; the server asks to wait {wait_s:.0f} s, over {longest:g} s; run the same command again then"
        elif response.status_code in (401, 403):
            status += self._key_hint()
        elif response.status_code == 404:
            status += f"; {self._path_hint(server)}"
        elif response.status_code in (400, 413, 422):
            messages = body.get("messages")
            prompt = f"{messages[-1]['content'][:40]!r}" if messages else f"{len(body.get('prompt', ()))} tokens"
            status += f"; the prompt was {prompt}, with max_tokens = {body.get('max_tokens')}"
            if server.context is not None and "prompt" not in body:
                status += f" and a context of {server.context}: shorten the prompt, or lower max_tokens"
            status += "; teacher.max_skipped = 10 skips up to ten such questions"
            raise RequestRejected(f"{server.base_url}{path}: {status}")
        raise EndpointError(f"{server.base_url}{path}: {status}")

    def _status(self, response: httpx.Response) -> str:
        return f"{response.status_code} {response.reason_phrase}: {self._message(response)}"

    def _key_hint(self) -> str:
        unset = "" if self._key else ", which is not set"
        return f"; the key is read from the environment variable {self.config.api_key_env}{unset}"

    def _path_hint(self, server: Server) -> str:
        """Return what a 404 may mean: a wrong path, or a wrong model name."""
        url = server.base_url
        if server.models:
            return f"the server does not have model = {self.config.model!r}; it has {', '.join(server.models[:5])}"
        if url.endswith("/v1/v1"):
            return f"base_urls has /v1 twice; write {url.removesuffix('/v1')}"
        if not url.endswith("/v1"):
            return f"most servers need base_urls that end with /v1; try {url}/v1"
        return f"check base_urls, and that the server has model = {self.config.model!r}"

    def _message(self, response: httpx.Response) -> str:
        """Return the server's error message on one line, without the key, which some servers repeat."""
        text = response.text
        with suppress(ValueError, LookupError, TypeError):
            error = json.loads(text)["error"]
            text = error if isinstance(error, str) else error["message"]
        return self._clean(str(text)) or "(no message)"

    def _clean(self, text: str) -> str:
        """Return the beginning of a server's text on one line, without the key."""
        text = text[:10_000]
        return " ".join((text.replace(self._key, "[key]") if self._key else text).split())[:300]


def trusted_certificates() -> ssl.SSLContext:
    """Return the certificates to trust. Loading them is slow, so clients share them."""
    return httpx.create_ssl_context()


def backoff(failures: int) -> float:
    """Return the seconds to wait after the n-th failure: doubling, with jitter so that retries spread out."""
    return min(BACKOFF_S * 2.0 ** min(failures - 1, 60), _BACKOFF_MAX_S) * random.uniform(0.5, 1.0)


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    with suppress(ValueError):
        return max(float(value), 0.0) if math.isfinite(float(value)) else None
    with suppress(ValueError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None
