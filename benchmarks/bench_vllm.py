"""Tokens per second of our vLLM sampler compared with bare `vllm.LLM.generate`, on the same prompts and seeds.

    python benchmarks/bench_vllm.py [--model FOLDER] [--prompts 100] [--samples 4] [--max-tokens 192] [--rounds 3]

The demo's teacher and questions, on a GPU if there is one. Bare vLLM gets token ids, the same engine and sampling
options (`logprobs=0`, no text), and its default for where the engine runs; only `generate` is measured. Ours is
measured from requests to completions, which includes templates, tokenizer, texts and byte lengths. Each side has its
own process, and the two take turns with the model loaded; the best turn of each counts. There are several rounds with
new processes, because one process can be a few percent faster than another for as long as it lives. With
VLLM_ENABLE_V1_MULTIPROCESSING=0, bare vLLM runs the engine in the same process, which is faster on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dasd_lite
from dasd_lite.chat.chat import Chat
from dasd_lite.config.models import Vllm
from dasd_lite.data.prompts import read_prompts
from dasd_lite.data.seeds import derive_seed
from dasd_lite.inference import Request, SamplingParams
from dasd_lite.inference.vllm.sampler import VllmSampler

DEMO = Path(dasd_lite.__file__).parent / "demo"
SIDES = ("ours", "bare")


def main() -> None:
    """Start both sides, let them take turns, print both and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "teacher")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="no compilation: starts faster")
    parser.add_argument("--worker", choices=SIDES)
    args = parser.parse_args()
    if args.worker:
        (run_ours if args.worker == "ours" else run_bare)(args)
        return
    rounds = []
    for number in range(args.rounds):
        rounds.append(take_turns(args.repeats, SIDES if number % 2 else SIDES[::-1]))
        ours, bare = (min(turn["seconds"] for turn in rounds[-1][side]) for side in SIDES)
        print(f"round {number + 1}: ours {ours:.3f} s, bare {bare:.3f} s, ours / bare {ours / bare:.3f}", flush=True)
    report(rounds, args)


def take_turns(repeats: int, sides: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Start a process for each side, and let them take turns; the first turn is a warm-up and does not count."""
    workers = {side: start(side) for side in sides}
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        for side in sides if turn % 2 else sides[::-1]:
            result = ask(side, workers[side])
            if turn:
                turns[side].append(result)
    for worker in workers.values():
        worker.communicate("\n")
    return turns


def start(side: str) -> subprocess.Popen[str]:
    """Start the process of one side."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", side, *sys.argv[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | os.environ,
    )


def ask(side: str, worker: subprocess.Popen[str]) -> dict[str, Any]:
    """Let one side sample all answers once."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    for line in worker.stdout:  # vLLM prints there too
        if line.startswith("{"):
            result: dict[str, Any] = json.loads(line)
            return result
    sys.exit(f"{side} exited")


def serve(sample: Callable[[], list[list[int]]], close: Callable[[], None]) -> None:
    """Sample on request, and print how long it took."""
    while sys.stdin.readline().strip():
        start = time.perf_counter()
        ids = sample()
        seconds = time.perf_counter() - start
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        print(json.dumps({"seconds": seconds, "num": sum(map(len, ids)), "digest": digest}), flush=True)
    close()


def requests_of(args: argparse.Namespace) -> list[Request]:
    """Return the requests for both sides: several answers to each question."""
    prompts = read_prompts(DEMO / "train.jsonl", limit=args.prompts)
    return [
        Request(num * args.samples + index, prompt.messages, args.max_tokens, derive_seed(0, prompt.uid, index))
        for num, prompt in enumerate(prompts)
        for index in range(args.samples)
    ]


def run_ours(args: argparse.Namespace) -> None:
    """Serve with our sampler, one engine."""
    config = Vllm(kind="vllm", model=str(args.model), data_parallel_size=1, enforce_eager=args.eager)
    sampler, requests = VllmSampler(config), requests_of(args)

    def sample() -> list[list[int]]:
        done = {c.position: c.token_ids for c in sampler.complete(requests, SamplingParams())}
        return [done[request.position].tolist() for request in requests]

    serve(sample, sampler.close)


def run_bare(args: argparse.Namespace) -> None:
    """Serve with vLLM alone."""
    import torch
    import vllm

    chat, requests = Chat(args.model), requests_of(args)
    prompts = [{"prompt_token_ids": chat.prompt_ids(request.messages).tolist()} for request in requests]
    params = [
        vllm.SamplingParams(
            seed=request.seed,
            max_tokens=request.max_tokens,
            logprobs=0,
            flat_logprobs=True,
            ignore_eos=True,
            stop_token_ids=list(chat.answer_end_ids),
            detokenize=False,
        )
        for request in requests
    ]
    model = vllm.LLM(
        str(args.model),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        generation_config="vllm",
        disable_log_stats=True,
        enable_chunked_prefill=None if torch.cuda.is_available() else False,  # see inference/vllm/engine.py
        enforce_eager=args.eager,
    )

    def sample() -> list[list[int]]:
        return [list(out.outputs[0].token_ids) for out in model.generate(prompts, params, use_tqdm=False)]

    serve(sample, lambda: None)


def report(rounds: list[dict[str, list[dict[str, Any]]]], args: argparse.Namespace) -> None:
    """Print the best turn of each side over all rounds, and how much slower ours is."""
    print(f"{args.prompts} prompts × {args.samples} answers, best of {args.rounds} rounds of {args.repeats} turns")
    best = {}
    for side in SIDES:
        turns = [turn for each in rounds for turn in each[side]]
        best[side] = min(turn["seconds"] for turn in turns)
        print(f"{side:5} {best[side]:7.3f} s {turns[0]['num'] / best[side]:9,.0f} tokens/s")
    same = len({turn["digest"] for each in rounds for side in SIDES for turn in each[side]}) == 1
    print("the same tokens" if same else "NOT the same tokens")
    print(f"ours / bare: {best['ours'] / best['bare']:.3f}")


if __name__ == "__main__":
    main()
