"""Answers per second of our client of HTTP servers against curator and the openai client, and its memory.

    python benchmarks/bench_endpoint.py [--answers 500] [--concurrency 32] [--rounds 3] [--memory 100000] [--quick]

A server on loopback (loopback.py) answers at once with 2,000 tokens, their log-probabilities and bytes. It has a core
of its own, and so has the client. Each client is a new process in each round, all in turn; ours and the bare client
(which reads and drops replies: what the server can do) come before and after the peers, and the best of each counts.
The time is the server's: from the first completion asked for to the last one given, so that no start counts, and no
end. What a client does behind the last reply (curator reads its own files again) is in the columns that end when the
caller has everything in hand. Peers come from peers/curator.py in an environment of their own. curator's dataset has
the text alone unless its user takes the log-probabilities out of the raw reply, so there is a row for either.
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

from dasd_lite.config.models import EndpointModel
from dasd_lite.inference import Request, SamplingParams
from dasd_lite.inference.endpoint.sampler import EndpointSampler

PEERS_PYTHON = harness.HERE / ".venv-curator" / "bin" / "python"
OURS, BARE, CURATOR = "EndpointSampler", "bare sockets, unread", "curator"
PEERS = (CURATOR, "curator, raw replies", "AsyncOpenAI, semaphore", "OpenAI, one at a time")
TOKENS = 2000


class Plan(Sequence[Request]):
    """Requests that are made when they are asked for, so that only the client's own memory is measured."""

    def __init__(self, number: int) -> None:
        """Plan so many questions."""
        self._number = number

    def __len__(self) -> int:
        """Return how many."""
        return self._number

    @overload
    def __getitem__(self, at: int) -> Request: ...
    @overload
    def __getitem__(self, at: slice) -> list[Request]: ...
    def __getitem__(self, at: int | slice) -> Request | list[Request]:
        """Make one."""
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self._number))]
        if not 0 <= at < self._number:
            raise IndexError(at)
        return Request(at, ({"role": "user", "content": f"Question {at}: how much is {at} and {at}?"},), 4096, at)


def main() -> None:
    """Be one of the clients, or let all take turns and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=100_000, help="answers after which memory is measured; 0: not")
    parser.add_argument("--quick", action="store_true", help="200 answers, one round, memory after 5,000")
    parser.add_argument("--client", choices=[OURS, BARE])
    parser.add_argument("--url")
    given = parser.parse_args()
    if given.quick:
        given.answers, given.rounds, given.memory = 200, 1, min(given.memory, 5_000)
    if given.client:
        found = ask(given) if given.client == OURS else ask_bare(given)
        print(json.dumps({given.client: {"done": time.monotonic(), **found}}))
        return
    if not PEERS_PYTHON.exists():
        sys.exit("curator is not installed: sh benchmarks/peers/install.sh")
    with server() as (url, size):
        print(f"{harness.machine()}; a server on another core\n")
        print(
            f"{given.answers:,} answers, {given.concurrency} at a time; {TOKENS:,} tokens, {size / 1e3:,.0f} KB each\n"
        )
        rounds = [take_turns(url, given) for _ in range(given.rounds)]
        report(rounds, given)
        if given.memory:
            report_memory(run_one(OURS, url, given.memory, given.concurrency))


@contextmanager
def server() -> Iterator[tuple[str, int]]:
    """Serve while the block runs; give the base URL and the bytes of a reply."""
    process = subprocess.Popen(
        [sys.executable, harness.HERE / "loopback.py", "--tokens", str(TOKENS)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        yield f"http://127.0.0.1:{told['port']}/v1", told["bytes"]
    finally:
        process.kill()
        process.wait()


def take_turns(url: str, given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Let every client ask once, ours and the limit twice; an answer missing is an error."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in (BARE, OURS, *PEERS, OURS, BARE):
        found.setdefault(name, []).append(run_one(name, url, given.answers, given.concurrency))
    return found


def run_one(name: str, url: str, answers: int, concurrency: int) -> dict[str, Any]:
    """Run one client in a process of its own; return what it found, timed by the server's clock."""
    server_stats(url)
    if name in PEERS:
        script, numbers = harness.HERE / "peers" / "curator.py", (answers, concurrency)
        command: Iterable[object] = (PEERS_PYTHON, "-W", "ignore", script, name, url, MODEL, *numbers)
    else:
        options = ("--client", name, "--url", url, "--answers", answers, "--concurrency", concurrency)
        command = (sys.executable, __file__, *options)
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} has failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)[name]
    if "missing" in found:
        return found
    stats = server_stats(url)
    if not found["num"] == stats["num"] == answers:
        sys.exit(f"{name} has {found['num']:,} answers, the server gave {stats['num']:,}, asked for {answers:,}")
    return found | {"seconds": stats["last"] - stats["first"], "in_hand": found["done"] - stats["first"]}


