"""train: rows → a student trained on them.

    train.run(rows, model, config, out, seed=0)

Input: a finished pack folder and a model folder. Output: `out`/model (a folder that transformers
loads), `out`/adapter for LoRA and QLoRA, `out`/metrics.jsonl (a line per optimiser step) and the
manifest. Invariants: documents of a row never see each other; the loss of a step is Σ −log p over all
its target tokens divided by their number, however they are cut into micro-batches; learning rate and
order of rows are pure functions of the step and the seed, so a run that was killed ends with the
weights of one that was not.

The loop is `train`, at the end. Packed attention is in attention.py, loss and export in student.py,
checkpoints in checkpoint.py, the reading of rows in rows.py.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dasd_lite.config import TrainConfig
from dasd_lite.console import err, progress
from dasd_lite.dataset import Identity, begin, disk_errors, identify, is_finished, publish, read_manifest
from dasd_lite.errors import TrainError
from dasd_lite.records import derive_seed
from dasd_lite.rows import Row, Rows, open_rows
from dasd_lite.self_check import check_packing, documents_of, probe

if TYPE_CHECKING:
    import torch

VERSION = 1


# --- the plan: what each step does, known before the first one -------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which rows each optimiser step reads, and at which learning rate."""

    num_rows: int
    seed: int
    config: TrainConfig
    max_steps: int | None = None

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step; the last step takes what is left."""
        return self.config.micro_batch_size * self.config.grad_accum_steps

    @property
    def num_samples(self) -> int:
        """Rows read in all: each one `epochs` times, and part of them once more when that is a fraction."""
        whole = max(1, math.ceil(round(self.config.epochs * self.num_rows, 6)))
        return whole if self.max_steps is None else min(whole, self.max_steps * self.rows_per_step)

    @property
    def num_steps(self) -> int:
        """Optimiser steps."""
        return math.ceil(self.num_samples / self.rows_per_step)

    def rows_of(self, step: int) -> list[int]:
        """Return the rows of a step (counted from 0); a step may reach into the next epoch."""
        first = step * self.rows_per_step
        places = (divmod(i, self.num_rows) for i in range(first, min(first + self.rows_per_step, self.num_samples)))
        return [int(row_order(self.seed, epoch, self.num_rows)[place]) for epoch, place in places]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step (counted from 0): linear warm-up, then a cosine down to the floor."""
        peak, floor = self.config.learning_rate, self.config.min_learning_rate
        warmup = round(self.config.warmup_ratio * self.num_steps)
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, self.num_steps - 1 - warmup)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


@lru_cache(maxsize=2)
def row_order(seed: int, epoch: int, num_rows: int) -> npt.NDArray[np.int64]:
    """Return the order of rows in an epoch."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, "rows", epoch))).permutation(num_rows)


# --- the stage ------------------------------------------------------------------------------------------


def run(
    rows: Path,
    model: Path,
    config: TrainConfig,
    out: Path,
    *,
    seed: int,
    max_steps: int | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Train `model` on `rows` into `out`, going on from wherever an earlier call was stopped; return the manifest."""
    inputs: dict[str, Path | str] = {"rows": rows, "model": model, "seed": str(seed)}
    if max_steps is not None:
        inputs["max_steps"] = str(max_steps)
    identity = identify("train", VERSION, config, inputs)
    if is_finished(out, identity, force=force):
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # left when a kill came right after the manifest
        return read_manifest(out)
    from dasd_lite import student

    spec = student.model_spec(model, trust_remote_code=trust_remote_code)
    mapped = out.with_name(f".{out.name}.rows")  # beside the folder, which begins when all has been checked
    table = open_rows(rows, mapped, vocab_size=spec.vocab_size, max_positions=spec.max_positions)
    plan = Plan(len(table), seed, config, max_steps)
    trained = build(model, config, seed, trust_remote_code=trust_remote_code)
    some = documents_of([table[i] for i in range(min(4, len(table)))])  # a row may be one long document
    check_packing(trained, some)
    with disk_errors(out):
        begin(out, identity, config)
    train(trained, table, plan, out, identity)
    gap = student.export(trained, config.method, model, out, probe(some), trust_remote_code=trust_remote_code)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    manifest = _publish(out, identity, config, plan, metrics, gap)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return manifest


def build(model: Path, config: TrainConfig, seed: int, *, trust_remote_code: bool = False) -> Any:
    """Load the model to train; an adapter starts as the seed says."""
    import torch

    from dasd_lite import student

    torch.manual_seed(derive_seed(seed, "train"))
    return student.load_trainable(
        model,
        config.method,
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=trust_remote_code,
    )


