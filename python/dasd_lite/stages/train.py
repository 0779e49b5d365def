"""Train the student on packed rows (paper section 6.4).

Input: rows and a model. Output: `out`/model, a folder that transformers and vLLM load, `out`/adapter for LoRA and
QLoRA, and the curves. Invariants: documents of a row never see each other; learning rate, order and random numbers are
pure functions of step and seed, so a training run that was killed ends with the weights of one that was not: to the bit
on a CPU, up to rounding on a GPU, whose attention adds up gradients in any order.

The training itself is in training/loop.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from dasd_lite.config.extensions import import_folders, is_extension, name_of
from dasd_lite.config.models import Student, Table
from dasd_lite.config.options import with_options
from dasd_lite.config.train import TrainConfig
from dasd_lite.console import is_rank, note
from dasd_lite.data.handles import Model, Rows, model_path
from dasd_lite.data.hub import has_longrope
from dasd_lite.data.manifest import identify
from dasd_lite.data.prompts import Prompts
from dasd_lite.data.records import Prompt
from dasd_lite.data.seeds import check_seed
from dasd_lite.data.writer import is_finished
from dasd_lite.errors import ConfigError
from dasd_lite.grading import open_grader
from dasd_lite.grading.grade import Grader
from dasd_lite.training.environment import num_ranks
from dasd_lite.training.launch import launch
from dasd_lite.training.objectives import open_objective
from dasd_lite.training.objectives.objective import Objective
from dasd_lite.training.requirements import conflicts, num_processes
from dasd_lite.training.task import TrainTask, remove_checkpoints

VERSION = 3  # 2 computed the output head's gradient twice, in the format of the logits


def train(
    rows: Rows | str | PathLike[str],
    model: Model | Student | str | PathLike[str],
    config: TrainConfig | None = None,
    *,
    out: str | PathLike[str],
    objective: str | Objective | type[Objective] | None = None,
    seed: int = 0,
    adapter: str | PathLike[str] | None = None,
    prompts: Prompts | Iterable[Prompt] | str | PathLike[str] | None = None,
    system: str | None = None,
    grader: str | Grader = "auto",
    max_tokens: int | None = None,
    max_steps: int | None = None,
    context: int | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    **options: Any,
) -> Model:
    """Train a model on rows, from the newest checkpoint if an earlier call was stopped.

    On GPUs, or with `num_processes`, it starts one process for each and waits for them.

    Args:
        rows: What pack returned, or its folder.
        model: What to start from: what train returned, a model table, a folder of weights, or a
            name on the hub.
        config: Options of the stage.
        out: Folder to write.
        objective: An objective by its name, or one of your own; None: the one that `config.objective` names.
        seed: Seed of the order of the rows, of a new adapter and of dropout.
        adapter: Folder of the adapter to continue with, over `model`; None: a new one.
        prompts: Questions with answers, or their file. The model answers a few of them before, during and after
            training, so that a collapse is noticed early.
        system: System message for questions of a file that have none.
        grader: A grader of these answers by its name, or one of your own.
        max_tokens: Longest answer to them; None: `config.monitor_tokens`.
        max_steps: Stop after this many optimizer steps.
        context: Longest sequence that the model will be served with (vLLM's max_model_len), by which a model with
            longrope has its factors; None: `max_model_len` of a model table, or the longest that it can read.
        trust_remote_code: Run code that comes with the model.
        force: Replace a folder that was made with other options.
        **options: Fields of TrainConfig, in place of those of `config`.

    Returns:
        The trained model.

    Raises:
        ConfigError: A wrong option, or one that this machine cannot do.
        DataError: `rows` is no finished folder of pack.
        TrainError: Rows that cannot be trained on, or a bad loss.
        CheckpointError: `out` was made with other options.

    Source: arXiv 2601.09088, section 6.4.
    """
    check_seed(seed)
    config, out = with_options(TrainConfig, config, options, "train"), Path(out)
    source = model_path(model)
    trust_remote_code = model.trust_remote_code if isinstance(model, Table) else trust_remote_code
    context = model.max_model_len if isinstance(model, Table) and context is None else context
    minimized = open_objective(objective if objective is not None else config.objective)
    own_grader = None if isinstance(grader, str) else open_grader(grader)
    if objective is not None:
        config = config.model_copy(update={"objective": minimized.name})
    folder = Rows.of(rows).folder
    inputs: dict[str, Path | str] = {"rows": folder, "model": source, "seed": str(seed)}
    inputs |= {"max_steps": str(max_steps)} if max_steps is not None else {}
    inputs |= {"context": str(context)} if has_longrope(source) else {}
    inputs |= {"adapter": Path(adapter)} if adapter is not None else {}
    inputs |= {"objective": minimized.code} if minimized.code is not None else {}
    identity = identify("train", VERSION, config, inputs)
    if not is_rank() and is_finished(out, identity, force=force, keep=True):
        remove_checkpoints(out)  # left by a kill right after the manifest
        return Model(out)

    task = TrainTask(
        rows=folder,
        model=source,
        config=config,
        out=out,
        identity=identity,
        seed=seed,
        max_steps=max_steps,
        force=force,
        trust_remote_code=trust_remote_code,
        context=context,
        adapter=Path(adapter) if adapter is not None else None,
        questions=_questions(prompts, system, config.monitor_questions),
        max_answer_tokens=min(config.monitor_tokens, max_tokens or config.monitor_tokens),
        grader=grader if isinstance(grader, str) else name_of(grader),
        import_folders=import_folders(),
    )
    if is_rank():  # torchrun has decided how many processes there are
        number, faults = num_ranks(), list(conflicts(config.model_copy(update={"num_processes": None}), num_ranks()))
    else:
        number, faults = num_processes(config), list(conflicts(config))
    if faults:
        raise ConfigError("\n".join(faults))
    if not is_rank() and runs_in_children(number):
        unsendable = list(_unsendable(objective, minimized.name, grader))
        if unsendable and number > 1:
            key, name, kind = unsendable[0]
            raise ConfigError(
                f"{key}: {name} cannot be sent to {number} processes; make it a {kind} in a module that can be"
                " imported, or set train.num_processes = 1"
            )
        if not unsendable:
            launch(number, task)
            return Model(out)
        for key, name, kind in unsendable:
            note(
                f"{key}: {name} cannot be sent to another process, so training runs in this one, which keeps GPU memory"
                f" afterwards; make it a {kind} in a module that can be imported"
            )
    from dasd_lite.training.loop import run_task

    run_task(task, minimized, own_grader)
    return Model(out)


def runs_in_children(number: int) -> bool:
    """Return whether training runs in other processes: several, or one whose GPU memory should end with it.

    Pinned and paged memory and the patches of Liger end with it too.
    """
    import torch

    return number > 1 or bool(torch.cuda.is_available())


def _unsendable(objective: Any, objective_name: str, grader: Any) -> Iterator[tuple[str, str, str]]:
    """Yield what another process cannot get by its name: key, name, and what it would have to be."""
    if not isinstance(objective, str | None) and not (inspect.isclass(objective) and _is_importable(objective)):
        yield "train.objective", objective_name, "class"
    if not isinstance(grader, str) and not (inspect.isfunction(grader) and _is_importable(grader)):
        yield "evaluate.grader", name_of(grader), "function"


def _is_importable(definition: Any) -> bool:
    """Return whether another process gets the same class or function by its name."""
    return definition.__module__ != "__main__" and is_extension(name_of(definition))


def _questions(
    prompts: Prompts | Iterable[Prompt] | str | PathLike[str] | None, system: str | None, number: int
) -> tuple[Prompt, ...]:
    """Return the first questions with an answer."""
    if prompts is None or number == 0:
        return ()
    prompts = Prompts.of(prompts, system=system)
    questions = [prompt for prompt in prompts if prompt.answer is not None]
    if not questions:
        note(f"{prompts.path or 'prompts'}: no question has an answer, so training is not monitored")
    return tuple(questions[:number])
