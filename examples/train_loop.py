"""The training loop, flat: plain torch from packed rows to a trained student, to be read from top to bottom.

    dasd-lite demo                                           # writes, among others, the rows runs/demo/low/pack
    python examples/train_loop.py runs/demo/low/pack runs/train_loop [STUDENT]

It trains all weights of the demo's student, or of STUDENT, in float32 on a CPU or GPU. Its losses are those of
`dasd_lite.train` (tests/training/test_loop_twin.py). That one has more: attention that needs no mask, logits in chunks,
adapters, 16-bit computation, several GPUs, checkpoints, and it stops before a bad loss reaches the weights.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import dasd_lite as dl
from dasd_lite.config.train import TrainConfig
from dasd_lite.training.schedule import Schedule

DEMO_STUDENT = Path(dl.__file__).parent / "demo" / "student"


def train(
    rows_folder: Path | str,
    out: Path | str,
    student: Path | str = DEMO_STUDENT,
    *,
    epochs: float = 5.0,
    learning_rate: float = 4e-3,
    min_learning_rate: float = 4e-4,
    warmup_ratio: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.05,
    max_grad_norm: float = 1.0,
    micro_batch_size: int = 4,
    grad_accum_steps: int = 1,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Train `student` on the rows of a pack folder; return the figures of each step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)

    # A row is several documents (prompt and answer each), one after another. Its columns: ids, loss_mask (true on the
    # tokens of answers), doc_lengths.
    rows = dl.Rows(Path(rows_folder)).to_table(["ids", "loss_mask", "doc_lengths"]).to_pylist()
    model: Any = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation="sdpa")
    model.to(device).train()

    # AdamW: matrices decay, vectors (norms, biases) do not.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8)

    # Which rows each step reads. Any random order would train as well; this one is that of `dasd_lite.train`.
    lengths = np.concatenate([row["doc_lengths"] for row in rows]).astype(np.int64)
    offsets = np.cumsum([0, *(len(row["doc_lengths"]) for row in rows)])
    config = TrainConfig(epochs=epochs, micro_batch_size=micro_batch_size, grad_accum_steps=grad_accum_steps)
    schedule = Schedule(lengths, offsets, config, seed, cost=(6.0 * model.config.hidden_size, 1.0))
    num_steps = schedule.num_steps

    history = []
    for step in range(num_steps):
        rows_of_step = [rows[i] for i in schedule.rows_of(step)]

        # The loss of a step is the mean over all of its target tokens, however it is cut into micro-batches: each
        # adds its sum divided by their number, not its own mean.
        num_targets = sum(int(targets_of(row).sum()) for row in rows_of_step)
        loss_sum = 0.0
        for first in range(0, len(rows_of_step), micro_batch_size):
            micro_batch = rows_of_step[first : first + micro_batch_size]
            ids = torch.tensor([i for row in micro_batch for i in row["ids"]], device=device)  # [T]
            lengths_D = torch.tensor([n for row in micro_batch for n in row["doc_lengths"]], device=device)
            targets = torch.from_numpy(np.concatenate([targets_of(row) for row in micro_batch])).to(device)

            # Documents never see each other: their positions start at 0, and a token attends to those before it in
            # its own document only.
            document = torch.arange(len(lengths_D), device=device).repeat_interleave(lengths_D)  # of each token
            starts = lengths_D.cumsum(0) - lengths_D
            positions = torch.arange(len(ids), device=device) - starts[document]
            attends = (document[:, None] == document[None, :]).tril()  # [T, T]
            logits = model(
                input_ids=ids[None], position_ids=positions[None], attention_mask=attends[None, None], use_cache=False
            ).logits[0]  # [T, vocabulary]

            # The logits at a token predict the next one.
            at = targets.nonzero()[:, 0]
            loss = F.cross_entropy(logits[at - 1].float(), ids[at], reduction="sum")
            (loss / num_targets).backward()
            loss_sum += loss.item()

        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()

        # Linear warmup, then a cosine down to the floor.
        warmup = round(warmup_ratio * num_steps)
        if step < warmup:
            rate = learning_rate * (step + 1) / warmup
        else:
            done = (step - warmup) / max(1, num_steps - 1 - warmup)
            rate = min_learning_rate + (learning_rate - min_learning_rate) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

        figures = {"loss": loss_sum / num_targets, "learning_rate": rate, "grad_norm": grad_norm}
        history.append({"step": step + 1, **figures, "target_tokens": num_targets})
        print(f"step {step + 1}/{num_steps}: loss {figures['loss']:.4f}, gradient {grad_norm:.2f}, rate {rate:.1e}")

    # A folder that transformers and vLLM load.
    model.save_pretrained(out / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (Path(student) / name).exists():
            shutil.copy(Path(student) / name, out / "model")
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    return history


def targets_of(row: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which tokens of a row are trained on: those of answers, never the first of a document."""
    targets = np.array(row["loss_mask"])
    targets[np.cumsum([0, *row["doc_lengths"][:-1]])] = False  # nothing predicts it
    return targets


if __name__ == "__main__":
    train(*sys.argv[1:])
