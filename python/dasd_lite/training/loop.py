"""A training run from its task to the finished folder, in one of its processes.

Input: a TrainTask. Output: `out`/model, `out`/adapter, `out`/metrics.jsonl (one line per optimizer step),
`out`/monitor.jsonl and the manifest. Invariants: the loss of a step is a sum over all its target tokens divided by
their number, however they are cut into micro-batches and shared out over processes; a bad loss or gradient is caught
before it reaches the weights; on a CPU, a training run that was killed ends with the weights of one that was not.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict
from functools import partial

from dasd_lite.console import err, note
from dasd_lite.data.files import disk_errors
from dasd_lite.data.metrics import read_metrics
from dasd_lite.data.seeds import derive_seed
from dasd_lite.data.writer import begin, is_finished, publish
from dasd_lite.errors import ConfigError, MissingExtraError, TrainError
from dasd_lite.grading import CheckedGrader, open_grader
from dasd_lite.model.kernels import kernels_in_use
from dasd_lite.model.memory import is_out_of_memory
from dasd_lite.training import checkpoint, export
from dasd_lite.training.batches import Batches
from dasd_lite.training.guard import StepStats, check_step, means, stop_signals, worst_rollouts
from dasd_lite.training.job import Job, load_job, out_of_memory
from dasd_lite.training.metrics import Log
from dasd_lite.training.monitor import append_snapshot, has_collapsed, read_snapshots, take_snapshot
from dasd_lite.training.objectives import CheckedObjective
from dasd_lite.training.optimizer import make_optimizer
from dasd_lite.training.ranks import joined
from dasd_lite.training.task import TrainTask, remove_checkpoints

try:
    import torch
except ImportError as error:
    raise MissingExtraError("train", "torch") from error


def run_task(task: TrainTask, objective: CheckedObjective | None = None, grader: CheckedGrader | None = None) -> None:
    """Do a training run in this process, together with its other processes if there are any.

    `objective` and `grader` are those that the task names, where they were handed over as objects.
    """
    out, identity, config = task.out, task.identity, task.config
    with joined() as ranks:
        if ranks.from_first(lambda: is_finished(out, identity, force=task.force, keep=True)):
            ranks.from_first(lambda: remove_checkpoints(out))  # left by a kill right after the manifest
            return
        job = None
        try:
            job = load_job(task, ranks, objective, grader)
            if not ranks.from_first(lambda: checkpoint.steps_in(out / "checkpoints")):
                export.try_export(
                    job.model,
                    config.method,
                    task.model,
                    out,
                    ranks=job.ranks,
                    trust_remote_code=task.trust_remote_code,
                )
            with disk_errors(out):
                ranks.from_first(lambda: is_finished(out, identity, force=task.force))
                ranks.from_first(lambda: begin(out, identity, config))
            with job.patches.active(), ranks.training():
                train(job)
            gap = export.export(
                job.model,
                config.method,
                task.model,
                out,
                job.comparison_row,
                ranks=job.ranks,
                dtype=job.dtype,
                end_ids=job.end_ids,
                trust_remote_code=task.trust_remote_code,
                context=task.context,
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(job, config) from error
        # The others wait for it: when they end, the folder is finished.
        ranks.from_first(lambda: finish(job, gap))


def train(job: Job) -> None:
    """Train the model in place, from the newest checkpoint if there is one, to the last step."""
    task, model, ranks, schedule = job.task, job.model, job.ranks, job.schedule
    config, fingerprint, device = task.config, task.identity.fingerprint, torch.device(ranks.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, config)
    # Gradients under 6e-8 are 0 in float16, so the loss is scaled up; bfloat16 has the range of float32.
    scaler = torch.amp.GradScaler(device.type, enabled=job.dtype == torch.float16)
    folder = task.out / "checkpoints"
    first = checkpoint.restore(folder, model, optimizer, scaler, fingerprint, ranks)
    skipped = 0  # steps in a row whose gradient was too large for float16

    shares = (job.share(step) for step in range(first, schedule.num_steps))
    batches = Batches(shares, job.read, in_thread=device.type == "cuda")
    with Log(job, first) as log, batches, stop_signals() as stop:
        monitor(job, first)
        job.forget_peak()
        for step in range(first, schedule.num_steps):
            began = time.perf_counter()
            torch.manual_seed(derive_seed(schedule.seed, "step", step, ranks.rank))  # for dropout, if there is any
            share = job.share(step)

            metrics, rows = [], []
            for batch in batches.take(len(share.micro_batches)):
                loss, sums = job.forward(batch)
                # FSDP takes the mean over processes; the loss is a sum over them.
                factor = (ranks.size if job.is_sharded else 1) * batch.counts
                scaler.scale(loss * factor).backward()
                if batch.counts:
                    metrics.append(sums)
                    rows.append(batch.row)
            if not job.is_sharded:
                ranks.sum_gradients(trained)
            scaler.unscale_(optimizer)
            grad_norm = job.clip(trained)

            stats = ranks.gather(StepStats.of(metrics, rows, stop.is_set(), job.memory_bytes()))
            figures = means(stats, share.num_targets)
            num_skipped = skipped if scaler.is_enabled() else None
            if problem := check_step(figures["loss"], grad_norm, log.losses, config.max_loss_jump, num_skipped):
                kept = ranks.from_first(partial(checkpoint.rollback, folder, step))
                raise TrainError(
                    f"step {step + 1}: {problem}; {worst_rollouts(stats, figures['loss'])}; {_what_is_kept(kept)}"
                )
            if ranks.is_first:
                checkpoint.prune(folder, step)  # a step from its weights has succeeded
            skipped = 0 if math.isfinite(grad_norm) else skipped + 1

            learning_rate = schedule.learning_rate(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            figures |= {"learning_rate": learning_rate, "grad_norm": grad_norm, "target_tokens": share.num_targets}
            log.write(step, figures, max(each.memory_bytes for each in stats), time.perf_counter() - began)
            is_last = step + 1 == schedule.num_steps
            stopping = any(each.stop for each in stats) or (ranks.size == 1 and stop.is_set())
            if is_last or stopping or (step + 1) % config.checkpoint_every == 0:
                log.sync()  # before the checkpoint, which relies on these lines
                checkpoint.save(folder, step + 1, model, optimizer, scaler, fingerprint, ranks)
            if stopping and not is_last:
                message = f"stopped after step {step + 1} of {schedule.num_steps} with a checkpoint"
                err().print(message)
                raise KeyboardInterrupt(f"{message}; run the same command to resume")
            monitor(job, step + 1)


def _what_is_kept(step: int) -> str:
    if not step:
        return "there is no checkpoint yet"
    return f"the checkpoint of step {step} is kept, and the same command resumes from it"


def monitor(job: Job, num_steps: int) -> None:
    """Ask the model a few questions before the first step, after 1 % of the steps and after the last."""
    task, ranks, last = job.task, job.ranks, job.schedule.num_steps
    if not job.is_monitored or num_steps not in (0, math.ceil(last / 100), last):
        return
    path = task.out / "monitor.jsonl"
    snapshots = ranks.from_first(lambda: read_snapshots(path))
    if num_steps in snapshots:
        return
    if (generating := job.generating()) is None:
        if ranks.is_first:
            note(
                "train.monitor_questions: these GPUs have neither room for all weights nor a direct link, so answers"
                " would take minutes; training continues without them"
            )
        job.is_monitored = False
        return
    try:
        with job.autocast(), generating:
            snapshot = take_snapshot(
                job.model,
                task.model,
                task.questions,
                num_steps,
                grader=job.grader or open_grader(task.grader),
                max_tokens=task.max_answer_tokens,
                broadcast=ranks.broadcast,
            )
    except ConfigError as error:  # of every process alike
        if ranks.is_first:
            note(f"train.monitor_questions: {error}; training continues without them")
        job.is_monitored = False
        return
    except Exception as error:
        if not is_out_of_memory(error) or ranks.size > 1:  # the others wait for this one
            raise
        note("the GPU has no memory for train.monitor_questions beside training; training continues without them")
        job.is_monitored = False
        return
    finally:
        job.forget_peak()
    if ranks.is_first:
        with disk_errors(task.out):
            append_snapshot(path, snapshot)
        if (evidence := has_collapsed(snapshots.get(0, snapshot), snapshot)) is not None:
            err().print(
                f"[bold red]warning[/bold red]: the student's output collapsed at step {num_steps} of {last}:"
                f" {evidence}; inspect the rows with dasd-lite show, or train with a lower train.learning_rate",
                soft_wrap=True,
            )


def finish(job: Job, gap: export.Gap) -> None:
    """Write the manifest, from which on the folder is finished, and remove the checkpoints."""
    task = job.task
    metrics = list(read_metrics(task.out / "metrics.jsonl"))
    snapshots = read_snapshots(task.out / "monitor.jsonl")
    tokens, seconds = sum(line["tokens"] for line in metrics), sum(line["seconds"] for line in metrics)
    counts = {
        "steps": len(metrics),
        "rows": job.schedule.num_rows,
        "rows_seen": job.schedule.num_samples,
        "tokens": tokens,
        "target_tokens": sum(line["target_tokens"] for line in metrics),
        "first_step_loss": metrics[0]["loss"],
        "last_step_loss": metrics[-1]["loss"],
        "export_gap_mean": gap.mean,
        "export_gap_max": gap.maximum,
        "attention": kernels_in_use(),
        "start": _start(task),
    }
    if snapshots:
        counts["monitored"] = [asdict(snapshot) for _, snapshot in sorted(snapshots.items())]
    # On a CPU it is the peak of the whole process, Python and torch included.
    peak = "process_peak_bytes" if job.ranks.device == "cpu" else "memory_peak_bytes"
    timing = {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        peak: max(line["memory_bytes"] for line in metrics),
    }
    if job.cost is not None:
        timing["memory_predicted_bytes"] = job.cost.memory_bytes
    if metrics[-1]["mfu"] is not None:
        timing["mfu"] = statistics.median(line["mfu"] for line in metrics)
    with disk_errors(task.out):
        publish(task.out, task.identity, tables={}, counts=counts, config=task.config, timing=timing)
    remove_checkpoints(task.out)


def _start(task: TrainTask) -> dict[str, str]:
    """Name what training started from, without the folders that the run happens to be in."""
    name = "/".join(task.model.parts[-3:]) if task.model.name == "model" else task.model.name
    return {"model": name} | ({"adapter": "/".join(task.adapter.parts[-3:])} if task.adapter else {})
