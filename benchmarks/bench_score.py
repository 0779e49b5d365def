"""Speed and memory of scoring, against a plain transformers forward with full logits.

    python benchmarks/bench_score.py [--tokens 8192] [--repeats 3]

The same documents, of 60 to 130 tokens for the demo's student and of 200 to 1,800 for a Qwen3 of two layers with a
vocabulary of 152K, are read three ways: by our scorer (packed passes, log-probabilities and ranks), one document at a
time, and in padded batches sorted by length. The plain ways take logits of all positions, log_softmax and gather,
and no ranks. A padded batch has as many tokens as one of our passes, padding included. Each way runs in processes of
its own, in turn with the others; its fastest run counts, in seconds of processor time, which other work on the machine
disturbs less. Memory is the highest that it held over what it held with the model loaded.
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
    """Let each way read the documents of each model, and print the ratios."""
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
            found: dict[str, dict[str, Any]] = {}
            for _ in range(args.repeats):
                for way in WAYS:
                    one = run(way, model, tokens)
                    found[way] = min(found.get(way, one), one, key=lambda one: one["seconds"])
            report(name, found)


def run(way: str, model: Path, tokens: int) -> dict[str, Any]:
    """Measure one way in a process of its own."""
    options = ("--worker", way, "--model", model, "--tokens", tokens)
    return harness.again(__file__, *options)[way]


def report(name: str, found: dict[str, dict[str, Any]]) -> None:
    """Print the three ways, and that they agree."""
    ours = found["ours"]
    harness.table(
        [name, "tokens/CPU s", "ours is", "memory over the model", "ours takes", "largest difference"],
        [
            [
                way,
                f"{one['num'] / one['seconds']:,.0f}",
                "" if way == "ours" else harness.faster(ours, one),
                f"{one['megabytes']:,.0f} MB",
                "" if way == "ours" else f"1/{one['megabytes'] / max(ours['megabytes'], 1):.1f}",
                "" if way == "ours" else f"{np.abs(np.subtract(one['sums'], ours['sums'])).max():.1e} nat",
            ]
            for way, one in found.items()
        ],
    )


def make_model(folder: Path) -> None:
    """Write a Qwen3 with the vocabulary of the real ones and the demo's tokenizer, which no one asks."""
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
    """Draw documents of about `tokens` in all."""
    rng = np.random.default_rng(0)
    low, high = (60, 131) if model == DEMO else (200, 1801)
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    found: list[np.ndarray[Any, Any]] = []
    while sum(map(len, found)) < tokens:
        found.append(rng.integers(0, vocab, int(rng.integers(low, high)), dtype=np.int32))
    return found


def measure(way: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Read the documents one way; return seconds, tokens, megabytes over the model, and Σ log p of each document."""
    docs = documents(folder, tokens)
    work = ours(folder, docs) if way == "ours" else plain(folder, docs, padded=way == "padded")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
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
    """Read a line of this process's status, in MB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e6


def ours(folder: Path, docs: list[np.ndarray[Any, Any]]) -> Any:
    """Open our scorer; return what reads the documents."""
    from dasd_lite.config.models import TransformersModel
    from dasd_lite.inference.scorer import open_scorer

    scorer, _ = open_scorer(TransformersModel(model=str(folder), dtype="float32"), batch_tokens=BATCH_TOKENS)
    list(scorer.score([(0, docs[0][:32])]))  # its check of packing, and what is kept from a first call

    def work() -> list[float]:
        found = {position: float(np.nansum(values)) for position, values, _ in scorer.score(enumerate(docs))}
        return [found[position] for position in range(len(docs))]

    return work


def plain(folder: Path, docs: list[np.ndarray[Any, Any]], *, padded: bool) -> Any:
    """Load the model as one would; return what reads the documents."""
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
        found = [0.0] * len(docs)
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
                found[i] = float(logprobs[row, : len(docs[i]) - 1].sum())
        return found

    with torch.inference_mode():  # what is kept from a first call
        model(input_ids=torch.from_numpy(docs[0][:32]).long()[None], use_cache=False)
    return work


if __name__ == "__main__":
    main()
