"""What training leaves behind: a model folder that transformers and vLLM load, and the adapter.

Input: a trained model, and the folder of the model that it started from. Invariants: a folder appears
whole or not at all; it has the number format of what it started from; a 4-bit base is dequantised before
the adapter is merged, for merging into 4 bits rounds it away; the model stops where its training data end.
What was saved is loaded again and held against what was trained: the gap is told.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Set
from pathlib import Path
from typing import Any, cast

import numpy as np

from dasd_lite.config.models import Dtype
from dasd_lite.config.train import Full, Lora
from dasd_lite.data.files import sync_path
from dasd_lite.data.hub import configured_stop_ids
from dasd_lite.errors import MissingExtraError, TrainError
from dasd_lite.model.load import load_model, quiet, stored_dtype
from dasd_lite.model.logprobs import causal_model, runs_inside, target_logprobs
from dasd_lite.model.row import Row
from dasd_lite.training.checkpoint import saving
from dasd_lite.training.ranks import Ranks, full_tensor

try:
    import torch
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

_SIDE_FILES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")  # what is beside the weights


def export(
    model: Any,
    method: Full | Lora,
    source: Path,
    out: Path,
    probe: Row,
    *,
    ranks: Ranks | None = None,
    dtype: Any = None,
    end_ids: Set[int] = frozenset(),
    **options: Any,
) -> float:
    """Save a trained model as `out`/model, and an adapter as `out`/adapter; return the gap of merging and rounding.

    The gap is the largest difference of a log-probability on the row `probe`, in nats, between the model as it was
    trained, computing in `dtype` where it is, and what was saved, loaded again in the number format of `source` on the
    CPU: with 16 bits their rounding is in it, up to some 0.05. `end_ids` are tokens at which the saved model has to
    stop as well. All processes have to call it; only the first saves, and the others get 0. `options` go to load_model.
    """
    first = ranks is None or ranks.is_first
    model.eval()
    device = ranks.device if ranks is not None else "cpu"
    casts = dtype is not None and dtype != torch.float32 and not runs_inside(causal_model(model))
    with torch.autocast(torch.device(device).type, dtype if casts else torch.bfloat16, enabled=casts):
        before = target_logprobs(model, probe.ids, probe.doc_lengths)
    trained: dict[str, Any] = {}
    if isinstance(method, Full):
        for name, p in model.named_parameters():  # one whole weight at a time on the device
            weight = full_tensor(p.detach())
            if first:
                trained[name] = weight.to(stored_dtype(source)).cpu()
            del weight
    if not first:
        return 0.0
    stored = _name(stored_dtype(source))
    if isinstance(method, Full):
        found = load_model(source, dtype=stored, device="cpu", **options)
        if missing := trained.keys() ^ dict(found.named_parameters()).keys():
            raise TrainError(f"{source}: its weight {min(missing)} is not what was trained; nothing is saved")
        found.load_state_dict(trained, strict=False, assign=True)  # what is tied to another weight is not in it
        found.tie_weights()
    else:
        temporary = out / "adapter.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        with saving(out), quiet():
            model.save_pretrained(temporary)
            _put(temporary, out / "adapter")
        # Quantised from the format that training quantised from, or the 4-bit codes would be others.
        loaded = _name(dtype) if method.kind == "qlora" and dtype is not None else stored
        found = _merge(source, out / "adapter", method, dtype=loaded, **options).to(stored_dtype(source))
    trained.clear()
    save_model(found, out / "model", source, end_ids)
    del found
    after = target_logprobs(
        load_model(out / "model", dtype=stored, device="cpu", **options), probe.ids, probe.doc_lengths
    )
    return float(np.nanmax(np.abs(after - before)))


def _name(dtype: Any) -> Dtype:
    return cast(Dtype, str(dtype).removeprefix("torch."))


def _merge(source: Path, adapter: Path, method: Lora, **loading: Any) -> Any:
    from peft import PeftModel

    with quiet():
        base = load_model(source, four_bit=method.kind == "qlora", device="cpu", **loading)
        base = base.dequantize() if method.kind == "qlora" else base
        return PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()


def save_model(model: Any, folder: Path, tokenizer_from: Path, end_ids: Set[int] = frozenset()) -> None:
    """Write a model folder: safetensors, config, and the tokenizer's files of `tokenizer_from`; whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with saving(folder.parent), quiet():
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        for path in sorted(tokenizer_from.iterdir()):
            if path.suffix in _SIDE_FILES and path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, temporary / path.name)
        if end_ids:
            path = temporary / "generation_config.json"
            config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            config["eos_token_id"] = sorted({*configured_stop_ids(tokenizer_from), *end_ids})
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _put(temporary, folder)


def _put(temporary: Path, folder: Path) -> None:
    """Give a finished temporary folder its name, in place of an earlier one."""
    mode = next(temporary.glob("*config.json")).stat().st_mode
    for path in temporary.iterdir():
        path.chmod(mode)  # safetensors lets nobody but its writer read what it writes
        sync_path(path)
    sync_path(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_path(folder.parent)