def server_stats(url: str) -> dict[str, Any]:
    """Return what the server has answered since this was last asked for."""
    with urlopen(url.removesuffix("/v1") + "/stats") as response:
        found: dict[str, Any] = json.load(response)
        return found


def ask(given: argparse.Namespace) -> dict[str, Any]:
    """Ask with our client; hold text and bytes against each other, look at the memory after 1 in 20 and after all."""
    config = EndpointModel(kind="endpoint", model=MODEL, base_urls=[given.url], concurrency=given.concurrency)
    sampler = EndpointSampler(config)
    num = logprobs = 0
    resident = {}
    for completion in sampler.complete(Plan(given.answers), SamplingParams()):
        num += 1
        logprobs += len(completion.logprobs)
        assert len(completion.logprobs) == len(completion.token_bytes) == TOKENS
        assert completion.token_bytes.sum() == len(completion.text.encode()) > 0
        if num in (given.answers // 20, given.answers):
            resident[num] = megabytes("VmRSS")
    sampler.close()
    return {"num": num, "logprobs": logprobs, "resident": sorted(resident.items()), "peak": megabytes("VmHWM")}


def megabytes(field: str) -> float:
    """Return what Linux says of this process' memory."""
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def ask_bare(given: argparse.Namespace) -> dict[str, Any]:
    """Ask over as many connections as there are requests at a time; read every reply to its end, and drop it."""
    address = given.url.removeprefix("http://").removesuffix("/v1").split(":")
    body = b'{"logprobs": true}'
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    connections = [socket.create_connection((address[0], int(address[1]))) for _ in range(given.concurrency)]
    room = memoryview(bytearray(1 << 20))
    for number in range(given.answers + given.concurrency):
        connection = connections[number % given.concurrency]
        if number >= given.concurrency:
            read = connection.recv_into(room)
            head = room[:read].tobytes().split(b"\r\n\r\n")[0]
            left = len(head) + 4 + int(head.split(b"Content-Length: ")[1]) - read
            while left:
                left -= connection.recv_into(room, min(left, len(room)))
        if number < given.answers:
            connection.sendall(request)
    return {"num": given.answers, "logprobs": 0}


def report(rounds: list[dict[str, list[dict[str, Any]]]], given: argparse.Namespace) -> None:
    """Print the best of each client, and the ratio of each round."""
    best: dict[str, dict[str, Any]] = {}
    for name in (OURS, BARE, *PEERS):
        runs = [run for found in rounds for run in found[name]]
        timed = [run for run in runs if "seconds" in run]
        best[name] = runs[0]
        if timed:
            best[name] = {**timed[0], **{key: min(run[key] for run in timed) for key in ("seconds", "in_hand")}}
    ours = best[OURS]
    hand = {name: {**one, "seconds": one["in_hand"]} if "in_hand" in one else one for name, one in best.items()}
    harness.table(
        ("", "answers given", "ours is as fast", "answers in hand", "ours is as fast", "log-probabilities kept"),
        [
            (
                name,
                harness.speed(one, "answers", 1),
                harness.faster(ours, one),
                harness.speed(hand[name], "answers", 1),
                harness.faster(hand[OURS], hand[name]),
                kept(one),
            )
            for name, one in best.items()
        ],
    )
    if "seconds" in best[CURATOR]:
        ratios = []
        for found in rounds:
            mine, theirs = (min(run["seconds"] for run in found[name]) for name in (OURS, CURATOR))
            ratios.append(f"{theirs / mine:.1f}")
        print(f"ours ÷ curator, answers given, round by round: {', '.join(ratios)}\n", flush=True)


def kept(one: dict[str, Any]) -> str:
    """Say how many of the log-probabilities the caller has in the end."""
    return f"{one['logprobs']:,} of {one['num'] * TOKENS:,}" if one.get("num") else "–"


def report_memory(found: dict[str, Any]) -> None:
    """Print how our memory has grown."""
    (few, before), (many, after) = found["resident"]
    print(
        f"resident memory of ours: {before:.1f} MB after {few:,} answers, {after:.1f} MB after {many:,}:"
        f" {after / before:.3f} ×; peak {found['peak']:.1f} MB; {many / found['seconds']:,.0f} answers/s all the way",
        flush=True,
    )


if __name__ == "__main__":
    main()
