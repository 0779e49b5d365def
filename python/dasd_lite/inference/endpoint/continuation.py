"""Can a chat server continue a half-written answer, its thinking included? Three requests of one token show it.

Input: a server. Output: the option that makes it continue, or an EndpointError that names the server. Several servers
accept such a request but silently drop the thinking or begin a new answer. The number of prompt tokens that they count
reveals both.
"""

from __future__ import annotations

import asyncio
from typing import Any

from dasd_lite.config.models import Endpoint
from dasd_lite.errors import EndpointError
from dasd_lite.inference.endpoint.client import Client, Server, TransientError, backoff
from dasd_lite.inference.endpoint.requests import Continuation

_QUESTION = {"role": "user", "content": "Count in words."}
_THOUGHT = "<think>\nOne, two, three"
_MORE = ", four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen"
_MIN_MORE_TOKENS = 13  # words of _MORE: the fewest tokens that it adds if the thinking is kept
_MAX_TRIES = 3
STYLES: tuple[Continuation, ...] = ("continue_final_message", "prefix")


async def find_continuation(client: Client, server: Server) -> Continuation:
    """Return the option that makes `server` continue a given answer; raises EndpointError if there is none."""
    plain = await _prompt_tokens(client, server, _body(client.config, "", _THOUGHT))
    for style in STYLES:
        short = await _prompt_tokens(client, server, _body(client.config, style, _THOUGHT))
        long = await _prompt_tokens(client, server, _body(client.config, style, _THOUGHT + _MORE))
        if short is None or long is None or long - short < _MIN_MORE_TOKENS:
            continue  # rejected, or the thinking was dropped
        if plain is None or short < plain:  # otherwise the answer was closed and a new one begun
            return style
    raise EndpointError(
        f"{server.base_url}: cannot continue a half-written answer and its thinking through chat, which mix needs;"
        " set teacher.tokenizer for a server that completes token ids (vLLM), run the teacher on this machine"
        " (kind = 'vllm' or 'transformers'), or remove the mixed phase"
    )


def _body(config: Endpoint, style: Continuation, thought: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": thought}
    options: dict[str, Any] = {}
    if style == "prefix":
        message["prefix"] = True
    elif style:
        options = {"continue_final_message": True, "add_generation_prompt": False}
    return {"model": config.model, "messages": [_QUESTION, message], "max_tokens": 1, "temperature": 0.0, **options}


async def _prompt_tokens(client: Client, server: Server, body: dict[str, Any]) -> int | None:
    """Return how many prompt tokens the server counts; None if it rejects the request or does not report them."""
    for attempt in range(_MAX_TRIES):
        try:
            reply = await client.post(server, "/chat/completions", body)
        except EndpointError:
            return None
        except TransientError:
            await asyncio.sleep(backoff(attempt + 1))
        else:
            return reply.usage.prompt_tokens if reply.usage else None
    return None
