"""Several processes that train one model together: starting them, what they tell each other, how they end.

Input: the number of processes. On one machine torchrun's agent starts them from here; over several one calls
`torchrun … -m dasd_lite train run.toml` on each. Invariants: one that dies ends all within half a minute, with one
line; Ctrl-C and SIGTERM reach all and let them finish their step; none outlives the command.

Weights that are trained are spread over the processes by FSDP2 (`shard`); a base that stays as it is, under an adapter,
is whole in each.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dasd_lite.errors import DasdError, TrainError, remote_error

_LAUNCHED = "DASD_LITE_LAUNCHED"  # set in processes that we have started, not torchrun on the command line
_GRACE_S = 10  # what is left to the others when one has died: they mostly wait for it, and for ever
_PR_SET_PDEATHSIG = 1


# --- starting and ending ----------------------------------------------------------------------------


def launch(num_processes: int, stage: str, arguments: Mapping[str, Any]) -> None:
    """Run a stage in several processes of this machine, by torchrun's agent; return when all have ended well.

    `arguments` are plain JSON values for the stage's function `work`. Raises what the first process raised that was
    stopped by an error of ours, TrainError when one was killed, KeyboardInterrupt when they were asked to stop and did.
    """
    with tempfile.TemporaryDirectory(prefix="dasd-lite-") as temporary:
        folder = Path(temporary)
        task = {"stage": stage, "arguments": dict(arguments), "parent": os.getpid()}
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        failures: list[BaseException] = []
        agent = threading.Thread(target=_run_agent, args=(num_processes, folder, failures), name="torchrun")
        with _asked_to_stop() as asked:
            agent.start()
            told: dict[str, int] = {}  # how often each process has been asked
            while agent.is_alive():
                agent.join(0.2)
                _forward(folder, asked, told)
        if failures and not (asked and _has_only_stopped(failures[0], folder)):
            _raise(failures[0], folder, num_processes)
        if asked and (failures or any(folder.glob("stopped-*"))):
            raise KeyboardInterrupt


def _run_agent(num_processes: int, folder: Path, failures: list[BaseException]) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("elastic", "launcher"):  # we say in one line what they do in 50
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"shutdown_timeout": _GRACE_S, "max_restarts": 0, "local_addr": "127.0.0.1"}
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
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
    import torch

    threads = max(1, (os.cpu_count() or 1) // num_processes)
    given = {_LAUNCHED: "1"} | ({} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(threads)})
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)  # the agent hands its own environment down
    try:
        elastic_launch(config, sys.executable)("-m", __name__, str(folder))
    except BaseException as error:
        failures.append(error)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM instead of breaking off."""
    asked: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may take signals
        return
    before = [signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _forward(folder: Path, asked: list[int], told: dict[str, int]) -> None:
    """Ask each process to stop as often as we are: the first time it finishes its step, the second it breaks off.

    One that has only just started is asked as soon as its number is known.
    """
    for path in folder.glob("pid-*") if asked else ():
        text = path.read_text(encoding="utf-8")
        while text and told.get(path.name, 0) < len(asked):
            told[path.name] = told.get(path.name, 0) + 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(text), signal.SIGTERM)


def _has_only_stopped(failure: BaseException, folder: Path) -> bool:
    """Tell whether processes that were asked to stop ended of that, and of nothing else."""
    codes = {found.exitcode for found in getattr(failure, "failures", {}).values()}
    return not any(folder.glob("error-*")) and bool(codes) and codes <= {-signal.SIGTERM}


def _raise(failure: BaseException, folder: Path, num_processes: int) -> None:
    """Say in one line what ended the processes: an error of ours, a signal, or else the traceback of a defect."""
    for path in sorted(folder.glob("error-*")):
        raise remote_error(*json.loads(path.read_text(encoding="utf-8")))
    codes = {rank: found.exitcode for rank, found in getattr(failure, "failures", {}).items()}
    for rank, code in sorted(codes.items()):
        if code < 0 and code != -signal.SIGTERM:
            name = signal.Signals(-code).name
            why = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
            raise TrainError(
                f"process {rank} of {num_processes} was ended by {name}{why}; the others were stopped, and the same"
                " command goes on from the last checkpoint, where there is one"
            )
    for path in sorted(folder.glob("traceback-*")):
        sys.stderr.write(path.read_text(encoding="utf-8"))
    raise failure


def stop_numbers() -> tuple[signal.Signals, ...]:
    """Return the signals that ask this process to stop: where we started it, Ctrl-C comes by way of the parent."""
    return (signal.SIGTERM,) if _LAUNCHED in os.environ else (signal.SIGINT, signal.SIGTERM)


def _main(folder: Path) -> None:
    """Run one of the processes that `launch` starts."""
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != task["parent"]:
        sys.exit(1)  # it died before we could ask to die with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank = os.environ["RANK"]
    (folder / f"pid-{rank}").write_text(str(os.getpid()), encoding="utf-8")
    try:
        importlib.import_module(f"dasd_lite.stages.{task['stage']}").work(**task["arguments"])
    except KeyboardInterrupt:
        (folder / f"stopped-{rank}").touch()
    except DasdError as error:
        (folder / f"error-{rank}").write_text(json.dumps([type(error).__name__, str(error)]), encoding="utf-8")
        sys.exit(2)
    except BaseException:
        (folder / f"traceback-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(1)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))


def is_rank() -> bool:
    """Tell whether torchrun, or we by its agent, have started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def num_ranks() -> int:
    """Return how many processes train together, this one included."""
    return int(os.environ["WORLD_SIZE"]) if is_rank() else 1
