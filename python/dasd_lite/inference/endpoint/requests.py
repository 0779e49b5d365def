"""From a request to a JSON body, and from a reply to a completion: by token ids, or through chat.

Input: requests; a `Chat` if the config names the model's tokenizer. Output: JSON bodies and completions. Invariant:
with a tokenizer, the server gets exactly our prompt tokens and continues a given prefix where it ends; without one, the
server applies its own template and continues a prefix only in a way that is known to keep its thinking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import TokenIds
from dasd_lite.config.models import Endpoint
from dasd_lite.errors import DataError, EndpointError
from dasd_lite.inference import Completion, Request, SamplingParams
from dasd_lite.inference.endpoint.client import Server
from dasd_lite.inference.endpoint.replies import (
    Choice,
    ParsedAnswer,
    Reply,
    TokenCounts,
    answer_text,
    id_logprobs,
    parse_chat_choice,
    parse_text_choice,
    token_ids,
)

Continuation = Literal["", "continue_final_message", "prefix"]


@dataclass
class RequestBuilder:
    """Builds the requests for one model, and completions from their replies."""

    config: Endpoint
    chat: Chat | None
    """Tokenizer and template; None: use /chat/completions."""
    prompt_as_text: bool = False
    """Send the prompt as text, because the server does not accept token ids."""
    continuation: Continuation = ""
    """How a chat server is made to continue the last message: by vLLM's option, or by a flag in the message."""

    @property
    def path(self) -> str:
        """Path below the base URL."""
        return "/completions" if self.chat else "/chat/completions"

    def body(
        self, request: Request, params: SamplingParams, server: Server, *, top_logprobs: int = 0
    ) -> dict[str, Any]:
        """Return the JSON body for `request`; raises DataError if the prompt leaves no room for an answer."""
        body = {
            "model": self.config.model,
            "max_tokens": request.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            # Some servers accept 32 bits, some a double. vLLM accepts all bits, and then samples as it would here.
            "seed": request.seed if server.is_vllm else request.seed % 2**31,
        }
        # Not part of OpenAI's API, so only sent if they have an effect. A vLLM server always gets them: it would take
        # missing ones from the model's folder.
        if params.top_k or server.is_vllm:
            body["top_k"] = params.top_k
        if params.min_p or server.is_vllm:
            body["min_p"] = params.min_p
        if server.is_vllm:
            body["repetition_penalty"] = 1.0
        if self.chat is None:
            logprobs = {"logprobs": True} if self.config.logprobs else {}
            alternatives = {"top_logprobs": top_logprobs} if top_logprobs else {}
            return body | logprobs | self._messages(request) | alternatives
        ids = self.prompt(request)
        if server.context is not None:
            room = server.context - len(ids)
            if room <= 0:
                raise DataError(
                    f"request {request.position}: the prompt of {len(ids)} tokens leaves no room for an answer in the"
                    f" context of {server.base_url}, {server.context} tokens: {request.messages[-1]['content'][:60]!r}"
                )
            body["max_tokens"] = min(request.max_tokens, room)
        body["prompt"] = self._decode(ids) if self.prompt_as_text else ids.tolist()
        if self.config.logprobs:
            body["logprobs"] = max(top_logprobs, 1)  # 0 would be enough, but some servers take it for "no"
        if server.is_vllm:
            body |= {"return_token_ids": True, "stop_token_ids": list(self.chat.answer_end_ids)}
        return body

    def prompt(self, request: Request) -> TokenIds:
        """Return the ids to continue from; only with a tokenizer."""
        assert self.chat is not None
        return self.chat.prompt_ids(request.messages, request.prefix)

    def _decode(self, ids: TokenIds) -> str:
        assert self.chat is not None
        return b"".join(self.chat.piece(int(i)) for i in ids).decode()

    def _messages(self, request: Request) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [dict(message) for message in request.messages]
        if not request.prefix:
            return {"messages": messages}
        prefix: dict[str, Any] = {"role": "assistant", "content": request.prefix}
        if self.continuation == "prefix":
            return {"messages": [*messages, {**prefix, "prefix": True}]}
        options = {"continue_final_message": True, "add_generation_prompt": False}
        return {"messages": [*messages, prefix], **options}

    def completion(self, request: Request, reply: Reply, source: str) -> Completion:
        """Return the request's completion; raises EndpointError, naming `source`, if the reply lacks data."""
        choice, usage = reply.choices[0], reply.usage or TokenCounts()
        self._check_prompt(request, usage, source)
        ids = token_ids(choice) if self.chat is not None else None
        if self.chat is not None and ids is None and self.chat.uses_harmony:
            raise EndpointError(f"{source} returns no token ids, which are needed to read channels (gpt-oss)")
        if self.chat is not None and ids is not None:
            answer = self._from_ids(self.chat, request, choice, ids, source)
        elif not self.config.logprobs:
            answer = self._text_only(request, choice)
        elif self.chat is None:
            answer = parse_chat_choice(choice, source, continued=bool(request.prefix))
        else:
            answer = parse_text_choice(choice, source)
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
        """Check that the server did not change the prompt, by adding a second BOS token for example."""
        if self.chat is not None and usage.prompt_tokens is not None:
            sent = len(self.prompt(request))
            if usage.prompt_tokens != sent:
                raise EndpointError(
                    f"{source} counts {usage.prompt_tokens} prompt tokens, but {sent} were sent; teacher.tokenizer must"
                    " be the served model's, and the server must add no tokens (such as BOS)"
                )

    def _text_only(self, request: Request, choice: Choice) -> ParsedAnswer:
        """Return an answer without its tokens."""
        text, finish_reason = answer_text(choice)
        if self.chat is not None:
            text = (choice.text or "") if request.prefix else self.chat.think_prefix + (choice.text or "")
        return ParsedAnswer(text, np.zeros(0, np.float32), np.zeros(0, np.int32), finish_reason)

    def _from_ids(self, chat: Chat, request: Request, choice: Choice, ids: list[int], source: str) -> ParsedAnswer:
        if max(ids, default=0) >= chat.vocab_size:
            raise EndpointError(
                f"{source} returns token {max(ids)}, which {self.config.tokenizer} does not have;"
                " teacher.tokenizer must be the served model's"
            )
        text, token_bytes, finish_reason = chat.decode_answer(ids, choice.finish_reason or "unknown", request.prefix)
        if not self.config.logprobs:
            return ParsedAnswer(text, np.zeros(0, np.float32), np.zeros(0, np.int32), finish_reason)
        return ParsedAnswer(text, id_logprobs(choice, len(ids), source), token_bytes, finish_reason)
