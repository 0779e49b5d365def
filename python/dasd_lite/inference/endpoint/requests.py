"""How a server is asked, and how its reply becomes a completion: token ids in and out, or chat.

Input: requests; a `Chat` when the config names the model's tokenizer. Output: JSON bodies and
completions. Invariant: with a tokenizer the prompt is ours to the token, and a given prefix is
continued where it ends; without one the server applies its own template, and a prefix is continued
only in the way that the probe has found to keep it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import Ids
from dasd_lite.config.models import EndpointModel
from dasd_lite.errors import DataError, EndpointError
from dasd_lite.inference import Completion, Request, SamplingParams
from dasd_lite.inference.endpoint.client import Server
from dasd_lite.inference.endpoint.replies import (
    Answer,
    Choice,
    Reply,
    TokenCounts,
    chat_answer,
    id_logprobs,
    spoken,
    text_answer,
    token_ids,
)

Continuation = Literal["", "continue_final_message", "prefix"]


@dataclass
class RequestBuilder:
    """The way in which one model is asked."""

    config: EndpointModel
    chat: Chat | None
    """Tokenizer and template; none: through /chat/completions."""
    prompt_as_text: bool = False
    """The server takes no token ids as a prompt, only text."""
    continuation: Continuation = ""
    """How a chat server is told to go on from the last message: vLLM's option, or a mark in the message."""

    @property
    def path(self) -> str:
        """Return what is behind the base URL."""
        return "/completions" if self.chat else "/chat/completions"

    def body(
        self, request: Request, params: SamplingParams, server: Server, *, top_logprobs: int = 0
    ) -> dict[str, Any]:
        """Return the JSON body that asks for `request`; raises DataError where the prompt leaves no room."""
        body = {
            "model": self.config.model,
            "max_tokens": request.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            # Some servers read 32 bits, some a double; vLLM takes all, and then writes what it would write here.
            "seed": request.seed if server.is_vllm else request.seed % 2**31,
        }
        # Not part of OpenAI's interface, so told only where they say something; a vLLM server would
        # otherwise take them from the model's folder.
        if params.top_k or server.is_vllm:
            body["top_k"] = params.top_k
        if params.min_p or server.is_vllm:
            body["min_p"] = params.min_p
        if server.is_vllm:
            body["repetition_penalty"] = 1.0
        if self.chat is None:
            asked = {"logprobs": True} if self.config.logprobs else {}
            return body | asked | self._messages(request) | ({"top_logprobs": top_logprobs} if top_logprobs else {})
        ids = self.prompt(request)
        if server.context is not None:
            room = server.context - len(ids)
            if room <= 0:
                raise DataError(
                    f"request {request.position}: its prompt of {len(ids)} tokens leaves no room for an answer in the"
                    f" context of {server.base_url}, {server.context}: {request.messages[-1]['content'][:60]!r}"
                )
            body["max_tokens"] = min(request.max_tokens, room)
        body |= {
            "prompt": self._spell(ids) if self.prompt_as_text else ids.tolist(),
        }
        if self.config.logprobs:
            body["logprobs"] = max(top_logprobs, 1)  # 0 would do, but some servers read it as "no"
        if server.is_vllm:
            body |= {"return_token_ids": True, "stop_token_ids": list(self.chat.answer_end_ids)}
        return body

    def prompt(self, request: Request) -> Ids:
        """Return the ids to go on from; only with a tokenizer."""
        assert self.chat is not None
        return self.chat.prompt_ids(request.messages, request.prefix)

    def _spell(self, ids: Ids) -> str:
        assert self.chat is not None
        return b"".join(self.chat.piece(int(i)) for i in ids).decode()

    def _messages(self, request: Request) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [dict(message) for message in request.messages]
        if not request.prefix:
            return {"messages": messages}
        begun: dict[str, Any] = {"role": "assistant", "content": request.prefix}
        if self.continuation == "prefix":
            return {"messages": [*messages, {**begun, "prefix": True}]}
        options = {"continue_final_message": True, "add_generation_prompt": False}
        return {"messages": [*messages, begun], **options}

    def read(self, request: Request, reply: Reply, source: str) -> Completion:
        """Turn a reply into the request's completion; raises EndpointError where it lacks what the method needs."""
        choice, usage = reply.choices[0], reply.usage or TokenCounts()
        self._check_prompt(request, usage, source)
        ids = token_ids(choice) if self.chat is not None else None
        if self.chat is not None and ids is None and self.chat.writes_channels:
            raise EndpointError(f"{source} returns no token ids, without which channels (gpt-oss) cannot be read")
        if self.chat is not None and ids is not None:
            answer = self._by_ids(self.chat, request, choice, ids, source)
        elif not self.config.logprobs:
            answer = self._text_alone(request, choice)
        elif self.chat is None:
            answer = chat_answer(choice, source, continued=bool(request.prefix))
        else:
            answer = text_answer(choice, source)
            answer.text = answer.text if request.prefix else self.chat.think_prefix + answer.text
        return Completion(
            position=request.position,
            text=answer.text,
            token_ids=np.asarray(ids or [], dtype=np.int32) if len(answer.logprobs) else np.zeros(0, np.int32),
            logprobs=answer.logprobs,
            token_bytes=answer.token_bytes,
            finish_reason=answer.finish_reason,
            prompt_tokens=usage.prompt_tokens or 0,
            completion_tokens=usage.completion_tokens or 0,
        )

    def _check_prompt(self, request: Request, usage: TokenCounts, source: str) -> None:
        """Refuse a server that has read another prompt than it was sent: one with a second BOS, say."""
        if self.chat is not None and usage.prompt_tokens is not None:
            sent = len(self.prompt(request))
            if usage.prompt_tokens != sent:
                raise EndpointError(
                    f"{source} has read {usage.prompt_tokens} tokens where {sent} were sent; teacher.tokenizer must be"
                    " that of the model served, and the server must add nothing (no BOS)"
                )

    def _text_alone(self, request: Request, choice: Choice) -> Answer:
        """Take an answer whose tokens nobody asked for."""
        text, finish_reason = spoken(choice)
        if self.chat is not None:
            text = (choice.text or "") if request.prefix else self.chat.think_prefix + (choice.text or "")
        none = np.zeros(0, np.int32)
        return Answer(text, none.astype(np.float32), none, finish_reason)

    def _by_ids(self, chat: Chat, request: Request, choice: Choice, ids: list[int], source: str) -> Answer:
        if max(ids, default=0) >= chat.vocab_size:
            raise EndpointError(
                f"{source} returns token {max(ids)}, which {self.config.tokenizer} does not have;"
                " teacher.tokenizer must be that of the model served"
            )
        text, token_bytes, finish_reason = chat.read(ids, choice.finish_reason or "unknown", request.prefix)
        if not self.config.logprobs:
            none = np.zeros(0, np.int32)
            return Answer(text, none.astype(np.float32), none, finish_reason)
        return Answer(text, id_logprobs(choice, len(ids), source), token_bytes, finish_reason)
