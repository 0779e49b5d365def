"""Answers per second of our HTTP client, compared with curator and the openai client, and its memory.

    python benchmarks/bench_endpoint.py [--answers 500] [--concurrency 32] [--rounds 3] [--memory 100000] [--quick]

A server on loopback (loopback.py) answers at once with 2,000 tokens, their log-probabilities and bytes. Server and
client have a core each. In each round the clients take turns, each in a new process; ours and the bare client (which
reads and drops replies, and so shows the server's limit) run before and after the peers, and the best run of each
counts. The server measures the time, from the first completion requested to the last one sent, so that startup and
shutdown do not count. What a client does after the last reply (curator rereads its own files) is included in the
columns "answers in hand", which end when the caller has everything. Peers come from peers/curator.py in their own
environment. curator's dataset has only the text unless its user takes the log-probabilities from the raw reply, so
there is a row for each.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload
from urllib.request import urlopen

import harness
from loopback import MODEL

from dasd_lite.config.models import Endpoint
from dasd_lite.inference import Request, SamplingParams
from dasd_lite.inference.endpoint.sampler import EndpointSampler

PEERS_PYTHON = harness.HERE / ".venv-curator" / "bin" / "python"
OURS, BARE, CURATOR = "EndpointSampler", "bare sockets, unread", "curator"
PEERS = (CURATOR, "curator, raw replies", "AsyncOpenAI, semaphore", "OpenAI, one at a time")
TOKENS = 2000


class Plan(Sequence[Request]):
    """Requests that are created on access, so that only the client's own memory is measured."""

    def __init__(self, number: int) -> None:
        """Plan `number` questions."""
        self._number = number

    def __len__(self) -> int:
        """Return their number."""
        return self._number

    @overload
    def __getitem__(self, at: int) -> Request: ...
    @overload
    def __getitem__(self, at: slice) -> list[Request]: ...
    def __getitem__(self, at: int | slice) -> Request | list[Request]:
        """Create one, or a list."""
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self._number))]
        if not 0 <= at < self._number:
            raise IndexError(at)
        return Request(at, ({"role": "user", "content": f"Question {at}: how much is {at} and {at}?"},), 4096, at)


def main() -> None:
    """Run one client, or let all take turns and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=100_000, help="answers after which memory is measured; 0: never")
    parser.add_argument("--quick", action="store_true", help="200 answers, one round, memory after 5,000")
    parser.add_argument("--client", choices=[OURS, BARE])
    parser.add_argument("--url")
    args = parser.parse_args()
    if args.quick:
        args.answers, args.rounds, args.memory = 200, 1, min(args.memory, 5_000)
    if args.client:
        result = ask(args) if args.client == OURS else ask_bare(args)
        print(json.dumps({args.client: {"done": time.monotonic(), **result}}))
        return
    if not PEERS_PYTHON.exists():
        sys.exit("curator is not installed: sh benchmarks/peers/install.sh")
    with server() as (url, size):
        print(f"{harness.machine()}; a server on another core\n")
        print(f"{args.answers:,} answers, {args.concurrency} at a time; {TOKENS:,} tokens, {size / 1e3:,.0f} KB each\n")
        rounds = [take_turns(url, args) for _ in range(args.rounds)]
        report(rounds, args)
        if args.memory:
            report_memory(run_one(OURS, url, args.memory, args.concurrency))


@contextmanager
def server() -> Iterator[tuple[str, int]]:
    """Serve while the block runs; yield the base URL and the bytes of a reply."""
    process = subprocess.Popen(
        [sys.executable, harness.HERE / "loopback.py", "--tokens", str(TOKENS)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        info = json.loads(process.stdout.readline())
        yield f"http://127.0.0.1:{info['port']}/v1", info["bytes"]
    finally:
        process.kill()
        process.wait()


def take_turns(url: str, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run every client once, ours and the bare one twice; a missing answer is an error."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in (BARE, OURS, *PEERS, OURS, BARE):
        runs.setdefault(name, []).append(run_one(name, url, args.answers, args.concurrency))
    return runs


def run_one(name: str, url: str, answers: int, concurrency: int) -> dict[str, Any]:
    """Run one client in its own process; return its result, timed by the server."""
    server_stats(url)
    if name in PEERS:
        script, numbers = harness.HERE / "peers" / "curator.py", (answers, concurrency)
        command: Iterable[object] = (PEERS_PYTHON, "-W", "ignore", script, name, url, MODEL, *numbers)
    else:
        options = ("--client", name, "--url", url, "--answers", answers, "--concurrency", concurrency)
        command = (sys.executable, __file__, *options)
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)[name]
    if "missing" in result:
        return result
    stats = server_stats(url)
    if not result["num"] == stats["num"] == answers:
        sys.exit(f"{name} has {result['num']:,} answers, the server sent {stats['num']:,}, requested: {answers:,}")
    return result | {"seconds": stats["last"] - stats["first"], "in_hand": result["done"] - stats["first"]}


def server_stats(url: str) -> dict[str, Any]:
    """Return the server's statistics since the last call."""
    with urlopen(url.removesuffix("/v1") + "/stats") as response:
        stats: dict[str, Any] = json.load(response)
        return stats


