"""What a teacher behind an endpoint can do: about twenty short requests, sent before the first long one.

Input: an endpoint's config, one real question, and what the recipe requires. Output: one ProbeResult per server;
findings that make the run impossible are fatal. Invariant: nothing is assumed; what a server does not reveal is
"unknown", never "yes".
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dasd_lite.chat.chat import Chat
from dasd_lite.config.models import Endpoint
from dasd_lite.config.stages import NEED_NO_LOGPROBS
from dasd_lite.data.hub import model_folder
from dasd_lite.data.records import Message
from dasd_lite.errors import EndpointError
from dasd_lite.inference import Request, SamplingParams
from dasd_lite.inference.endpoint.client import Client, Server, TransientError, backoff, trusted_certificates
from dasd_lite.inference.endpoint.continuation import find_continuation
from dasd_lite.inference.endpoint.replies import PLACEHOLDER, Choice, Reply, token_ids
from dasd_lite.inference.endpoint.requests import RequestBuilder
from dasd_lite.inference.endpoint.sampler import api_key

NUM_TOKENS = 32  # of one probe answer
_FEW_TOKENS = 8  # where only log-probabilities matter
_MAX_TRIES = 4
_NUM_EQUAL = 10  # equal requests at once
_LOW_TEMPERATURE = 0.5  # at which tempered log-probabilities show
_MAX_TIMEOUT_S = 60.0  # for one probe answer
_MIN_SPREAD = 0.05  # squared nats between alternatives, below which they show nothing


@dataclass(frozen=True)
class Requirements:
    """What the recipe requires of its teacher."""

    tempered: bool = True
    """It samples at a temperature other than 1, so log-probabilities must be raw."""
    thinking: bool = True
    """It rejects answers without a thinking part."""
    prefix: bool = False
    """It has a mixed phase: the teacher continues the student's answers."""
    max_tokens: int = 0
    """The longest answer that it samples."""
    scoring: bool = False
    """score.by = 'teacher': the teacher scores given answers."""


@dataclass(frozen=True)
class Finding:
    """One property of a server."""

    name: str
    value: str
    remedy: str = ""
    fatal: bool = False


@dataclass
class ProbeResult:
    """All findings about one server."""

    base_url: str
    items: list[Finding] = field(default_factory=list)

    @property
    def answers(self) -> bool:
        """Whether the server answered at all."""
        return not any(item.name == "answers" and item.value in ("no", "not now") for item in self.items)

    def add(self, name: str, value: str, remedy: str = "", *, fatal: bool = False) -> None:
        """Add a finding."""
        self.items.append(Finding(name, value, remedy, fatal))


def probe_servers(config: Endpoint, messages: Sequence[Message], requirements: Requirements) -> list[ProbeResult]:
    """Probe every server of `config` with the question `messages`; raises ConfigError for a bad address or key."""
    key = api_key(config)
    chat = Chat(model_folder(config.tokenizer)) if config.tokenizer else None
    return asyncio.run(_probe_all(config, key, chat, tuple(messages), requirements))


async def _probe_all(
    config: Endpoint, key: str, chat: Chat | None, messages: tuple[Message, ...], requirements: Requirements
) -> list[ProbeResult]:
    impatient = config.model_copy(update={"timeout_s": min(config.timeout_s, _MAX_TIMEOUT_S)})
    client = Client(impatient, key, trusted_certificates())
    servers = [Server(url) for url in config.base_urls]
    probes = [_Probe(client, server, RequestBuilder(config, chat), messages, requirements) for server in servers]
    try:
        return list(await asyncio.gather(*(probe.run() for probe in probes)))
    finally:
        await client.close()


