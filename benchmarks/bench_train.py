"""Tokens per second of our training loop against TRL's SFTTrainer, on a CPU, on the same packed rows.

    python benchmarks/bench_train.py [--steps 30] [--repeats 3] [--threads 1]

A tiny Qwen3 (155K parameters), and rows of 2,048 tokens full of documents of 60 to 130 tokens. Both sides get the same
model, rows, micro-batches, AdamW (fused), learning rate and clipping, in float32. TRL gets its packed rows with
padding-free batches and without gradient checkpointing, which is its default and would only slow it down. TRL is
installed into benchmarks/.venv-trl, which git ignores. The two take turns, each in a process of its own, and the median
step of each run counts, without the first three. CPU time is shown beside wall time, because other work on the machine
disturbs it less. Ours writes a checkpoint every ten steps, TRL none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv-trl"
PACKAGES = ("torch==2.13.0", "transformers==5.19.0", "accelerate==1.15.0", "trl==1.16.0", "pyarrow")
VOCAB, SEQ_LEN, MICRO, ACCUM, SKIP = 400, 2048, 1, 4, 3


def main() -> None:
    """Install TRL if needed, make data, let the two take turns, print both and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", choices=["ours", "trl"])
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps((run_ours if args.worker == "ours" else run_trl)(args.data, args.steps)))
        return
    if not (VENV / "ready").exists():
        subprocess.run(
            [sys.executable, "-m", "uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(VENV)],
            check=True,
        )
        python = str(VENV / "bin" / "python")
        subprocess.run(
            [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *PACKAGES], check=True
        )
        (VENV / "ready").touch()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        make_data(data, args.steps)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
        for _ in range(args.repeats):
            for name in runs:
                runs[name].append(worker(name, data, args))
    report(runs, args)


def worker(name: str, data: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run one side in a process of its own."""
    python = sys.executable if name == "ours" else str(VENV / "bin" / "python")
    options = ["--worker", name, "--data", str(data), "--steps", str(args.steps)]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, __file__, *options], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(runs: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    """Print the median of each side and the ratio."""
    median = {name: {k: statistics.median(r[k] for r in own) for k in own[0]} for name, own in runs.items()}
    print(f"{args.steps} steps of {MICRO * ACCUM} rows, {args.threads} thread(s), median of {args.repeats} runs")
    print(f"{'':6} {'tok/s':>9} {'tok/CPU s':>10} {'start to 1st step':>18} {'loss first':>11} {'last':>7}")
    for name, m in median.items():
        rates = f"{m['wall']:9,.0f} {m['cpu']:10,.0f} {m['start']:16.1f} s"
        print(f"{name:6} {rates} {m['first_loss']:11.3f} {m['last_loss']:7.3f}")
    ours, trl = median["ours"], median["trl"]
    print(f"ratio  {ours['wall'] / trl['wall']:9.2f} {ours['cpu'] / trl['cpu']:10.2f}")
    every = "one in 100 steps, the default"
    print(f"a checkpoint of ours: {ours['pause'] * 1e3:.0f} ms, {ours['pause_share']:.2%} of the time ({every})")


def make_data(data: Path, steps: int) -> None:
    """Write a random model, and rows of documents that count: something to learn."""
    import numpy as np
    import pyarrow as pa
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from dasd_lite.data.manifest import identify
    from dasd_lite.data.records import ROW
    from dasd_lite.data.writer import ShardWriter

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(data / "model")
    rng, rows = np.random.default_rng(0), []
    for r in range(steps * MICRO * ACCUM):
        ids: list[int] = []
        mask: list[bool] = []
        lengths: list[int] = []
        while len(ids) + (length := int(rng.integers(60, 131))) <= SEQ_LEN:
            start, stride = rng.integers(0, VOCAB), rng.integers(1, 8)
            ids += [int((start + i * stride) % VOCAB) for i in range(length)]
            mask += [i >= 30 for i in range(length)]
            lengths.append(length)
        rows.append(
            {"ids": ids, "loss_mask": mask, "doc_lengths": lengths, "uids": [f"{r}.{d}" for d in range(len(lengths))]}
        )
    table = pa.Table.from_pylist(rows, schema=ROW)
    with ShardWriter(data / "rows", identify("pack", 1, {}, {}), {"rows": ROW}) as writer:
        writer.write("rows", table)
        writer.publish({})
    with pa.ipc.new_file(str(data / "rows.arrow"), table.schema) as file:
        file.write_table(table)


def summary(steps: list[tuple[int, float, float]], start: float, first: float, last: float) -> dict[str, float]:
    """Reduce (tokens, wall seconds, CPU seconds) per step to the median rates."""
    kept = steps[SKIP:]
    return {
        "wall": statistics.median(tokens / wall for tokens, wall, _ in kept),
        "cpu": statistics.median(tokens / cpu for tokens, _, cpu in kept),
        "start": start,
        "first_loss": first,
        "last_loss": last,
    }


def run_ours(data: Path, steps: int) -> dict[str, float]:
    """Train by our stage; a step ends when the next one reads its rows."""
    began = time.perf_counter()
    from dasd_lite.config.train import TrainConfig
    from dasd_lite.stages.train import train
    from dasd_lite.training import checkpoint
    from dasd_lite.training.batches import Batches

    marks: list[tuple[float, float]] = []
    pauses: list[float] = []
    take, save = Batches.take, checkpoint.save

    def marked(batches: Batches, number: int) -> object:  # once per step
        marks.append((time.perf_counter(), time.process_time()))
        return take(batches, number)

    def timed_save(*args: object) -> None:
        start = time.perf_counter()
        save(*args)
        pauses.append(time.perf_counter() - start)

    Batches.take = marked  # type: ignore[method-assign, assignment]
    checkpoint.save = timed_save  # type: ignore[assignment]
    config = TrainConfig(
        epochs=1,
        learning_rate=2e-3,
        min_learning_rate=2e-3,
        warmup_ratio=0,
        micro_batch_size=MICRO,
        grad_accum_steps=ACCUM,
        checkpoint_every=10,
    )
    out = data / f"ours-{os.getpid()}"
    train(data / "rows", data / "model", config, out=out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
    timed = [(line["tokens"], *span) for line, span in zip(lines, spans, strict=False)]
    result = summary(timed, marks[1][0] - began, lines[0]["loss"], lines[-1]["loss"])
    pause, step = statistics.median(pauses), statistics.median(wall for wall, _ in spans)
    return result | {"pause": pause, "pause_share": pause / (TrainConfig().checkpoint_every * step + pause)}


def run_trl(data: Path, steps: int) -> dict[str, float]:
    """Train by TRL's SFTTrainer on the same packed rows."""
    began = time.perf_counter()
    import pyarrow as pa
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    table = pa.ipc.open_file(str(data / "rows.arrow")).read_all().to_pylist()
    rows = [
        {
            "input_ids": row["ids"],
            "labels": [i if m else -100 for i, m in zip(row["ids"], row["loss_mask"], strict=True)],
            "seq_lengths": row["doc_lengths"],
        }
        for row in table
    ]
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: object, **options: object) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0")),
        eos_token="1",
        pad_token="2",
    )
    config = SFTConfig(
        output_dir=str(data / f"trl-{os.getpid()}"),
        max_length=None,  # the rows are already packed
        padding_free=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        num_train_epochs=1,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=ACCUM,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(data / "model"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
    # Rows are full to within a document, so the mean stands for every step; TRL draws its rows itself.
    mean = sum(len(row["input_ids"]) for row in rows) / steps
    return summary([(mean, *span) for span in spans], marks[1][0] - began, losses[0], losses[-1])


if __name__ == "__main__":
    main()