def ask(args: argparse.Namespace) -> dict[str, Any]:
    """Run our client; check text and bytes, and measure the memory after 1/20 of the answers and after all."""
    config = Endpoint(kind="endpoint", model=MODEL, base_urls=[args.url], concurrency=args.concurrency)
    sampler = EndpointSampler(config)
    num = logprobs = 0
    resident = {}
    for completion in sampler.complete(Plan(args.answers), SamplingParams()):
        num += 1
        logprobs += len(completion.logprobs)
        assert len(completion.logprobs) == len(completion.token_bytes) == TOKENS
        assert completion.token_bytes.sum() == len(completion.text.encode()) > 0
        if num in (args.answers // 20, args.answers):
            resident[num] = megabytes("VmRSS")
    sampler.close()
    return {"num": num, "logprobs": logprobs, "resident": sorted(resident.items()), "peak": megabytes("VmHWM")}


def megabytes(field: str) -> float:
    """Return a figure of this process's memory from /proc."""
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def ask_bare(args: argparse.Namespace) -> dict[str, Any]:
    """Use one connection per concurrent request; read every reply to its end, and drop it."""
    address = args.url.removeprefix("http://").removesuffix("/v1").split(":")
    body = b'{"logprobs": true}'
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    connections = [socket.create_connection((address[0], int(address[1]))) for _ in range(args.concurrency)]
    buffer = memoryview(bytearray(1 << 20))
    for number in range(args.answers + args.concurrency):
        connection = connections[number % args.concurrency]
        if number >= args.concurrency:
            read = connection.recv_into(buffer)
            head = buffer[:read].tobytes().split(b"\r\n\r\n")[0]
            remaining = len(head) + 4 + int(head.split(b"Content-Length: ")[1]) - read
            while remaining:
                remaining -= connection.recv_into(buffer, min(remaining, len(buffer)))
        if number < args.answers:
            connection.sendall(request)
    return {"num": args.answers, "logprobs": 0}


def report(rounds: list[dict[str, list[dict[str, Any]]]], args: argparse.Namespace) -> None:
    """Print the best run of each client, and the ratio in each round."""
    best: dict[str, dict[str, Any]] = {}
    for name in (OURS, BARE, *PEERS):
        runs = [run for each in rounds for run in each[name]]
        timed = [run for run in runs if "seconds" in run]
        best[name] = runs[0]
        if timed:
            best[name] = {**timed[0], **{key: min(run[key] for run in timed) for key in ("seconds", "in_hand")}}
    ours = best[OURS]
    in_hand = {name: {**run, "seconds": run["in_hand"]} if "in_hand" in run else run for name, run in best.items()}
    harness.table(
        ("", "answers given", "ours is as fast", "answers in hand", "ours is as fast", "log-probabilities kept"),
        [
            (
                name,
                harness.speed(run, "answers", 1),
                harness.faster(ours, run),
                harness.speed(in_hand[name], "answers", 1),
                harness.faster(in_hand[OURS], in_hand[name]),
                kept(run),
            )
            for name, run in best.items()
        ],
    )
    if "seconds" in best[CURATOR]:
        ratios = []
        for each in rounds:
            mine, theirs = (min(run["seconds"] for run in each[name]) for name in (OURS, CURATOR))
            ratios.append(f"{theirs / mine:.1f}")
        print(f"ours ÷ curator, answers given, round by round: {', '.join(ratios)}\n", flush=True)


def kept(run: dict[str, Any]) -> str:
    """Return how many of the log-probabilities the caller has in the end."""
    return f"{run['logprobs']:,} of {run['num'] * TOKENS:,}" if run.get("num") else "–"


def report_memory(run: dict[str, Any]) -> None:
    """Print how much our memory grew."""
    (few, before), (many, after) = run["resident"]
    print(
        f"resident memory of ours: {before:.1f} MB after {few:,} answers, {after:.1f} MB after {many:,}:"
        f" {after / before:.3f} ×; peak {run['peak']:.1f} MB; {many / run['seconds']:,.0f} answers/s overall",
        flush=True,
    )


if __name__ == "__main__":
    main()
