"""A real HTTP server on loopback that answers like an OpenAI-compatible one, and misbehaves on a schedule.

`with ChatServer(faults={0: "429", "question 3": "cut"}) as server:` answers the first request with a 429, cuts off
every reply to "question 3", and replies `answer(body)` to all others; the key -1 stands for all requests.
`server.answered` has the requests that got a complete reply. `habits` are what some providers always do: "tempered",
"no logprobs", "refuses logprobs", "no usage", "no seed", "no n", "no alternatives", "no models", "vllm", "continue",
"forgets thinking", "one id". After `held = server.hold(number)` the requests from that number on wait: a test that has
waited for the event `held` knows that the client is at work and cannot end before `server.drop_held()` closes them.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

END = b"<|im_end|>"
_IDS = itertools.count()


def pieces_of(text: str, size: int = 3) -> list[bytes]:
    """Cut a text into tokens of `size` bytes, even within a character, as byte-level tokenizers do."""
    raw = text.encode()
    return [raw[i : i + size] for i in range(0, len(raw), size)]


@dataclass
class Answer:
    """A model's answer as a server returns it."""

    content: str | None
    pieces: list[bytes]
    reasoning: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"

    def tokens(self, sharpness: float = 1.0, alternatives: int = 0) -> list[dict[str, Any]]:
        return [
            {
                "token": p.decode(errors="replace"),
                "logprob": -0.25 * (i % 7) * sharpness,
                "bytes": list(p),
                "top_logprobs": [
                    {"token": f"other {n}", "logprob": (-1.0 - n) * sharpness, "bytes": None}
                    for n in range(alternatives)
                ],
            }
            for i, p in enumerate(self.pieces)
        ]

    def reply(self, logprobs: object, body: dict[str, Any] | None = None) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.content, **self.reasoning}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}
        usage = {"prompt_tokens": prompt_tokens(body or {}), "completion_tokens": len(self.pieces)}
        return {
            "id": f"chatcmpl-{next(_IDS)}",
            "object": "chat.completion",
            "model": (body or {}).get("model", "teacher"),
            "choices": [choice],
            "usage": usage,
        }


def prompt_tokens(body: dict[str, Any]) -> int:
    """Count words, two tokens around each message, and two to begin an answer unless one is continued."""
    messages = body.get("messages", [])
    words = sum(len(m["content"].split()) + 2 for m in messages)
    return words + (2 if body.get("add_generation_prompt", True) else -1)


def plain(body: dict[str, Any]) -> Answer:
    """Answer with the question and the seed, in a text that is not ASCII."""
    text = f"{body['messages'][-1]['content']} → naïve 🙂 漢字, seed {body['seed']}"
    return Answer(text, [*pieces_of(text), END])


