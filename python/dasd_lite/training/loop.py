"""The training loop."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING

from dasd_lite.console import err
from dasd_lite.data.files import disk_errors
from dasd_lite.data.seeds import derive_seed
from dasd_lite.errors import TrainError

if TYPE_CHECKING:
    from dasd_lite.training.job import Job
    from dasd_lite.training.monitor import Snapshot


def train(job: Job) -> None:
    """Train the model in place, from the newest checkpoint if there is one, to the last step."""
    import torch

    from dasd_lite.training import checkpoint, objectives
    from dasd_lite.training.guard import StepStats, check_step, means, stop_signals, worst_rollouts
    from dasd_lite.training.metrics import Log
    from dasd_lite.training.optimizer import make_optimizer

    model, ranks, schedule = job.model, job.ranks, job.schedule
    config, device = schedule.config, torch.device(ranks.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, config)
    objective = objectives.load(config.objective)
    # Gradients under 6e-8 are 0 in float16, so the loss is scaled up; bfloat16 has the range of float32.
    scaler = torch.amp.GradScaler(device.type, enabled=job.dtype == torch.float16)
    folder = job.out / "checkpoints"
    first = checkpoint.restore(folder, model, optimizer, scaler, job.fingerprint, ranks)
    skipped = 0  # steps in a row whose gradient was too large for float16

    with Log(job, first) as log, stop_signals() as stop:
        monitor(job, first)
        job.forget_peak()
        for step in range(first, schedule.num_steps):
            began = time.perf_counter()
            torch.manual_seed(derive_seed(schedule.seed, "step", step, ranks.rank))  # for dropout, where there is any
            micro_batches = job.read(step)
            num_targets = round(ranks.sum([sum(row.num_targets for row, counts in micro_batches if counts)])[0])

            metrics, rows = [], []
            for row, counts in micro_batches:
                loss, found = job.forward(objective, row, num_targets)
                # FSDP takes the mean over processes; the loss is a sum over them.
                factor = (ranks.size if job.is_sharded else 1) * counts
                scaler.scale(loss * factor).backward()
                if counts:
                    metrics.append(found)
                    rows.append(row)
            if not job.is_sharded:
                ranks.sum_gradients(trained)
            scaler.unscale_(optimizer)
            grad_norm = job.clip(trained)

            told = ranks.gather(StepStats.of(metrics, rows, stop.is_set(), job.memory_bytes()))
            figures = means(told, num_targets)
            scaled = skipped if scaler.is_enabled() else None
            if problem := check_step(figures["loss"], grad_norm, log.losses, config.max_loss_jump, scaled):
                kept = ranks.from_first(partial(checkpoint.rollback, folder, step))
                raise TrainError(
                    f"step {step + 1}: {problem}; {worst_rollouts(told, figures['loss'])}; {log.keeps(kept)}"
                )
            if ranks.is_first:
                checkpoint.prune(folder, step)  # its weights have made a step that is good
            skipped = 0 if math.isfinite(grad_norm) else skipped + 1

            learning_rate = schedule.learning_rate(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            figures |= {"learning_rate": learning_rate, "grad_norm": grad_norm, "target_tokens": num_targets}
            log.write(step, figures, max(t.memory_bytes for t in told), time.perf_counter() - began)
            last = step + 1 == schedule.num_steps
            stopping = any(t.stop for t in told) or (ranks.size == 1 and stop.is_set())
            if last or stopping or (step + 1) % config.checkpoint_every == 0:
                log.sync()  # before the checkpoint, which counts on these lines
                checkpoint.save(folder, step + 1, model, optimizer, scaler, job.fingerprint, ranks)
            if stopping and not last:
                done = f"stopped after step {step + 1} of {schedule.num_steps}, whose checkpoint is written"
                if ranks.is_first:
                    err().print(done)
                raise KeyboardInterrupt(f"{done}; the same command goes on from there")
            monitor(job, step + 1)


def monitor(job: Job, num_steps: int) -> None:
    """Ask the student a few questions before the first step, after 1 % of them and after the last."""
    import torch

    from dasd_lite.training.monitor import append, has_collapsed, read_snapshots, take_snapshot

    last, path, ranks = job.schedule.num_steps, job.out / "watch.jsonl", job.ranks
    if not job.questions or num_steps not in (0, math.ceil(last / 100), last):
        return
    looks: dict[int, Snapshot] = ranks.from_first(lambda: read_snapshots(path))
    if num_steps in looks:
        return
    try:
        with job.autocast():
            found = take_snapshot(
                job.model, job.source, job.questions, num_steps, max_tokens=job.watch_tokens, agree=ranks.broadcast
            )
    except torch.OutOfMemoryError:
        if ranks.size > 1:
            raise  # the others wait for this one
        err().print("note: the GPU has no room for train.monitor_questions beside training; it goes on without them")
        job.questions = []
        return
    finally:
        job.forget_peak()
    if ranks.is_first:
        with disk_errors(job.out):
            append(path, found)
        if (said := has_collapsed(looks.get(0, found), found)) is not None:
            err().print(
                f"[bold red]warning[/bold red]: the student has come apart after step {num_steps} of {last}: {said};"
                " look at the rows (dasd-lite show), or train with a lower train.learning_rate",
                soft_wrap=True,
            )