class _Probe:
    """The probe of one server."""

    def __init__(
        self,
        client: Client,
        server: Server,
        builder: RequestBuilder,
        messages: tuple[Message, ...],
        requirements: Requirements,
    ) -> None:
        self._client, self._server, self._builder = client, server, builder
        self._messages, self._required = messages, requirements
        self._config = client.config
        self._source = f"{server.base_url}{builder.path}: {self._config.model!r}"
        self._result = ProbeResult(server.base_url)
        self._unsupported: tuple[str, ...] = ()  # options that the server rejects

    async def run(self) -> ProbeResult:
        problem = await self._client.describe(self._server)
        try:
            if problem:
                raise EndpointError(f"{self._server.base_url}: {problem}")
            first = await self._first()
        except EndpointError as error:
            self._result.add("answers", "no", str(error), fatal=True)
        except TransientError as failure:
            self._result.add("answers", "not now", f"{failure}; tried {_MAX_TRIES} times")
        else:
            try:
                await self._probe(first)
            except (EndpointError, TransientError) as error:
                self._result.add("answers", "not always", str(error))
        return self._result

    async def _probe(self, first: Reply) -> None:
        self._model(first)
        self._context()
        self._usage(first)
        if self._logprobs(first):
            await self._raw(first)
            await self._noise()
        self._thinking(first)
        await self._seed()
        await self._several()
        await self._continues()
        if self._required.scoring:
            await self._scores()

    async def _first(self) -> Reply:
        """Ask once, then without options that the server may reject: alternatives, token ids, log-probabilities."""
        try:
            return await self._ask(temperature=1.0, top_logprobs=5)
        except EndpointError:
            self._builder.prompt_as_text = self._builder.chat is not None
        try:
            return await self._ask(temperature=1.0, top_logprobs=5 if self._builder.chat else 0)
        except EndpointError:
            self._unsupported = ("logprobs", "top_logprobs")
            return await self._ask(temperature=1.0)

    async def _ask(
        self, *, temperature: float, seed: int = 7, max_tokens: int = NUM_TOKENS, top_logprobs: int = 0, **extra: Any
    ) -> Reply:
        """Ask the question, with retries; raises EndpointError, or TransientError if retries do not help."""
        request = Request(0, self._messages, max_tokens, seed)
        body = self._builder.body(request, SamplingParams(temperature), self._server, top_logprobs=top_logprobs)
        body = {name: value for name, value in body.items() if name not in self._unsupported}
        for attempt in range(1, _MAX_TRIES):
            try:
                return await self._client.post(self._server, self._builder.path, body | extra)
            except TransientError as failure:
                if failure.costly and attempt > 1:
                    raise
                await asyncio.sleep(failure.wait_s or backoff(attempt))
        return await self._client.post(self._server, self._builder.path, body | extra)

    def _model(self, reply: Reply) -> None:
        name = reply.model or "unknown"
        remedy = ""
        if self._server.is_vllm and self._builder.chat is None:
            remedy = (
                f"this is a vLLM server; set teacher.tokenizer = {self._server.root!r} to send it token ids, which"
                " avoids a second rendering of the prompt and lets mix and score use it"
            )
        elif reply.model and reply.model != self._config.model:
            remedy = f"the recipe names {self._config.model!r}; make sure that this is the teacher you want"
        self._result.add("answers as", name, remedy)

    def _context(self) -> None:
        """Check the longest answer; without a tokenizer a request cannot be shortened to fit the context."""
        context, max_tokens = self._server.context, self._required.max_tokens
        if context is not None and self._builder.chat is None and max_tokens >= context:
            remedy = f"max_tokens = {max_tokens} leaves no room for a question; lower it, or set teacher.tokenizer"
            self._result.add("context", f"{context:,}", remedy, fatal=True)

    def _usage(self, reply: Reply) -> None:
        budget = self._config.budget
        if reply.usage is None:
            has_budget = budget.max_tokens is not None or budget.max_cost is not None
            remedy = "the server does not count tokens, so costs are unknown and a budget cannot be kept"
            remedy += "; remove teacher.budget" if has_budget else ""
            self._result.add("usage", "not reported", remedy, fatal=has_budget)

    def _logprobs(self, reply: Reply) -> bool:
        """Check that there are log-probabilities, and that the tokens add up to the text."""
        if not self._config.logprobs:
            self._result.add("logprobs", "not requested")
            return False
        choice = reply.choices[0]
        values = _values(choice)
        if not values or any(value is None for value in values):
            remedy = (
                "enable `logprobs` on the server, use a provider that returns them, or run the model on this machine"
                f" (kind = 'vllm'); or do without: teacher.logprobs = false and select.rule = {NEED_NO_LOGPROBS}"
            )
            self._result.add("logprobs", "rejected" if self._unsupported else "none", remedy, fatal=True)
            return False
        self._result.add("logprobs", "yes")
        try:
            self._builder.completion(Request(0, self._messages, NUM_TOKENS, 7), reply, self._source)
        except EndpointError as error:
            self._result.add("bytes", "do not add up", str(error), fatal=True)
            return False
        self._result.add("bytes", "token ids" if self._builder.chat and token_ids(choice) else "add up")
        return True

    async def _raw(self, first: Reply) -> None:
        """Compare the first token's alternatives at two temperatures: raw ones stay, tempered ones spread."""
        try:
            low = await self._ask(temperature=_LOW_TEMPERATURE, max_tokens=1, top_logprobs=5)
        except EndpointError:
            low = await self._ask(temperature=_LOW_TEMPERATURE, max_tokens=1)
        ratio = spread(_alternatives(first.choices[0]), _alternatives(low.choices[0]))
        if ratio is None:
            remedy = "the server returns no alternatives to compare; sample at temperature 1, or ask its operator"
            self._result.add("raw", "unknown", remedy if self._required.tempered else "")
        elif ratio < (1 + 1 / _LOW_TEMPERATURE) / 2:
            self._result.add("raw", "yes")
        else:
            remedy = (
                f"log-probabilities are computed after temperature (spread × {ratio:.2f} at T={_LOW_TEMPERATURE});"
                " start vLLM with --logprobs-mode raw_logprobs, or sample at temperature 1 only"
            )
            self._result.add("raw", "tempered", remedy, fatal=self._required.tempered)

    async def _noise(self) -> None:
        """Send equal greedy requests at once, and measure how far apart their log-probabilities are."""
        equal = (self._ask(temperature=0.0, max_tokens=_FEW_TOKENS) for _ in range(_NUM_EQUAL))
        replies = [r for r in await asyncio.gather(*equal, return_exceptions=True) if isinstance(r, Reply)]
        if len(replies) < 2:
            remedy = f"the server did not answer {_NUM_EQUAL} requests at once; lower teacher.concurrency"
            self._result.add("noise", "unknown", remedy)
            return
        rows = [[p for p in _values(reply.choices[0]) if p is not None] for reply in replies]
        names = [_names(reply.choices[0]) for reply in replies]
        gap = 0.0
        for row, name in zip(rows[1:], names[1:], strict=True):
            for i, (one, other) in enumerate(zip(rows[0], row, strict=False)):
                if names[0][:i] != name[:i]:
                    break  # the texts differ from here on
                if names[0][i] == name[i]:
                    gap = max(gap, abs(one - other))
        remedy = "smaller differences between two log-probabilities mean nothing" if gap > 0.01 else ""
        self._result.add("noise", f"{gap:.1g}", remedy)

    def _thinking(self, reply: Reply) -> None:
        choice = reply.choices[0]
        message = choice.message
        text = choice.text or (message.content if message else "") or ""
        chat = self._builder.chat
        if chat is not None and (ids := token_ids(choice)):
            text = chat.decode_answer(ids, "length")[0]
        if message is not None and (message.reasoning_content or message.reasoning):
            self._result.add("thinking", "own field")
        elif "<think>" in text or (chat is not None and "<think>" in chat.think_prefix):
            self._result.add("thinking", "in text")
        else:
            remedy = (
                "the answer does not begin with a thinking part (neither reasoning_content nor <think>); if the"
                " template itself writes <think>, set teacher.tokenizer or start the server with its reasoning parser;"
                " otherwise use a teacher that shows its thinking, or set select.require_think = false"
            )
            self._result.add("thinking", "none", remedy, fatal=self._required.thinking)

    async def _seed(self) -> None:
        replies = [await self._ask(temperature=1.0, seed=seed, max_tokens=NUM_TOKENS) for seed in (11, 11, 12)]
        first, same, other = (_names(reply.choices[0]) or _text(reply) for reply in replies)
        if first != same:
            remedy = "the same seed gives different answers: the run can be resumed, but not reproduced exactly"
            self._result.add("seed", "ignored", remedy)
        elif first == other:
            remedy = "different seeds give the same answer; if there is a cache in front of the model, turn it off"
            self._result.add("seed", "no effect seen", remedy)
        else:
            self._result.add("seed", "works")

    async def _several(self) -> None:
        try:
            reply = await self._ask(temperature=1.0, max_tokens=1, n=2)
        except EndpointError:
            self._result.add("n = 2", "rejected")  # not used: every answer has its own seed
        else:
            self._result.add("n = 2", "yes" if len(reply.choices) == 2 else "ignored")

    async def _continues(self) -> None:
        required = self._required.prefix
        try:
            if self._builder.chat is None:
                value = f"chat: {await find_continuation(self._client, self._server)}"
            else:
                request = Request(0, self._messages, 1, 7, prefix="<think>\nWell")
                body = self._builder.body(request, SamplingParams(), self._server)
                await self._client.post(self._server, self._builder.path, body)
                value = "text" if self._builder.prompt_as_text else "token ids"
        except EndpointError as error:
            self._result.add("continues", "no", str(error) if required else "", fatal=required)
        else:
            self._result.add("continues", value)

    async def _scores(self) -> None:
        """Check that the server echoes a prompt with its log-probabilities."""
        ids = self._builder.prompt(Request(0, self._messages, 1, 7)).tolist()
        body = {"model": self._config.model, "prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1}
        try:
            reply = await self._client.post(self._server, "/completions", body)
            can_score = len(_values(reply.choices[0])) > len(ids)
        except EndpointError:
            can_score = False
        remedy = "score.by = 'teacher' needs a server that echoes a prompt with its log-probabilities, as vLLM does"
        self._result.add("scores", "yes" if can_score else "no", "" if can_score else remedy, fatal=not can_score)


def _values(choice: Choice) -> list[float | None]:
    logprobs = choice.logprobs
    if logprobs is None:
        return []
    return logprobs.token_logprobs or [token.logprob for token in logprobs.content or []]


def _names(choice: Choice) -> list[Any]:
    """Return what identifies each token."""
    if choice.token_ids is not None:
        return list(choice.token_ids)
    logprobs = choice.logprobs
    if logprobs is None:
        return []
    return [*(logprobs.tokens or ()), *(token.to_bytes() for token in logprobs.content or ())]


def _text(reply: Reply) -> list[Any]:
    return [reply.choices[0].text, reply.choices[0].message]


def _alternatives(choice: Choice) -> dict[str, float]:
    """Return the log-probabilities of the first token and its alternatives, as far as the server reports them."""
    logprobs = choice.logprobs
    if logprobs is None:
        return {}
    if logprobs.content:
        first = logprobs.content[0]
        tokens = [first, *(first.top_logprobs or [])]
        return {token.token: token.logprob for token in tokens if token.logprob is not None}
    return dict((logprobs.top_logprobs or [None])[0] or {})


def spread(one: dict[str, float], other: dict[str, float]) -> float | None:
    """Return how much wider `other` spreads the same alternatives: about 1 if raw, 1/T if tempered.

    None if too few are in both, or they are too close to each other to show anything.
    """
    common = sorted(name for name in one.keys() & other.keys() if min(one[name], other[name]) > PLACEHOLDER)
    if len(common) < 2:
        return None
    x, y = (np.array([logprobs[name] for name in common], dtype=np.float64) for logprobs in (one, other))
    x, y = x - x.mean(), y - y.mean()
    if not np.isfinite(x).all() or not np.isfinite(y).all() or float(x @ x) < _MIN_SPREAD:
        return None
    return float(x @ y) / float(x @ x)
