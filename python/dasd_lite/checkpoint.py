"""Checkpoints of training: all that the next step depends on, in safetensors and JSON, never pickle.

Input: model, optimiser, loss scaler, the number of steps done. A checkpoint is a folder
`step-NNNNNNNN` with weights.safetensors (what is trained), optimizer.safetensors, rng.safetensors
and state.json. Invariant: after a kill or a power cut at any instant the newest folder that has its
final name is whole, and training goes on from it with bitwise the same numbers.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dasd_lite.dataset import disk_errors, sync_file, sync_folder, write_atomic
from dasd_lite.errors import CheckpointError, MissingExtraError

try:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

FORMAT = 1


def save(folder: Path, step: int, model: Any, optimizer: Any, scaler: Any, fingerprint: str) -> None:
    """Write the checkpoint of `step` finished steps, then drop older ones."""
    final = folder / f"step-{step:08d}"
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with saving(folder):
        temporary.mkdir(parents=True)
        trained = _trained(model)
        save_file({name: p.detach().contiguous() for name, p in trained.items()}, temporary / "weights.safetensors")
        moments = {
            f"{name}.{key}": value.contiguous()
            for name, p in trained.items()
            for key, value in optimizer.state[p].items()
        }
        save_file(moments, temporary / "optimizer.safetensors")
        save_file(_rng_state(), temporary / "rng.safetensors")
        state = {"format": FORMAT, "fingerprint": fingerprint, "step": step, "scaler": scaler.state_dict()}
        write_atomic(temporary / "state.json", json.dumps(state))
        for path in temporary.iterdir():
            sync_file(path)
        sync_folder(temporary)
        temporary.rename(final)
        sync_folder(folder)
    for path in folder.iterdir():
        if path != final:
            shutil.rmtree(path)


def restore(folder: Path, model: Any, optimizer: Any, scaler: Any, fingerprint: str) -> int:
    """Load the newest checkpoint into model, optimiser and scaler; return its step, 0 when there is none."""
    found = sorted(folder.glob("step-????????")) if folder.is_dir() else []
    if not found:
        return 0
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        weights, moments, rng = (
            load_file(newest / f"{name}.safetensors", device="cpu") for name in ("weights", "optimizer", "rng")
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{newest}: cannot be read ({error}); remove this folder to go on without it") from error
    trained = _trained(model)
    if (state["format"], state["fingerprint"]) != (FORMAT, fingerprint) or weights.keys() != trained.keys():
        raise CheckpointError(f"{newest}: made under another configuration; remove the folder {folder} to train afresh")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(weights[name])
            found_moments = {key: moments.get(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if found_moments["step"] is not None:  # there are none while float16 has skipped every step
                optimizer.state[p] = {key: value.to(p.device) for key, value in found_moments.items()}
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    return int(state["step"])


def truncate_metrics(path: Path, step: int) -> None:
    """Cut a metrics file back to its first `step` lines: those of the steps that the checkpoint knows."""
    data = path.read_bytes() if path.exists() else b""
    end = 0
    for i in range(step):
        end = data.find(b"\n", end) + 1
        if end == 0:
            raise CheckpointError(f"{path}: {i} steps, the checkpoint has {step}; remove {path.parent} to train afresh")
    if path.exists():
        os.truncate(path, end)


def sync(file: IO[str]) -> None:
    """Make what was written to an open file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn a full disk under safetensors into the one line that a full disk gets everywhere."""
    with disk_errors(folder):
        try:
            yield
        except SafetensorError as error:
            if any(sign in str(error) for sign in ("No space left", "File too large", "quota")):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise


def _trained(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _rng_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