class ChatServer:
    """The server: its address, the requests that it got, and those that got a complete reply."""

    def __init__(
        self,
        faults: Mapping[int | str, str] | None = None,
        answer: Callable[[dict[str, Any]], Answer] = plain,
        habits: Iterable[str] = (),
        delay_s: float = 0.0,
    ) -> None:
        self.faults, self.answer, self.habits, self.delay_s = dict(faults or {}), answer, set(habits), delay_s
        self.model, self.context = "teacher", 4096
        self.asked: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.busy = self.most_busy = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.hold_from: int | None = None
        self._held, self.dropped = threading.Event(), threading.Event()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.chat = self
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def hold(self, number: int) -> threading.Event:
        """Hold the requests from the `number`-th on; return an event that is set when the first one arrives."""
        self._held, self.dropped, self.hold_from = threading.Event(), threading.Event(), number
        return self._held

    def waits(self, number: int) -> bool:
        """Hold a request if `hold` asked for it; return whether it was held."""
        if self.hold_from is None or number < self.hold_from:
            return False
        dropped = self.dropped
        self._held.set()
        dropped.wait()
        return True

    def drop_held(self) -> None:
        """Close the connections of held requests, and hold no more."""
        self.hold_from = None
        self.dropped.set()

    def __exit__(self, *_: object) -> None:
        self.closing.set()  # ends requests that hang
        self.drop_held()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    chat: ChatServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: clients that give up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        chat = self.server.chat
        if self.path != "/v1/models" or "no models" in chat.habits:
            self._error(404, f"no such path: {self.path}")
            return
        model = {"id": chat.model, "owned_by": "someone"}
        if "vllm" in chat.habits:
            model |= {"owned_by": "vllm", "root": "/models/teacher", "max_model_len": chat.context}
        self._send(200, json.dumps({"data": [model]}).encode())

    def do_POST(self) -> None:
        chat = self.server.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with chat.lock:
            number = len(chat.asked)
            chat.asked.append(body)
            chat.keys.add(self.headers["Authorization"])
            chat.busy += 1
            chat.most_busy = max(chat.most_busy, chat.busy)
        question = body["messages"][-1]["content"] if "messages" in body else ""
        fault = next((chat.faults[key] for key in (number, question, -1) if key in chat.faults), "")
        try:
            if chat.waits(number):
                self.close_connection = True
                return
            if chat.delay_s:
                chat.closing.wait(chat.delay_s)
            self._answer(chat, body, fault)
        finally:
            with chat.lock:
                chat.busy -= 1

    def _answer(self, chat: ChatServer, body: dict[str, Any], fault: str) -> None:
        if self.path != "/v1/chat/completions":
            self._error(404, f"no such path: {self.path}")
        elif body["model"] != chat.model:
            self._error(404, f"The model `{body['model']}` does not exist.")
        elif fault.startswith("429"):  # "429 0.2" asks to wait
            self._error(429, "slow down", {"Retry-After": fault[4:]} if fault[4:] else {})
        elif fault in ("400", "401", "403", "404", "500", "502", "503"):
            self._error(int(fault), f"fault {fault} for {self.headers['Authorization']}")
        elif fault == "hang":
            chat.closing.wait(30)
            self.close_connection = True
        elif "refuses logprobs" in chat.habits and "logprobs" in body:
            self._error(400, "this model does not support logprobs")
        elif body["messages"][-1]["role"] == "assistant" and "continue" not in chat.habits:
            self._error(400, "the last message must be the user's")
        else:
            self._reply(chat, body, fault)

    def _reply(self, chat: ChatServer, body: dict[str, Any], fault: str) -> None:
        if "no seed" in chat.habits:
            body = {**body, "seed": len(chat.asked)}
        answer = chat.answer(body)
        if fault == "refusal":
            answer.content, answer.reasoning = None, {"refusal": answer.content or ""}
        if fault == "length":
            answer.finish_reason, answer.pieces = "length", answer.pieces[:-1]
        reply = answer.reply({"content": self._tokens(chat, body, answer, fault)}, body)
        for path in [fault, *chat.habits]:
            self._spoil(reply, path, body)
        raw = json.dumps(reply).encode()
        if fault == "big":  # 50 MB of white space in valid JSON
            raw = raw[:-1] + b" " * 50_000_000 + b"}"
        if fault == "cut":
            self._send(200, raw, length=2 * len(raw))
            self.close_connection = True
            return
        if fault == "garbage":
            self._send(200, raw[: len(raw) // 2])
            return
        if fault not in ("empty", "null", "short", "wrong bytes", "positive", "placeholder", "cut stream"):
            with chat.lock:  # before it is sent: who has the answer finds it here
                chat.answered.append(body)
        if fault == "error in stream":
            error = {"error": {"message": f"upstream refused {self.headers['Authorization']}"}}
            self._send(200, b"data: " + json.dumps(error).encode() + b"\n\n", {"Content-Type": "text/event-stream"})
        elif body.get("stream"):
            self._stream(reply, cut=fault == "cut stream")
        else:
            self._send(200, raw)
        if fault == "twice":
            self._send(200, raw)

    def _tokens(self, chat: ChatServer, body: dict[str, Any], answer: Answer, fault: str) -> list[dict[str, Any]]:
        tempered = "tempered" in chat.habits and body["temperature"] > 0
        alternatives = 0 if "no alternatives" in chat.habits else body.get("top_logprobs", 0)
        tokens = answer.tokens(1 / body["temperature"] if tempered else 1.0, alternatives)
        if fault == "short":
            return tokens[: len(tokens) // 2]
        if fault == "wrong bytes":
            tokens[1]["bytes"] = [*tokens[1]["bytes"], 33]
        if fault == "positive":
            tokens[1]["logprob"] = 0.5
        if fault == "placeholder":
            tokens[1]["logprob"] = -9999.0
        return tokens

    def _spoil(self, reply: dict[str, Any], how: str, body: dict[str, Any]) -> None:
        """Remove or change a part of the reply."""
        choice = reply["choices"][0]
        if "logprobs" not in body:
            choice["logprobs"] = None
        if how == "empty":
            reply["choices"] = []
        elif how in ("null", "no logprobs"):
            choice["logprobs"] = None
        elif how == "no usage":
            del reply["usage"]
        elif how == "one id":
            reply["id"] = "chatcmpl-0"
        elif how == "another model":
            reply["model"] = "cheaper-teacher"
        elif how == "refusal":
            choice["logprobs"] = {"content": None, "refusal": choice["logprobs"]["content"]}
        elif how == "forgets thinking":
            reply["usage"]["prompt_tokens"] = 20
        if how == "" and body.get("n", 1) > 1 and "no n" not in self.server.chat.habits:
            reply["choices"] = reply["choices"] * body["n"]

    def _stream(self, reply: dict[str, Any], *, cut: bool) -> None:
        """Send the reply a few tokens at a time, as server-sent events."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        choice = reply["choices"][0]
        tokens = (choice["logprobs"] or {"content": []})["content"]
        events: list[dict[str, Any]] = [
            {"id": reply["id"], "choices": [{"delta": {"content": choice["message"]["content"]}}]},
            *(
                {"model": reply["model"], "choices": [{"delta": {}, "logprobs": {"content": tokens[i : i + 4]}}]}
                for i in range(0, len(tokens), 4)
            ),
        ]
        if not cut:
            events += [
                {"choices": [{"delta": {}, "finish_reason": choice["finish_reason"]}]},
                {"choices": [], "usage": reply["usage"]},
            ]
        for event in events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.flush()
        if not cut:
            self.wfile.write(b"data: [DONE]\n\n")

    def _error(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps({"error": {"message": message}}).encode(), headers)

    def _send(
        self, status: int, raw: bytes, headers: Mapping[str, str] | None = None, *, length: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(raw)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)
