"""What a teacher behind an endpoint can do, found out by some twenty short requests before the first long one.

Input: an endpoint's config, one real question, and what the recipe needs. Output: findings, one list a
server; those that make the run impossible are fatal. Invariant: nothing is assumed; what a server
does not let one find out is "unknown", never "yes".
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dasd_lite.chat.chat import Chat
from dasd_lite.config.models import EndpointModel
from dasd_lite.data.hub import model_folder
from dasd_lite.data.records import Message
from dasd_lite.errors import EndpointError
from dasd_lite.inference import Request, SamplingParams
from dasd_lite.inference.endpoint.client import Client, Server, TransientError, backoff, trusted
from dasd_lite.inference.endpoint.continuation import find_continuation
from dasd_lite.inference.endpoint.replies import PLACEHOLDER, Choice, Reply, token_ids
from dasd_lite.inference.endpoint.requests import RequestBuilder
from dasd_lite.inference.endpoint.sampler import api_key

NUM_TOKENS = 32  # of one probing answer
_SHORT = 8  # tokens where only log-probabilities are looked at
_TRIES = 4
_EQUAL = 10  # equal requests at once
_COOL = 0.5  # temperature at which tempered log-probabilities show
_PATIENCE_S = 60.0  # for one probing answer
_SPREAD = 0.05  # squared nats between alternatives, under which nothing can be told from them


@dataclass(frozen=True)
class Requirements:
    """What the recipe asks of its teacher."""

    tempered: bool = True
    """It samples at a temperature other than 1, so log-probabilities must be raw."""
    thinking: bool = True
    """Answers without a thinking part are rejected."""
    prefix: bool = False
    """It has a mixed phase: the teacher continues the student's answers."""
    max_tokens: int = 0
    """Longest answer that it asks for."""
    reading: bool = False
    """score.by = 'teacher': the teacher reads given answers."""


@dataclass(frozen=True)
class Finding:
    """One thing found out."""

    name: str
    found: str
    remedy: str = ""
    fatal: bool = False


@dataclass
class ProbeResult:
    """All that was found out about one server."""

    base_url: str
    items: list[Finding] = field(default_factory=list)

    @property
    def answers(self) -> bool:
        """Tell whether it answered at all."""
        return not any(item.name == "answers" and item.found in ("no", "not now") for item in self.items)

    def add(self, name: str, found: str, remedy: str = "", *, fatal: bool = False) -> None:
        """Note a finding."""
        self.items.append(Finding(name, found, remedy, fatal))


def probe_servers(config: EndpointModel, messages: Sequence[Message], needs: Requirements) -> list[ProbeResult]:
    """Probe every server of `config` with the question `messages`; raises ConfigError for a bad address or key."""
    key = api_key(config)
    chat = Chat(model_folder(config.tokenizer)) if config.tokenizer else None
    return asyncio.run(_probe_all(config, key, chat, tuple(messages), needs))


async def _probe_all(
    config: EndpointModel, key: str, chat: Chat | None, messages: tuple[Message, ...], needs: Requirements
) -> list[ProbeResult]:
    hasty = config.model_copy(update={"timeout_s": min(config.timeout_s, _PATIENCE_S)})
    caller = Client(hasty, key, trusted())
    servers = [Server(url) for url in config.base_urls]
    try:
        return list(
            await asyncio.gather(
                *(_Probe(caller, s, RequestBuilder(config, chat), messages, needs).run() for s in servers)
            )
        )
    finally:
        await caller.close()


