"""A real HTTP server on loopback that answers like an OpenAI-compatible one, and misbehaves on a schedule.

`with ChatServer(faults={0: "429", "question 3": "cut"}) as server:` meets the first request with a 429, cuts the
answer to "question 3" short whenever it comes, and gives `answer(body)` to all others (-1 stands for all).
`server.answered` holds what was answered in full.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

END = b"<|im_end|>"


def pieces_of(text: str, size: int = 3) -> list[bytes]:
    """Cut a text into tokens of `size` bytes, through characters as byte-level tokenizers do."""
    raw = text.encode()
    return [raw[i : i + size] for i in range(0, len(raw), size)]


@dataclass
class Answer:
    """What a model wrote, as a server returns it."""

    content: str | None
    pieces: list[bytes]
    reasoning: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"

    def tokens(self) -> list[dict[str, Any]]:
        return [
            {"token": p.decode(errors="replace"), "logprob": -0.25 * (i % 7), "bytes": list(p)}
            for i, p in enumerate(self.pieces)
        ]

    def reply(self, logprobs: object) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.content, **self.reasoning}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}
        return {"id": "x", "object": "chat.completion", "choices": [choice]}


def plain(body: dict[str, Any]) -> Answer:
    """Answer with the question and the seed, in text that is not ASCII."""
    text = f"{body['messages'][-1]['content']} → naïve 🙂 漢字, seed {body['seed']}"
    return Answer(text, [*pieces_of(text), END])


class ChatServer:
    """The server: an address, what it was asked, and what it answered in full."""

    def __init__(
        self, faults: Mapping[int | str, str] | None = None, answer: Callable[[dict[str, Any]], Answer] = plain
    ) -> None:
        self.faults, self.answer = dict(faults or {}), answer
        self.asked: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.busy = self.most_busy = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.chat = self
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()  # those that hang
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    chat: ChatServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that has given up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        chat = self.server.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with chat.lock:
            number = len(chat.asked)
            chat.asked.append(body)
            chat.keys.add(self.headers["Authorization"])
            chat.busy += 1
            chat.most_busy = max(chat.most_busy, chat.busy)
        asked_for = (number, body["messages"][-1]["content"], -1)
        try:
            self._answer(chat, body, next((chat.faults[key] for key in asked_for if key in chat.faults), ""))
        finally:
            with chat.lock:
                chat.busy -= 1

    def _answer(self, chat: ChatServer, body: dict[str, Any], fault: str) -> None:
        answer = chat.answer(body)
        tokens = answer.tokens()
        whole = json.dumps(answer.reply({"content": tokens})).encode()
        if self.path != "/v1/chat/completions":
            self._error(404, f"no such path: {self.path}")
        elif fault.startswith("429"):  # "429 0.2" asks to wait
            self._error(429, "slow down", {"Retry-After": fault[4:]} if fault[4:] else {})
        elif fault in ("400", "401", "403", "404", "500", "502", "503"):
            self._error(int(fault), f"fault {fault} for {self.headers['Authorization']}")
        elif fault == "hang":
            chat.closing.wait(30)
            self.close_connection = True
        elif fault == "cut":
            self._send(200, whole, length=2 * len(whole))
            self.close_connection = True
        elif fault == "garbage":
            self._send(200, whole[: len(whole) // 2])
        elif fault == "empty":
            self._send(200, b'{"choices": []}')
        elif fault == "null":
            self._send(200, json.dumps(answer.reply(None)).encode())
        elif fault == "short":
            self._send(200, json.dumps(answer.reply({"content": tokens[: len(tokens) // 2]})).encode())
        elif fault == "wrong bytes":
            tokens[1]["bytes"] = [*tokens[1]["bytes"], 33]
            self._send(200, json.dumps(answer.reply({"content": tokens})).encode())
        else:
            assert not fault, fault
            self._send(200, whole)
            with chat.lock:
                chat.answered.append(body)

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
