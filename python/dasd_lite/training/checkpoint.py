"""Checkpoints of training: all that the next step depends on, in safetensors and JSON, never pickle.

Input: model, optimiser, loss scaler, the number of steps done. A checkpoint is a folder `step-NNNNNNNN` with
safetensors (what is trained and its moments; each process writes its share) and state.json, written last. Random
numbers need no state: each step seeds its own. Invariants: after a kill or a power cut at any instant the newest
folder that has its final name is whole; training goes on from it with bitwise the same numbers, and with any number
of processes, whichever number wrote it.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from dasd_lite.data.files import disk_errors, sync_path, write_atomic
from dasd_lite.errors import CheckpointError, MissingExtraError
from dasd_lite.training.ranks import Ranks

try:
    import torch
    from safetensors import SafetensorError
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

FORMAT = 3
_FILE_BYTES = 2 << 30  # of one file at most, about: a file is put together in memory before it is written


def save(
    folder: Path, step: int, model: Any, optimizer: Any, scaler: Any, fingerprint: str, ranks: Ranks | None = None
) -> None:
    """Write the checkpoint of `step` finished steps, beside older ones; all processes have to call it."""
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
        state = {"format": FORMAT, "fingerprint": fingerprint, "step": step, "scaler": scaler.state_dict()}
        with saving(folder):
            write_atomic(temporary / "state.json", json.dumps(state | {"numbers": numbers, "files": files}))
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
        _call(dcp.save, tensors, storage_writer=writer, no_dist=ranks.size == 1)
    with saving(folder):
        sums = _checksums(sorted(temporary.iterdir())[ranks.rank :: ranks.size])
    files = {name: found for part in ranks.gather(sums) for name, found in part.items()}
    ranks.from_first(partial(publish, files))


def prune(folder: Path, step: int) -> None:
    """Drop all checkpoints but that of `step`, whose weights have shown themselves to be good."""
    if (folder / f"step-{step:08d}").is_dir():
        for path in folder.iterdir():
            if path.name != f"step-{step:08d}":
                shutil.rmtree(path)


def rollback(folder: Path, step: int) -> int:
    """Drop the checkpoint of `step`, whose weights may be what is at fault, where there is an older one.

    Returns the step of the one that is left, or 0.
    """
    steps = steps_in(folder)
    if len(steps) > 1 and steps[-1] == step:
        shutil.rmtree(folder / f"step-{steps.pop():08d}")
    return steps[-1] if steps else 0


def restore(folder: Path, model: Any, optimizer: Any, scaler: Any, fingerprint: str, ranks: Ranks | None = None) -> int:
    """Load the newest checkpoint into model, optimiser and scaler; return its step, 0 when there is none."""
    ranks = ranks or Ranks()
    found = ranks.from_first(lambda: steps_in(folder))
    ranks.from_first(lambda: _try_to_write(folder))
    if not found:
        return 0
    newest = folder / f"step-{found[-1]:08d}"
    state = ranks.from_first(lambda: _read_state(newest, found))
    if (state["format"], state["fingerprint"]) != (FORMAT, fingerprint):
        raise CheckpointError(f"{newest}: made under another configuration; remove the folder {folder} to train afresh")
    if bool(state["scaler"]) != scaler.is_enabled():
        was = "float16" if state["scaler"] else "a format other than float16"
        raise CheckpointError(f"{newest}: computed in {was}, this machine is not; set train.dtype, or train afresh")
    names = set(HuggingFaceStorageReader(str(newest)).read_metadata().state_dict_metadata)
    if state["numbers"]:  # there are no moments while float16 has skipped every step
        _begin(model, optimizer)
    tensors, numbers = _state_of(model, optimizer)
    if tensors.keys() != names or numbers.keys() != state["numbers"].keys():
        odd = min(tensors.keys() ^ names, default="its moments")
        raise CheckpointError(f"{newest}: of another model ({odd}); remove the folder {folder} to train afresh")
    with saving(folder):
        reader = HuggingFaceStorageReader(str(newest))
        _call(dcp.load, tensors, storage_reader=reader, no_dist=ranks.size == 1)
    for name, p in _trained(model).items():
        for key, value in optimizer.state[p].items() if numbers else ():
            if f"{name}.{key}" in numbers:
                number = state["numbers"][f"{name}.{key}"]
                optimizer.state[p][key] = value.fill_(number) if isinstance(value, torch.Tensor) else number
    scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def steps_in(folder: Path) -> list[int]:
    """Return the steps of which there are checkpoints, the newest last; a folder that cannot be read is an error."""
    if not folder.exists():
        return []
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}); training would begin anew") from error
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-[0-9]{8}", name))


def _try_to_write(folder: Path) -> None:
    """Find out before the first step whether a checkpoint can be written where there are some."""
    if folder.exists():
        with disk_errors(folder):
            (folder / "try.tmp").write_bytes(b"")
            (folder / "try.tmp").unlink()


def _read_state(newest: Path, steps: list[int]) -> dict[str, Any]:
    """Read what a checkpoint says of itself and hold its files against it."""
    rest = f"that of step {steps[-2]}" if len(steps) > 1 else "step 1"
    try:
        state: dict[str, Any] = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        wanted = state["files"] if state["format"] == FORMAT else {}
        odd = [name for name, found in _checksums([newest / name for name in wanted]).items() if found != wanted[name]]
        state["fingerprint"], state["scaler"], state["numbers"], state["step"]
    except KeyError as error:
        raise CheckpointError(
            f"{newest}: damaged (state.json has no {error}); remove it, and training goes on from {rest}"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{newest}: damaged ({error}); remove it, and training goes on from {rest}") from error
    if odd:
        raise CheckpointError(
            f"{newest}: damaged ({odd[0]} is not what was written); remove it, and training goes on from {rest}"
        )
    return state


def _checksums(paths: list[Path]) -> dict[str, int]:
    """Return each file's CRC-32; several at once, since they may be many GB."""

    def checksum(path: Path) -> int:
        found = 0
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                found = zlib.crc32(block, found)
        return found

    with ThreadPoolExecutor() as pool:
        return dict(zip((path.name for path in paths), pool.map(checksum, paths), strict=True))


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn a full disk under safetensors into the one line that a full disk gets everywhere."""
    with disk_errors(folder):
        try:
            yield
        except (SafetensorError, dcp.api.CheckpointException) as error:
            if any(sign in str(error) for sign in ("No space left", "File too large", "quota")):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise


def _call(save_or_load: Any, *arguments: Any, **options: Any) -> None:
    """Call torch without its remark that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        save_or_load(*arguments, **options)


