"""Speed and memory of scoring, compared with a plain transformers forward pass with full logits.

    python benchmarks/bench_score.py [--tokens 8192] [--repeats 3]

The same documents, of 60 to 130 tokens for the demo's student and of 200 to 1,800 for a Qwen3 of two layers with a
vocabulary of 152K, are scored in three ways: by our scorer (packed passes, log-probabilities and ranks), one document
at a time, and in padded batches sorted by length. The plain ways compute logits of all positions, log_softmax and
gather, but no ranks. A padded batch has as many tokens as one of our passes, padding included. Each way runs in its own
processes, in turn with the others; its fastest run counts, in seconds of processor time, which other work on the
machine disturbs less. Memory is the peak minus the memory with the model loaded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np

import dasd_lite

DEMO = Path(dasd_lite.__file__).parent / "demo" / "student"
WAYS = ("ours", "one by one", "padded")
VOCAB = 151_936
BATCH_TOKENS = 4096


def main() -> None:
    """Score the documents of each model in each way, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", choices=WAYS)
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps({args.worker: measure(args.worker, args.model, args.tokens)}))
        return
    print(f"scoring, {harness.machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "qwen"
        make_model(large)
        for name, model, tokens in (
            ("demo student, vocabulary 400", DEMO, 8 * args.tokens),
            ("Qwen3 of 2 layers, 152K", large, args.tokens),
        ):
            best: dict[str, dict[str, Any]] = {}
            for _ in range(args.repeats):
                for way in WAYS:
                    result = run(way, model, tokens)
                    best[way] = min(best.get(way, result), result, key=lambda each: each["seconds"])
            report(name, best)


def run(way: str, model: Path, tokens: int) -> dict[str, Any]:
    """Measure one way in its own process."""
    options = ("--worker", way, "--model", model, "--tokens", tokens)
    return harness.again(__file__, *options)[way]


def report(name: str, best: dict[str, dict[str, Any]]) -> None:
    """Print the three ways, and how much their results differ."""
    ours = best["ours"]
    harness.table(
        [name, "tokens/CPU s", "ours is", "memory over the model", "ours takes", "largest difference"],
        [
            [
                way,
                f"{result['num'] / result['seconds']:,.0f}",
                "" if way == "ours" else harness.faster(ours, result),
                f"{result['megabytes']:,.0f} MB",
                "" if way == "ours" else f"1/{result['megabytes'] / max(ours['megabytes'], 1):.1f}",
                "" if way == "ours" else f"{np.abs(np.subtract(result['sums'], ours['sums'])).max():.1e} nat",
            ]
            for way, result in best.items()
        ],
    )


def make_model(folder: Path) -> None:
    """Write a Qwen3 with the vocabulary size of real ones, and the demo's tokenizer, which is not used."""
    import shutil

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, folder / name)


def documents(model: Path, tokens: int) -> list[np.ndarray[Any, Any]]:
    """Draw documents of about `tokens` tokens in total."""
    rng = np.random.default_rng(0)
    low, high = (60, 131) if model == DEMO else (200, 1801)
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    docs: list[np.ndarray[Any, Any]] = []
    while sum(map(len, docs)) < tokens:
        docs.append(rng.integers(0, vocab, int(rng.integers(low, high)), dtype=np.int32))
    return docs


def measure(way: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Score the documents in one way; return seconds, tokens, megabytes over the model, and Σ log p per document."""
    docs = documents(folder, tokens)
    work = ours(folder, docs) if way == "ours" else plain(folder, docs, padded=way == "padded")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak memory
    before = status("VmRSS")
    sums = work()
    peak = status("VmHWM")
    seconds = []
    for _ in range(2):
        start = time.process_time()
        sums = work()
        seconds.append(time.process_time() - start)
    return {"seconds": min(seconds), "num": sum(map(len, docs)), "megabytes": peak - before, "sums": sums}


def status(name: str) -> float:
    """Return a figure of this process's memory in MB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e6


def ours(folder: Path, docs: list[np.ndarray[Any, Any]]) -> Any:
    """Open our scorer; return a function that scores the documents."""
    from dasd_lite.config.models import Transformers
    from dasd_lite.inference.scorer import open_scorer

    scorer, _ = open_scorer(Transformers(model=str(folder), dtype="float32"), batch_tokens=BATCH_TOKENS)
    list(scorer.score([(0, docs[0][:32])]))  # warm-up, with its check of packing

    def work() -> list[float]:
        sums = {position: float(np.nansum(values)) for position, values, _ in scorer.score(enumerate(docs))}
        return [sums[position] for position in range(len(docs))]

    return work


def plain(folder: Path, docs: list[np.ndarray[Any, Any]], *, padded: bool) -> Any:
    """Load the model with transformers; return a function that scores the documents."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    order = sorted(range(len(docs)), key=lambda i: -len(docs[i]))
    groups: list[list[int]] = []
    for i in order:
        if padded and groups and len(docs[groups[-1][0]]) * (len(groups[-1]) + 1) <= BATCH_TOKENS:
            groups[-1].append(i)
        else:
            groups.append([i])

    def work() -> list[float]:
        sums = [0.0] * len(docs)
        for group in groups:
            width = len(docs[group[0]])
            ids = torch.zeros((len(group), width), dtype=torch.long)
            mask = torch.zeros((len(group), width), dtype=torch.long)
            for row, i in enumerate(group):
                ids[row, : len(docs[i])] = torch.from_numpy(docs[i])
                mask[row, : len(docs[i])] = 1
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=mask if padded else None, use_cache=False).logits
                logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            for row, i in enumerate(group):
                sums[i] = float(logprobs[row, : len(docs[i]) - 1].sum())
        return sums

    with torch.inference_mode():  # warm-up
        model(input_ids=torch.from_numpy(docs[0][:32]).long()[None], use_cache=False)
    return work


if __name__ == "__main__":
    main()