def _publish(
    out: Path, identity: Identity, config: TrainConfig, plan: Plan, metrics: list[dict[str, Any]], gap: float
) -> dict[str, Any]:
    seconds = sum(m["seconds"] for m in metrics)
    tokens = sum(m["tokens"] for m in metrics)
    counts = {
        "steps": len(metrics),
        "rows": plan.num_rows,
        "rows_seen": plan.num_samples,
        "tokens": tokens,
        "target_tokens": sum(m["target_tokens"] for m in metrics),
        "first_loss": metrics[0]["loss"],
        "final_loss": metrics[-1]["loss"],
        "export_gap": gap,
    }
    timing = {"seconds": seconds, "tokens_per_second": tokens / seconds}
    with disk_errors(out):
        return publish(out, identity, tables={}, counts=counts, config=config, timing=timing)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Let the first Ctrl-C or SIGTERM set a flag instead of breaking off; the second one breaks off."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may take signals
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]

    def ask(number: int, frame: object) -> None:
        asked.set()
        restore()

    def restore() -> None:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()


# --- the loop -------------------------------------------------------------------------------------------


def make_optimizer(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW over what is trained; matrices decay, vectors (norms, biases) do not."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)


def train(model: Any, rows: Rows, plan: Plan, out: Path, identity: Identity) -> None:
    """Train `model` in place, from the newest checkpoint in `out` if there is one, to the last step of `plan`."""
    import torch

    from dasd_lite import checkpoint, student

    config, fingerprint = plan.config, identity.fingerprint
    device = next(model.parameters()).device
    dtype = student.pick_dtype(config.dtype, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, config)
    # Gradients under 6e-8 are 0 in float16, so the loss is scaled up; bfloat16 has the range of float32.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    folder = out / "checkpoints"
    first = checkpoint.restore(folder, model, optimizer, scaler, fingerprint)
    checkpoint.truncate_metrics(out / "metrics.jsonl", first)
    tokens_of = [int(rows.num_tokens[plan.rows_of(step)].sum()) for step in range(plan.num_steps)]

    with (
        (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics,
        stop_signals() as stop,
        progress(f"{out.parent.name}: train", sum(tokens_of), "tokens", done=sum(tokens_of[:first])) as bar,
    ):
        for step in range(first, plan.num_steps):
            began = time.perf_counter()
            batch = [rows[i] for i in plan.rows_of(step)]
            micro_batches = [
                Row.join(batch[i : i + config.micro_batch_size]) for i in range(0, len(batch), config.micro_batch_size)
            ]
            num_targets = sum(len(student.target_positions(m.loss_mask, m.doc_lengths)) for m in micro_batches)
            losses = []
            for micro in micro_batches:
                with autocast:
                    loss = student.loss_sum(model, micro.ids, micro.loss_mask, micro.doc_lengths) / num_targets
                scaler.scale(loss).backward()
                losses.append(loss.detach())
            total = torch.stack(losses)
            if not bool(total.isfinite().all()):
                uids = micro_batches[int(total.isfinite().int().argmin())].uids
                raise TrainError(
                    f"step {step + 1}: the loss is {float(total.sum())}; rollouts: {', '.join(uids) or 'unnamed'}"
                )

            learning_rate = plan.learning_rate(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            scaler.unscale_(optimizer)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm))
            if not math.isfinite(grad_norm) and not scaler.is_enabled():  # the scaler skips such a step by itself
                raise TrainError(f"step {step + 1}: the gradient is {grad_norm}; the loss was {float(total.sum())}")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            line = {
                "step": step + 1,
                "loss": float(total.sum()),
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens": tokens_of[step],
                "target_tokens": num_targets,
                "seconds": round(time.perf_counter() - began, 6),
            }
            with disk_errors(out):
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
            bar.advance(tokens_of[step], f"loss {line['loss']:.3f}")
            last = step + 1 == plan.num_steps
            if last or stop.is_set() or (step + 1) % config.checkpoint_every == 0:
                checkpoint.sync(metrics)  # before the checkpoint, which counts on these lines
                checkpoint.save(folder, step + 1, model, optimizer, scaler, fingerprint)
            if stop.is_set() and not last:
                message = f"stopped after step {step + 1} of {plan.num_steps}; the same command goes on from there"
                err().print(message)
                raise KeyboardInterrupt(message)
