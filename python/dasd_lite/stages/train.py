"""train: rows → a student trained on them.

    train.run(rows, model, config, out, seed=0)

Input: a finished pack folder and a model folder. Output: `out`/model (a folder that transformers and vLLM load),
`out`/adapter for LoRA and QLoRA, `out`/metrics.jsonl (a line per optimiser step), `out`/watch.jsonl and the manifest.
Invariants: documents of a row never see each other; the loss of a step is a sum over all its target tokens divided by
their number, however they are cut into micro-batches and shared out over processes; learning rate, order and random
numbers are pure functions of step and seed, so a run that was killed ends with the weights of one that was not.

The loop is `train`, at the end. What a step reads is in schedule.py, what it minimises in objectives/, packed
attention in attention.py, the loss without full logits in logprobs.py, processes in distributed.py, checkpoints in
checkpoint.py, what is left behind in export.py.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dasd_lite.config.train import TrainConfig
from dasd_lite.console import err
from dasd_lite.data.files import disk_errors
from dasd_lite.data.manifest import Identity, identify, read_manifest
from dasd_lite.data.writer import begin, is_finished, publish
from dasd_lite.errors import ConfigError, TrainError
from dasd_lite.model.row import Row
from dasd_lite.training.launch import is_rank, num_ranks
from dasd_lite.training.loop import train
from dasd_lite.training.requirements import conflicts
from dasd_lite.training.rows import Rows, copy_rows
from dasd_lite.training.schedule import Schedule

if TYPE_CHECKING:
    from dasd_lite.training.job import Job
    from dasd_lite.training.ranks import Ranks

VERSION = 2


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
    adapter: Path | None = None,
    questions: Path | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Train `model` on `rows` into `out`, going on from wherever an earlier call was stopped; return the manifest.

    With more than one GPU, or `train.num_processes`, it starts that many processes and waits for them. `adapter` is
    one of the phase before to go on with. `questions` (with answers of at most `max_tokens`, after `system`) are what
    the student is watched by.
    """
    from dasd_lite.training import launch as distributed

    inputs: dict[str, Path | str] = {"rows": rows, "model": model, "seed": str(seed)}
    inputs |= {"max_steps": str(max_steps)} if max_steps is not None else {}
    inputs |= {"adapter": adapter} if adapter is not None else {}
    identity = identify("train", VERSION, config, inputs)
    task = Task(
        rows=str(rows),
        model=str(model),
        config=config.model_dump(mode="json"),
        out=str(out),
        seed=seed,
        max_steps=max_steps,
        force=force,
        trust_remote_code=trust_remote_code,
        adapter=str(adapter) if adapter else None,
        questions=str(questions) if questions and config.monitor_questions else None,
        system=system,
        max_tokens=max_tokens,
        identity=asdict(identity),
    )
    if not is_rank() and is_finished(out, identity, force=force, keep=True):
        work(**asdict(task))  # what a kill left right after the manifest
    elif is_rank() or _num_processes(config) == 1:
        # How many there are, torchrun has said.
        _refuse(config.model_copy(update={"num_processes": None}), num_ranks())
        work(**asdict(task))
    else:
        _refuse(config, _num_processes(config))
        distributed.launch(_num_processes(config), "train", asdict(task))
    return read_manifest(out)


@dataclass(frozen=True)
class Task:
    """What `run` hands to each process, in plain JSON values: its own arguments, and who it is."""

    rows: str
    model: str
    config: dict[str, Any]
    out: str
    seed: int
    max_steps: int | None
    force: bool
    trust_remote_code: bool
    adapter: str | None
    questions: str | None
    system: str | None
    max_tokens: int | None
    identity: dict[str, Any]


def work(**values: Any) -> None:
    """Do the stage in this process, together with the others of its kind; takes the values of a Task."""
    import torch

    from dasd_lite.training.export import export
    from dasd_lite.training.job import out_of_memory
    from dasd_lite.training.ranks import joined

    task = Task(**values)
    out, identity, options = Path(task.out), Identity(**task.identity), TrainConfig.model_validate(task.config)
    with joined() as ranks:
        if ranks.from_first(lambda: is_finished(out, identity, force=task.force, keep=True)):
            shutil.rmtree(out / "checkpoints", ignore_errors=True)  # left when a kill came right after the manifest
            return
        job = None
        try:
            job, probe, end_ids = _prepare(task, options, ranks)
            with disk_errors(out):
                ranks.from_first(lambda: is_finished(out, identity, force=task.force))
                ranks.from_first(lambda: begin(out, identity, options))
            train(job)
            gap = export(
                *(job.model, options.method, job.source, out, probe),
                ranks=job.ranks,
                dtype=job.dtype,
                end_ids=end_ids,
                trust_remote_code=task.trust_remote_code,
            )
        except torch.OutOfMemoryError as error:
            raise out_of_memory(job, options) from error
        # The others wait for it: when they end, the folder is finished.
        ranks.from_first(lambda: _publish(job, identity, gap, _start(job.source, task.adapter)))


