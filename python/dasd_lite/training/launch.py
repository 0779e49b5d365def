"""Processes that train one model: starting them, stopping them, and what ended them.

Input: a number of processes, one too, because a GPU's memory ends with the process that used it, and a TrainTask. On
one machine torch's elastic agent starts them from here; over several machines, `torchrun … -m dasd_lite train run.toml`
is run on each. Invariants: when one dies, all end within half a minute, with one line; Ctrl-C and SIGTERM reach all of
them and let them finish their step; none outlives the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from dasd_lite import errors
from dasd_lite.data.run_folder import StageFolder
from dasd_lite.errors import DasdError, TrainError, remote_error
from dasd_lite.training.environment import WAIT_MINUTES, rank_environment, training_gpus

if TYPE_CHECKING:
    from dasd_lite.training.task import TrainTask


_GRACE_S = 10  # for the others when one has died: most of them wait for it, forever
_PR_SET_PDEATHSIG = 1
_TIMED_OUT = ("Timed out waiting", "Watchdog caught collective operation timeout")  # gloo's words, and NCCL's


# --- the parent -------------------------------------------------------------------------------------


def launch(num_processes: int, task: TrainTask) -> None:
    """Do a training run in other processes of this machine, one or several; return when all have finished.

    Raises:
        DasdError: What stopped the first process that raised one.
        TrainError: A process was killed.
        KeyboardInterrupt: The processes were asked to stop and did.
    """
    with tempfile.TemporaryDirectory(prefix="dasd-lite-") as temporary:
        folder = Path(temporary)
        (folder / "task.json").write_text(task.to_json(), encoding="utf-8")
        failures: list[BaseException] = []
        # The agent blocks, and only the main thread may take signals.
        agent = threading.Thread(target=_run_agent, args=(num_processes, folder, failures), name="torchrun")
        with _stop_requests() as requests:
            agent.start()
            forwarded: dict[str, int] = {}  # how often each process was asked to stop
            while agent.is_alive():
                agent.join(0.2)
                _forward(folder, requests, forwarded)
        if failures and not (requests and _was_only_stopped(failures[0], folder)):
            _raise(failures[0], folder, num_processes)
        if requests and (failures or not StageFolder.at(task.out).is_finished):
            raise KeyboardInterrupt


def _run_agent(num_processes: int, folder: Path, failures: list[BaseException]) -> None:
    """Let torch's elastic agent start the processes, connect them, and end all when one fails."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("elastic", "launcher"):  # `_raise` says in one line what they log in 50
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"shutdown_timeout": _GRACE_S, "max_restarts": 0, "local_addr": "127.0.0.1"}
    known = {field.name for field in dataclasses.fields(LaunchConfig)}  # of this version of torch
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=folder.name,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        **{name: value for name, value in options.items() if name in known},
    )
    given = rank_environment(num_processes, training_gpus())
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)  # the agent passes its own environment on
    try:
        # A command, not a function: multiprocessing would import the user's script again in each process.
        elastic_launch(config, sys.executable)("-m", __name__, str(folder), str(os.getpid()))
    except BaseException as error:
        failures.append(error)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of being ended by them."""
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: requests.append(number)) for number in numbers]
    try:
        yield requests
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _forward(folder: Path, requests: list[int], forwarded: dict[str, int]) -> None:
    """Ask each process to stop as often as this one was: first it finishes its step, the second time it ends at once.

    The agent would end them all after one time-out, and a step may take longer than a dead process is worth waiting
    for. A process that is only starting is asked as soon as it has written its number.
    """
    for path in folder.glob("pid-*") if requests else ():
        pid = path.read_text(encoding="utf-8")
        while pid and forwarded.get(path.name, 0) < len(requests):
            forwarded[path.name] = forwarded.get(path.name, 0) + 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGTERM)


def _was_only_stopped(failure: BaseException, folder: Path) -> bool:
    """Return whether processes that were asked to stop ended because of that alone."""
    codes = {process.exitcode for process in getattr(failure, "failures", {}).values()}
    return not _recorded(folder) and bool(codes) and codes <= {-signal.SIGTERM}


class _Recorded(TypedDict):
    """An exception that ended a process, as torch's `record` writes it."""

    message: str
    extraInfo: dict[str, str]


def _recorded(folder: Path) -> list[_Recorded]:
    """Return the exceptions that ended processes."""
    exceptions: list[_Recorded] = []
    for path in sorted(folder.rglob("error.json")):
        with contextlib.suppress(ValueError):  # a process that was killed while it wrote
            exceptions.append(json.loads(path.read_text(encoding="utf-8"))["message"])
    return exceptions


def _raise(failure: BaseException, folder: Path, num_processes: int) -> None:
    """Raise what ended the processes: an error of ours, a signal, or else a defect with its traceback."""
    recorded = _recorded(folder)
    # Not only the first failure: when one process ends, the connections of the others break.
    for exception in recorded:
        kind, _, message = exception["message"].partition(": ")
        if isinstance(known := getattr(errors, kind, None), type) and issubclass(known, DasdError):
            raise remote_error(kind, message)
    codes = {rank: process.exitcode for rank, process in getattr(failure, "failures", {}).items()}
    for rank, code in sorted(codes.items()):
        if code < 0 and code != -signal.SIGTERM:
            why = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
            which = f"process {rank} of {num_processes}" if num_processes > 1 else "the process that trains"
            others = ", and the others were stopped" if num_processes > 1 else ""
            raise TrainError(
                f"{which} was ended by {signal.Signals(-code).name}{why}{others}; run the same command to resume from"
                " the last checkpoint"
            )
    if any(sign in exception["message"] for exception in recorded for sign in _TIMED_OUT):
        raise TrainError(
            f"a process waited {WAIT_MINUTES} minutes for another one that does not answer, and all were stopped; run"
            " the same command to resume from the last checkpoint"
        )
    for exception in recorded:
        sys.stderr.write(exception["extraInfo"]["py_callstack"])
    raise failure


# --- a process --------------------------------------------------------------------------------------


def _main(folder: Path, parent: int) -> None:
    """Be one of the processes that `launch` starts."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it died before the line above took effect
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()), encoding="utf-8")
    from dasd_lite.config.extensions import add_import_folder
    from dasd_lite.training.task import TrainTask

    task = TrainTask.from_json((folder / "task.json").read_text(encoding="utf-8"))
    for path in task.import_folders:
        add_import_folder(Path(path))
    from torch.distributed.elastic.multiprocessing.errors import record

    from dasd_lite.training.loop import run_task

    try:
        record(run_task)(task)
        return
    except KeyboardInterrupt:
        code = 0  # the parent sees that the folder is not finished
    except Exception as error:
        code = 2 if isinstance(error, DasdError) else 1  # recorded; the parent raises it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the process group is still open, and its threads may abort an orderly exit


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