def _trained(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _state_of(model: Any, optimizer: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Return what is trained with its moments, by name, and the numbers that the optimiser counts."""
    tensors: dict[str, Any] = {}
    numbers: dict[str, float] = {}
    shared: set[int] = set()
    for name, p in _trained(model).items():
        tensors[f"weights.{name}"] = p.detach()
        for key, value in optimizer.state[p].items() if p in optimizer.state else ():
            if isinstance(value, torch.Tensor) and value.ndim:
                if type(value) is torch.Tensor and value.data_ptr() in shared:
                    continue  # what 8 bits stand for: one table for all weights
                shared |= {value.data_ptr()} if type(value) is torch.Tensor else set()
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                numbers[f"{name}.{key}"] = value if isinstance(value, int) else float(value)
    return tensors, numbers


def _begin(model: Any, optimizer: Any) -> None:
    """Let the optimiser make its moments, which a checkpoint then fills; at a learning rate of 0 no weight moves."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in _trained(model).values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _files(tensors: dict[str, Any]) -> dict[str, int]:
    """Share the tensors out over files, numbered from 1."""
    found: dict[str, int] = {}
    file, size = 1, 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > _FILE_BYTES:
            file, size = file + 1, 0
        found[name] = file
        size += tensor.nbytes
    return found