class _Probe:
    """The probing of one server."""

    def __init__(
        self,
        caller: Client,
        server: Server,
        dialect: RequestBuilder,
        messages: tuple[Message, ...],
        needs: Requirements,
    ) -> None:
        self._caller, self._server, self._dialect = caller, server, dialect
        self._messages, self._needs = messages, needs
        self._config = caller.config
        self._source = f"{server.base_url}{dialect.path}: {self._config.model!r}"
        self._found = ProbeResult(server.base_url)
        self._left_out: tuple[str, ...] = ()  # what the server answers with an error

    async def run(self) -> ProbeResult:
        wrong = await self._caller.describe(self._server)
        try:
            if wrong:
                raise EndpointError(f"{self._server.base_url}: {wrong}")
            warm = await self._first()
        except EndpointError as error:
            self._found.add("answers", "no", str(error), fatal=True)
        except TransientError as failure:
            self._found.add("answers", "not now", f"{failure}; tried {_TRIES} times")
        else:
            try:
                await self._all(warm)
            except (EndpointError, TransientError) as error:
                self._found.add("answers", "not always", str(error))
        return self._found

    async def _all(self, warm: Reply) -> None:
        self._model(warm)
        self._context()
        self._usage(warm)
        if self._logprobs(warm):
            await self._raw(warm)
            await self._repeatable()
        self._thinking(warm)
        await self._seed()
        await self._several()
        await self._continues()
        if self._needs.reading:
            await self._reads()

    async def _first(self) -> Reply:
        """Ask once, then without what the server may not take: alternatives, token ids, log-probabilities."""
        try:
            return await self._ask(temperature=1.0, top_logprobs=5)
        except EndpointError:
            self._dialect.prompt_as_text = self._dialect.chat is not None
        try:
            return await self._ask(temperature=1.0, top_logprobs=5 if self._dialect.chat else 0)
        except EndpointError:
            self._left_out = ("logprobs", "top_logprobs")
            return await self._ask(temperature=1.0)

    async def _ask(
        self, *, temperature: float, seed: int = 7, max_tokens: int = NUM_TOKENS, top_logprobs: int = 0, **extra: Any
    ) -> Reply:
        """Ask the question; tries again what can pass; raises EndpointError, or Passing when it does not pass."""
        request = Request(0, self._messages, max_tokens, seed)
        body = self._dialect.body(request, SamplingParams(temperature), self._server, top_logprobs=top_logprobs)
        body = {name: value for name, value in body.items() if name not in self._left_out}
        for attempt in range(1, _TRIES):
            try:
                return await self._caller.post(self._server, self._dialect.path, body | extra)
            except TransientError as failure:
                if failure.costly and attempt > 1:
                    raise
                await asyncio.sleep(failure.wait_s or backoff(attempt))
        return await self._caller.post(self._server, self._dialect.path, body | extra)

    def _model(self, reply: Reply) -> None:
        name = reply.model or "unknown"
        remedy = ""
        if self._server.is_vllm and self._dialect.chat is None:
            remedy = (
                f"this is a vLLM server: with teacher.tokenizer = {self._server.root!r} it is asked by token ids, which"
                " spares a second rendering and lets mix and score use it"
            )
        elif reply.model and reply.model != self._config.model:
            remedy = f"asked for {self._config.model!r}; make sure that it is the teacher that you mean"
        self._found.add("answers as", name, remedy)

    def _context(self) -> None:
        """Without a tokenizer a request cannot be fitted to the context: one that is too long is refused."""
        context, wanted = self._server.context, self._needs.max_tokens
        if context is not None and self._dialect.chat is None and wanted >= context:
            remedy = f"max_tokens = {wanted} leaves no room in it for a question; lower it, or set teacher.tokenizer"
            self._found.add("context", f"{context:,}", remedy, fatal=True)

    def _usage(self, reply: Reply) -> None:
        budget = self._config.budget
        if reply.usage is None:
            wanted = budget.max_tokens is not None or budget.max_cost is not None
            remedy = "it does not count tokens, so neither costs nor a budget can be kept; leave teacher.budget out"
            self._found.add("usage", "not told", remedy, fatal=wanted)

    def _logprobs(self, reply: Reply) -> bool:
        """Find out whether there are log-probabilities, and whether the tokens spell the text."""
        if not self._config.logprobs:
            self._found.add("logprobs", "not asked for")
            return False
        choice = reply.choices[0]
        values = _values(choice)
        if not values or any(value is None for value in values):
            remedy = (
                "switch `logprobs` on at the server, take a provider that returns them, or run the model here"
                " (kind = 'vllm'); or do without: teacher.logprobs = false and select.rule = 'random' or 'all'"
            )
            self._found.add("logprobs", "refused" if self._left_out else "none", remedy, fatal=True)
            return False
        self._found.add("logprobs", "yes")
        try:
            self._dialect.read(Request(0, self._messages, NUM_TOKENS, 7), reply, self._source)
        except EndpointError as error:
            self._found.add("bytes", "do not add up", str(error), fatal=True)
            return False
        self._found.add("bytes", "token ids" if self._dialect.chat and token_ids(choice) else "add up")
        return True

    async def _raw(self, warm: Reply) -> None:
        """Compare the first token's alternatives at two temperatures: raw ones stay, tempered ones spread."""
        try:
            cool = await self._ask(temperature=_COOL, max_tokens=1, top_logprobs=5)
        except EndpointError:
            cool = await self._ask(temperature=_COOL, max_tokens=1)
        ratio = spread(_alternatives(warm.choices[0]), _alternatives(cool.choices[0]))
        if ratio is None:
            remedy = "the server gives no alternatives to compare; sample at temperature 1, or ask whoever runs it"
            self._found.add("raw", "unknown", remedy if self._needs.tempered else "")
        elif ratio < (1 + 1 / _COOL) / 2:
            self._found.add("raw", "yes")
        else:
            remedy = (
                f"log-probabilities are those after temperature (spread × {ratio:.2f} at T={_COOL}); start vLLM with"
                " --logprobs-mode raw_logprobs, or sample at temperature 1 only"
            )
            self._found.add("raw", "tempered", remedy, fatal=self._needs.tempered)

    async def _repeatable(self) -> None:
        """Ask the same several times at once, greedily; say how far apart the log-probabilities are."""
        asked = (self._ask(temperature=0.0, max_tokens=_SHORT) for _ in range(_EQUAL))
        replies = [r for r in await asyncio.gather(*asked, return_exceptions=True) if isinstance(r, Reply)]
        if len(replies) < 2:
            self._found.add("noise", "unknown", "it did not take ten requests at once; lower concurrency")
            return
        rows = [[p for p in _values(reply.choices[0]) if p is not None] for reply in replies]
        names = [_names(reply.choices[0]) for reply in replies]
        gap = 0.0
        for row, name in zip(rows[1:], names[1:], strict=True):
            for i, (one, other) in enumerate(zip(rows[0], row, strict=False)):
                if names[0][:i] != name[:i]:
                    break  # another text from here on
                if names[0][i] == name[i]:
                    gap = max(gap, abs(one - other))
        remedy = "that much of a difference between two log-probabilities means nothing" if gap > 0.01 else ""
        self._found.add("noise", f"{gap:.1g}", remedy)

    def _thinking(self, reply: Reply) -> None:
        choice = reply.choices[0]
        message = choice.message
        text = choice.text or (message.content if message else "") or ""
        chat = self._dialect.chat
        if chat is not None and (ids := token_ids(choice)):
            text = chat.read(ids, "length")[0]
        if message is not None and (message.reasoning_content or message.reasoning):
            self._found.add("thinking", "own field")
        elif "<think>" in text or (chat is not None and "<think>" in chat.think_prefix):
            self._found.add("thinking", "in text")
        else:
            remedy = (
                "its answer begins with no thinking part (neither reasoning_content nor <think>); if its template opens"
                " <think> by itself, set teacher.tokenizer or start the server with its reasoning parser; else take a"
                " teacher that thinks and shows it, or set select.require_think = false"
            )
            self._found.add("thinking", "none", remedy, fatal=self._needs.thinking)

    async def _seed(self) -> None:
        replies = [await self._ask(temperature=1.0, seed=seed, max_tokens=NUM_TOKENS) for seed in (11, 11, 12)]
        first, same, other = (_names(reply.choices[0]) or _text(reply) for reply in replies)
        if first != same:
            remedy = "the same seed gives other answers: the run can be resumed, but not repeated to the byte"
            self._found.add("seed", "ignored", remedy)
        elif first == other:
            remedy = "other seeds give the same answer; if that is a cache between you and the model, switch it off"
            self._found.add("seed", "no effect seen", remedy)
        else:
            self._found.add("seed", "works")

    async def _several(self) -> None:
        try:
            reply = await self._ask(temperature=1.0, max_tokens=1, n=2)
        except EndpointError:
            self._found.add("n = 2", "refused")  # not used: every answer has a seed of its own
        else:
            self._found.add("n = 2", "yes" if len(reply.choices) == 2 else "ignored")

    async def _continues(self) -> None:
        if self._dialect.chat is not None:
            request = Request(0, self._messages, 1, 7, prefix="<think>\nWell")
            body = self._dialect.body(request, SamplingParams(), self._server)
            try:
                await self._caller.post(self._server, self._dialect.path, body)
            except EndpointError as error:
                self._found.add("continues", "no", str(error) if self._needs.prefix else "", fatal=self._needs.prefix)
            else:
                self._found.add("continues", "text" if self._dialect.prompt_as_text else "token ids")
            return
        try:
            style = await find_continuation(self._caller, self._server)
        except EndpointError as error:
            self._found.add("continues", "no", str(error) if self._needs.prefix else "", fatal=self._needs.prefix)
        else:
            self._found.add("continues", f"chat: {style}")

    async def _reads(self) -> None:
        """Let the server read a few tokens and say how likely each was."""
        ids = self._dialect.prompt(Request(0, self._messages, 1, 7)).tolist()
        body = {"model": self._config.model, "prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1}
        try:
            reply = await self._caller.post(self._server, "/completions", body)
            told = len(_values(reply.choices[0])) > len(ids)
        except EndpointError:
            told = False
        remedy = "score.by = 'teacher' needs a server that echoes a prompt with its log-probabilities (vLLM does)"
        self._found.add("reads", "yes" if told else "no", "" if told else remedy, fatal=not told)


def _values(choice: Choice) -> list[float | None]:
    found = choice.logprobs
    if found is None:
        return []
    return found.token_logprobs or [token.logprob for token in found.content or []]


def _names(choice: Choice) -> list[Any]:
    """Return what identifies each token."""
    if choice.token_ids is not None:
        return list(choice.token_ids)
    found = choice.logprobs
    if found is None:
        return []
    return [*(found.tokens or ()), *(token.spelt() for token in found.content or ())]


def _text(reply: Reply) -> list[Any]:
    return [reply.choices[0].text, reply.choices[0].message]


def _alternatives(choice: Choice) -> dict[str, float]:
    """Return the first token's log-probability and those of the tokens that the server names beside it."""
    found = choice.logprobs
    if found is None:
        return {}
    if found.content:
        first = found.content[0]
        tokens = [first, *(first.top_logprobs or [])]
        return {token.token: token.logprob for token in tokens if token.logprob is not None}
    named = (found.top_logprobs or [None])[0] or {}
    return dict(named)


def spread(one: dict[str, float], other: dict[str, float]) -> float | None:
    """Return how much wider apart `other` has the same alternatives: about 1 for raw ones, 1/T for tempered ones.

    None when there are too few in common, or too close to each other, to tell.
    """
    common = sorted(name for name in one.keys() & other.keys() if min(one[name], other[name]) > PLACEHOLDER)
    if len(common) < 2:
        return None
    x, y = (np.array([logprobs[name] for name in common], dtype=np.float64) for logprobs in (one, other))
    x, y = x - x.mean(), y - y.mean()
    if not np.isfinite(x).all() or not np.isfinite(y).all() or float(x @ x) < _SPREAD:
        return None
    return float(x @ y) / float(x @ x)