def _prepare(task: Task, options: TrainConfig, ranks: Ranks) -> tuple[Job, Row, frozenset[int]]:
    """Check all that can be checked before the first step; return also a row to compare by, and new end tokens."""
    from dasd_lite.data.prompts import read_prompts
    from dasd_lite.model import load as student
    from dasd_lite.model.packed_check import check_packing, documents_of, probe_row
    from dasd_lite.training.checks import check_tokenizer, new_ends
    from dasd_lite.training.job import build

    rows, source, out = Path(task.rows), Path(task.model), Path(task.out)
    spec = student.model_spec(source, trust_remote_code=task.trust_remote_code)
    vocab_size = check_tokenizer(rows, source, spec.vocab_size, ranks)
    table = _open_rows(rows, out, ranks, vocab_size, spec.max_positions)
    if options.objective == "weighted" and table.facts.mean_weight is None:
        raise TrainError(
            f"{rows}: train.objective = 'weighted', but its rows have no weights; run select and pack again"
        )
    end_ids = new_ends(source, table, ranks)
    cost = (6.0 * spec.hidden_size, 1.0)  # of a token, and of a pair of tokens in attention
    schedule = Schedule(table.doc_lengths, table.doc_offsets, options, task.seed, cost, task.max_steps)
    fingerprint = Identity(**task.identity).fingerprint
    adapter = Path(task.adapter) if task.adapter else None
    job = build(
        source, table, schedule, out, fingerprint, ranks, adapter=adapter, trust_remote_code=task.trust_remote_code
    )
    some = documents_of([table[i] for i in range(min(4, len(table)))])  # a row may be one long document
    with job.autocast():
        check_packing(job.model, some, job.dtype)
    if task.questions is not None:
        asked = [q for q in read_prompts(Path(task.questions), system=task.system) if q.answer is not None]
        job.questions = asked[: options.monitor_questions]
        if not asked and ranks.is_first:
            said = f"note: {task.questions}: no question has an answer, so the student is not watched"
            err().print(said, soft_wrap=True)
        job.watch_tokens = min(options.watch_tokens, task.max_tokens or options.watch_tokens)
    return job, probe_row(some, 128), end_ids


def _num_processes(config: TrainConfig) -> int:
    """Return how many processes train: as many as are asked for, or one for each GPU."""
    import torch

    return config.num_processes or max(1, int(torch.cuda.device_count()))


def _refuse(config: TrainConfig, num_processes: int) -> None:
    if faults := list(conflicts(config, num_processes)):
        raise ConfigError("\n".join(faults))


def _start(model: Path, adapter: str | None) -> dict[str, str]:
    """Name what training began with, without the folders that a run happens to lie in."""
    name = "/".join(model.parts[-3:]) if model.name == "model" else model.name
    return {"model": name} | ({"adapter": "/".join(Path(adapter).parts[-3:])} if adapter else {})


def _open_rows(rows: Path, out: Path, ranks: Ranks, vocab_size: int, max_positions: int | None) -> Rows:
    """Copy the rows once on each machine, beside the folder, which begins when all is checked; map them in all."""
    mapped = out.with_name(f".{out.name}.rows-{platform.node()}")
    try:
        facts = None if ranks.local else copy_rows(rows, mapped, vocab_size=vocab_size, max_positions=max_positions)
        table = Rows(mapped, next(found for found in ranks.gather(facts) if found is not None))
        ranks.gather(None)  # all have opened it: now its name can go, and its space goes with the processes
        return table
    finally:
        if ranks.local == 0:
            mapped.unlink(missing_ok=True)


def _publish(job: Job, identity: Identity, gap: float, start: dict[str, str]) -> None:
    from dasd_lite.training.monitor import read_snapshots

    metrics = [json.loads(line) for line in (job.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = sum(m["seconds"] for m in metrics)
    tokens = sum(m["tokens"] for m in metrics)
    looks = read_snapshots(job.out / "watch.jsonl")
    counts = {
        "steps": len(metrics),
        "rows": job.schedule.num_rows,
        "rows_seen": job.schedule.num_samples,
        "tokens": tokens,
        "target_tokens": sum(m["target_tokens"] for m in metrics),
        "first_loss": metrics[0]["loss"],
        "final_loss": metrics[-1]["loss"],
        "export_gap": gap,
        "start": start,
        **({"watched": [asdict(look) for _, look in sorted(looks.items())]} if looks else {}),
    }
    # On a CPU it is all that the process has, Python and torch included.
    peak = "process_peak_bytes" if job.ranks.device == "cpu" else "memory_peak_bytes"
    timing = {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        peak: max(m["memory_bytes"] for m in metrics),
    }
    if job.estimate is not None:
        timing["memory_predicted_bytes"] = job.estimate.predicted_bytes
    if metrics[-1]["mfu"] is not None:
        timing["mfu"] = statistics.median(m["mfu"] for m in metrics)
    with disk_errors(job.out):
        publish(job.out, identity, tables={}, counts=counts, config=job.schedule.config, timing=timing)
    shutil.rmtree(job.out / "checkpoints", ignore_errors=True)


# --- the loop -------------------------------------------------------------------------------------------
