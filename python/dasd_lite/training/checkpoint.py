"""Checkpoints of training: everything that the next step depends on, in safetensors and JSON, never pickle.

Input: model, optimizer, loss scaler, the number of finished steps. A checkpoint is a folder `step-NNNNNNNN` with
safetensors (the trained weights and their moments; each process writes its share) and state.json, written last. Random
numbers need no state: each step seeds its own. Invariants: after a kill or a power cut at any instant, the newest
folder with its final name is complete; training resumes from it with any number of processes, whatever number wrote it,
and on a CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypedDict

from dasd_lite.data.files import disk_errors, sync_path, write_atomic
from dasd_lite.errors import CheckpointError, MissingExtraError
from dasd_lite.training.ranks import Ranks

try:
    import torch
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
    from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

FORMAT = 3
_FILE_BYTES = 2 << 30  # of one file, roughly: a file is assembled in memory before it is written
P = ParamSpec("P")


class _State(TypedDict):
    """What state.json holds."""

    format: int
    fingerprint: str
    step: int
    scaler: dict[str, Any]
    numbers: dict[str, float]
    files: dict[str, int]


def save(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    fingerprint: str,
    ranks: Ranks | None = None,
) -> None:
    """Write the checkpoint of `step` finished steps and keep older ones; all processes have to call it."""
    ranks = ranks or Ranks()
    final = folder / f"step-{step:08d}"
    if ranks.from_first(final.exists):
        return
    temporary = final.with_suffix(".tmp")
    tensors, numbers = _state_of(model, optimizer)

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        with saving(folder):
            temporary.mkdir(parents=True)

    def publish(files: dict[str, int]) -> None:
        state: _State = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "step": step,
            "scaler": scaler.state_dict(),
            "numbers": numbers,
            "files": files,
        }
        with saving(folder):
            write_atomic(temporary / "state.json", json.dumps(state))
            for path in temporary.iterdir():
                sync_path(path)
            sync_path(temporary)
            temporary.rename(final)
            sync_path(folder)
            sync_path(folder.parent)

    ranks.from_first(prepare)
    with saving(folder):
        writer = HuggingFaceStorageWriter(
            str(temporary), fqn_to_index_mapping=_files(tensors), save_distributed=True, thread_count=1
        )
        _call(save_tensors, tensors, storage_writer=writer, no_dist=ranks.size == 1)
    with saving(folder):
        sums = _checksums(sorted(temporary.iterdir())[ranks.rank :: ranks.size])
    files = {name: checksum for part in ranks.gather(sums) for name, checksum in part.items()}
    ranks.from_first(partial(publish, files))


def prune(folder: Path, step: int) -> None:
    """Delete every checkpoint except the one of `step`, now that a step from its weights has succeeded."""
    if (folder / f"step-{step:08d}").is_dir():
        for path in folder.iterdir():
            if path.name != f"step-{step:08d}":
                shutil.rmtree(path)


def rollback(folder: Path, step: int) -> int:
    """Delete the checkpoint of `step`, whose weights may be the cause of a bad step, if there is an older one.

    Returns the step of the newest one left, or 0.
    """
    steps = steps_in(folder)
    if len(steps) > 1 and steps[-1] == step:
        shutil.rmtree(folder / f"step-{steps.pop():08d}")
    return steps[-1] if steps else 0


def restore(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    fingerprint: str,
    ranks: Ranks | None = None,
) -> int:
    """Load the newest checkpoint into model, optimizer and scaler; return its step, 0 if there is none.

    Raises:
        CheckpointError: It is damaged, or of another configuration.
    """
    ranks = ranks or Ranks()
    steps = ranks.from_first(lambda: steps_in(folder))
    ranks.from_first(lambda: _try_to_write(folder))
    if not steps:
        return 0
    newest = folder / f"step-{steps[-1]:08d}"
    state = ranks.from_first(lambda: _read_state(newest, steps))
    if (state["format"], state["fingerprint"]) != (FORMAT, fingerprint):
        raise CheckpointError(f"{newest}: made with another configuration; remove {folder} to train from scratch")
    if bool(state["scaler"]) != scaler.is_enabled():
        was = "float16" if state["scaler"] else "a format other than float16"
        raise CheckpointError(
            f"{newest}: computed in {was}, and this machine would not; set train.dtype, or remove {folder} to train"
            " from scratch"
        )
    names = set(HuggingFaceStorageReader(str(newest)).read_metadata().state_dict_metadata)
    if state["numbers"]:  # there are no moments while float16 has skipped every step
        _create_moments(model, optimizer)
    tensors, numbers = _state_of(model, optimizer)
    if tensors.keys() != names or numbers.keys() != state["numbers"].keys():
        odd = min(tensors.keys() ^ names, default="its moments")
        raise CheckpointError(f"{newest}: made with another model ({odd}); remove {folder} to train from scratch")
    with saving(folder):
        reader = HuggingFaceStorageReader(str(newest))
        _call(load_tensors, tensors, storage_reader=reader, no_dist=ranks.size == 1)
    for name, p in _trained(model).items():
        for key, value in optimizer.state[p].items() if numbers else ():
            if f"{name}.{key}" in numbers:
                number = state["numbers"][f"{name}.{key}"]
                optimizer.state[p][key] = value.fill_(number) if isinstance(value, torch.Tensor) else number
    scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def steps_in(folder: Path) -> list[int]:
    """Return the steps that have checkpoints, the newest last. A folder that cannot be read is an error."""
    if not folder.exists():
        return []
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be read ({error.strerror}), and training would start from scratch; make it readable"
        ) from error
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-[0-9]{8}", name))


def _try_to_write(folder: Path) -> None:
    """Fail before the first step rather than at the first checkpoint."""
    if folder.exists():
        with disk_errors(folder):
            (folder / "try.tmp").write_bytes(b"")
            (folder / "try.tmp").unlink()


def _read_state(newest: Path, steps: list[int]) -> _State:
    """Read a checkpoint's state.json and compare its files with the checksums there."""
    rest = f"that of step {steps[-2]}" if len(steps) > 1 else "step 1"
    try:
        state: _State = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        written = state["files"] if state["format"] == FORMAT else {}
        there = _checksums([newest / name for name in written])
        changed = [name for name in written if there[name] != written[name]]
        state["fingerprint"], state["scaler"], state["numbers"], state["step"]
    except KeyError as error:
        raise CheckpointError(
            f"{newest}: damaged (state.json has no {error}); remove it to resume from {rest}"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{newest}: damaged ({error}); remove it to resume from {rest}") from error
    if changed:
        raise CheckpointError(
            f"{newest}: damaged ({changed[0]} is not what was written); remove it to resume from {rest}"
        )
    return state


def _checksums(paths: list[Path]) -> dict[str, int]:
    """Return the CRC-32 of each file; several at once, since they may be many GB."""

    def checksum(path: Path) -> int:
        value = 0
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                value = zlib.crc32(block, value)
        return value

    with ThreadPoolExecutor() as pool:
        return dict(zip((path.name for path in paths), pool.map(checksum, paths), strict=True))


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Report a full disk in safetensors by the same line as everywhere."""
    with disk_errors(folder):
        try:
            yield
        except (SafetensorError, CheckpointException) as error:
            if any(sign in str(error) for sign in ("No space left", "File too large", "quota")):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise


def _call(save_or_load: Callable[P, object], *arguments: P.args, **options: P.kwargs) -> None:
    """Call torch without its warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        save_or_load(*arguments, **options)


# Moments are saved and filled by hand. torch's get_state_dict and set_state_dict do not work with bitsandbytes 0.50:
# all weights share one quantization table, which safetensors refuses to write twice; its state_dict nests the moments,
# which set_state_dict cannot restore; and a paged moment has to be filled in place to stay paged.


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _state_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the trained weights and their moments by name, and the numbers that the optimizer counts."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    shared: set[int] = set()
    for name, p in _trained(model).items():
        tensors[f"weights.{name}"] = p.detach()
        for key, value in optimizer.state[p].items() if p in optimizer.state else ():
            if isinstance(value, torch.Tensor) and value.ndim:
                if type(value) is torch.Tensor and value.data_ptr() in shared:
                    continue  # what the 8-bit codes stand for: one table for all weights
                shared |= {value.data_ptr()} if type(value) is torch.Tensor else set()
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                numbers[f"{name}.{key}"] = value if isinstance(value, int) else float(value)
    return tensors, numbers


def _create_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer create its moments, which a checkpoint then fills; at a learning rate of 0 no weight moves."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in _trained(model).values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _files(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Distribute the tensors over files, numbered from 1."""
    files: dict[str, int] = {}
    file, size = 1, 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > _FILE_BYTES:
            file, size = file + 1, 0
        files[name] = file
        size += tensor.nbytes
    return files
