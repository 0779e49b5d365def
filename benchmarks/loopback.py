"""A server that answers every chat completion at once with the same few replies, so that its clients are slower.

    python benchmarks/loopback.py [--tokens 2000]

Input: HTTP/1.1 with kept connections, on a free loopback port, which it prints. Output: replies with log-probabilities
and bytes of every token, serialized before the first request; only the id differs. GET /stats returns when the first
completion since the last such call was requested and when the last one was handed to the kernel (seconds of the
system's monotonic clock, which all processes share), how many there were, and resets these. Needs only Python.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import time
from itertools import count

MODEL = "teacher"
VARIANTS = 8  # so that no client meets the same bytes twice in a row
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_ID = b"chatcmpl-%016d"
_WORDS = ["the", " sum", " of", " is", " √", " 12", "3", ".", "\n", " so", " “", " naïve", " answer", " 漢", " x", " ="]


def reply(rng: random.Random, tokens: int) -> tuple[bytes, bytes]:
    """Serialize an answer; return the parts before and after its id, without headers."""
    pieces = [rng.choice(_WORDS) for _ in range(tokens - 1)]
    logprobs = [-rng.expovariate(3.0) for _ in range(tokens)]
    content = [
        {"token": piece, "logprob": logprob, "bytes": list(piece.encode()), "top_logprobs": []}
        for piece, logprob in zip([*pieces, "<|im_end|>"], logprobs, strict=True)
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(pieces)},
        "logprobs": {"content": content},
        "finish_reason": "stop",
    }
    usage = {"prompt_tokens": 20, "completion_tokens": tokens, "total_tokens": tokens + 20}
    rest = {"object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice], "usage": usage}
    return b'{"id": "', b'", ' + json.dumps(rest, ensure_ascii=False).encode()[1:]


def with_headers(body: bytes, status: str = "200 OK") -> bytes:
    """Return a body with its headers."""
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Replies:
    """The replies and their statistics, shared by all connections."""

    def __init__(self, tokens: int) -> None:
        """Serialize the replies."""
        rng, gap = random.Random(0), len(_ID % 0)
        self.replies = []
        for _ in range(VARIANTS):
            before, after = reply(rng, tokens)
            complete = with_headers(before + b" " * gap + after)
            self.replies.append((complete[: -len(after) - gap], complete[-len(after) :]))
        self._ids = count()
        self.reset()

    def reset(self) -> None:
        """Reset the statistics."""
        self._first = self._last = 0.0
        self._num = 0

    def stats(self) -> bytes:
        """Return the statistics, and reset them."""
        stats = {"first": self._first, "last": self._last, "num": self._num}
        self.reset()
        return with_headers(json.dumps(stats).encode())

    def answer(self, transport: asyncio.WriteTransport, head: bytes, body: bytes) -> None:
        """Answer one request."""
        if head.startswith(b"GET /stats"):
            transport.write(self.stats())
        elif head.startswith(b"GET /v1/models"):
            transport.write(with_headers(json.dumps({"data": [{"id": MODEL}]}).encode()))
        elif not head.startswith(b"POST /v1/chat/completions "):
            transport.write(with_headers(b'{"error": {"message": "no such path"}}', "404 Not Found"))
        elif b'"logprobs"' not in body:  # so curator's request for rate limits is not counted
            transport.write(with_headers(b'{"error": {"message": "ask for logprobs"}}', "400 Bad Request"))
        else:
            self._first = self._first or time.monotonic()
            number = next(self._ids)
            before, after = self.replies[number % VARIANTS]
            transport.write(b"%b%b%b" % (before, _ID % number, after))
            self._last = time.monotonic()
            self._num += 1


class Connection(asyncio.Protocol):
    """One connection, whose data it splits into requests."""

    def __init__(self, replies: Replies) -> None:
        """Start without data."""
        self._replies, self._received = replies, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the kernel accept a complete reply at once, if it can."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head, start = self._received[: end + 2], end + 4
            length = _LENGTH.search(head)
            stop = start + (int(length.group(1)) if length else 0)
            if len(self._received) < stop:
                return
            body, self._received = self._received[start:stop], self._received[stop:]
            self._replies.answer(self._transport, head, body)


async def main() -> None:
    """Serve until killed, on another core than the benchmark if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args()
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the parent process may be pinned
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    replies = Replies(args.tokens)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(replies), "127.0.0.1", 0)
    size = sum(len(part) for variant in replies.replies for part in variant) // VARIANTS
    print(json.dumps({"port": server.sockets[0].getsockname()[1], "bytes": size}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
