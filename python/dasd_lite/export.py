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

from dasd_lite.chat import engine_stop_ids
from dasd_lite.checkpoint import saving
from dasd_lite.config import Dtype, Full, Lora
from dasd_lite.dataset import sync_file, sync_folder
from dasd_lite.distributed import Ranks, whole
from dasd_lite.logprobs import target_logprobs
from dasd_lite.rows import Row
from dasd_lite.student import load_model, quiet, stored_dtype

_SIDE_FILES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")  # what is beside the weights


def export(
    model: Any,
    method: Full | Lora,
    source: Path,
    out: Path,
    probe: Row,
    *,
    ranks: Ranks | None = None,
    end_ids: Set[int] = frozenset(),
    **options: Any,
) -> float:
    """Save a trained model as `out`/model, and an adapter as `out`/adapter; return the gap of merging and rounding.

    The gap is the largest difference of a log-probability on the row `probe`, in nats, between the weights as trained
    and as loaded from what was saved, both computed on the CPU in the number format of `source`, full training in
    float32 before. `end_ids` are tokens at which the saved model has to stop as well. All processes have to call it;
    only the first saves, and the others get 0. `options` go to load_model.
    """
    first = ranks is None or ranks.is_first
    if isinstance(method, Full):
        trained = {name: whole(p.detach()) for name, p in model.named_parameters()}  # one after the other
        trained = {name: p.cpu() if first else None for name, p in trained.items()}
    if not first:
        return 0.0
    dtype = stored_dtype(source)
    loading = {"dtype": cast(Dtype, str(dtype).removeprefix("torch.")), "device": "cpu", **options}
    if isinstance(method, Full):
        found = load_model(source, **loading)
        found.load_state_dict(trained, strict=False, assign=True)  # weights that are tied to another are not in it
        found.tie_weights()
        before = target_logprobs(found.float(), probe.ids, probe.doc_lengths)
        found = found.to(dtype)
    else:
        temporary = out / "adapter.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        with saving(out), quiet():
            model.save_pretrained(temporary)
            _put(temporary, out / "adapter")
        found, before = _merge(source, out / "adapter", probe, four_bit=method.kind == "qlora", **loading)
    save_model(found, out / "model", source, end_ids)
    del found
    after = target_logprobs(load_model(out / "model", **loading), probe.ids, probe.doc_lengths)
    return float(np.nanmax(np.abs(after - before)))


def _merge(source: Path, adapter: Path, probe: Row, *, four_bit: bool, **loading: Any) -> tuple[Any, Any]:
    """Return the model with its adapter merged, and the log-probabilities of it with the adapter beside it."""
    from peft import PeftModel

    with quiet():
        base = load_model(source, four_bit=four_bit, **loading)
        adapted = PeftModel.from_pretrained(base.dequantize() if four_bit else base, adapter).eval()
        before = target_logprobs(adapted, probe.ids, probe.doc_lengths)
        return adapted.merge_and_unload().eval(), before


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
            config["eos_token_id"] = sorted({*engine_stop_ids(tokenizer_from), *end_ids})
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _put(temporary, folder)


def _put(temporary: Path, folder: Path) -> None:
    """Give a finished temporary folder its name, in place of an earlier one."""
    for path in temporary.iterdir():
        sync_file(path)
    sync_folder(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_folder(folder.parent)
