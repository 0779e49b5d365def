"""Can a chat server go on from a half-written answer, with its thinking? Three requests of one token tell.

Input: a server. Output: how it is told to, or an EndpointError that names it. Several servers accept
such a request and drop the thinking, or begin a new answer, without a word; the number of prompt
tokens that they count gives both away.
"""

from __future__ import annotations

import asyncio
from typing import Any

from dasd_lite.config.models import EndpointModel
from dasd_lite.errors import EndpointError
from dasd_lite.inference.endpoint.client import Client, Server, TransientError, backoff
from dasd_lite.inference.endpoint.requests import Continuation

_QUESTION = {"role": "user", "content": "Count in words."}
_THOUGHT = "<think>\nOne, two, three"
_MORE = ", four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen"
_WORDS = 13  # of _MORE: at least so many tokens more, if the thinking is read
_TRIES = 3
STYLES: tuple[Continuation, ...] = ("continue_final_message", "prefix")


async def find_continuation(caller: Client, server: Server) -> Continuation:
    """Return how `server` is told to continue a given answer; raises EndpointError when it cannot or does not say."""
    plain = await _prompt_tokens(caller, server, _body(caller.config, "", _THOUGHT))
    for style in STYLES:
        short = await _prompt_tokens(caller, server, _body(caller.config, style, _THOUGHT))
        long = await _prompt_tokens(caller, server, _body(caller.config, style, _THOUGHT + _MORE))
        if short is None or long is None or long - short < _WORDS:
            continue  # refused, or the thinking is not read
        if plain is None or short < plain:  # else the answer was closed and another one begun
            return style
    raise EndpointError(
        f"{server.base_url}: cannot go on from a half-written answer with its thinking through chat, which mix needs;"
        " set teacher.tokenizer for a server that completes token ids (vLLM), run the teacher here"
        " (kind = 'vllm' or 'transformers'), or leave the mixed phase out"
    )


def _body(config: EndpointModel, style: Continuation, thought: str) -> dict[str, Any]:
    begun: dict[str, Any] = {"role": "assistant", "content": thought}
    options: dict[str, Any] = {}
    if style == "prefix":
        begun["prefix"] = True
    elif style:
        options = {"continue_final_message": True, "add_generation_prompt": False}
    return {"model": config.model, "messages": [_QUESTION, begun], "max_tokens": 1, "temperature": 0.0, **options}


async def _prompt_tokens(caller: Client, server: Server, body: dict[str, Any]) -> int | None:
    """Return how many prompt tokens the server counts; none when it refuses or does not say."""
    for attempt in range(_TRIES):
        try:
            reply = await caller.post(server, "/chat/completions", body)
        except EndpointError:
            return None
        except TransientError:
            await asyncio.sleep(backoff(attempt + 1))
        else:
            return reply.usage.prompt_tokens if reply.usage else None
    return None
