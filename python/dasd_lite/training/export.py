"""The result of training: a model folder that transformers and vLLM load, and the adapter.

Input: a trained model, and the folder of the model that it started from. Invariants: a folder appears complete or not
at all; it has the number format of the model that training started from; a 4-bit base is dequantized before the adapter
is merged, because merging into 4 bits would round it away; the model stops where its training data end.
The saved model is loaded again and compared with the trained one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, cast

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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dasd_lite.model.logprobs import LanguageModel

_SIDE_FILES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")  # tokenizer and code, beside the weights


def export(
    model: LanguageModel,
    method: Full | Lora,
    source: Path,
    out: Path,
    comparison_row: Row,
    *,
    ranks: Ranks | None = None,
    dtype: torch.dtype | None = None,
    end_ids: Set[int] = frozenset(),
    trust_remote_code: bool = False,
) -> float:
    """Save a trained model as `out`/model, and an adapter as `out`/adapter; all processes have to call it.

    Args:
        model: As it was trained.
        method: How.
        source: Folder of the model that training started from.
        out: Folder to write into.
        comparison_row: Row on which the saved model is compared with the trained one.
        ranks: The processes; only the first one saves.
        dtype: Format that the trained model computes in; None: that of its weights.
        end_ids: Tokens at which the saved model should stop too.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The gap of merging and rounding: the largest difference of a log-probability on `comparison_row`, in nats,
        between the model as it was trained and the saved one, loaded on the CPU in the number format of `source`.
        Rounding to 16 bits alone makes up to about 0.05. 0 in all processes but the first.
    """
    first = ranks is None or ranks.is_first
    model.eval()
    device = ranks.device if ranks is not None else "cpu"
    casts = dtype is not None and dtype != torch.float32 and not runs_inside(causal_model(model))
    with torch.autocast(torch.device(device).type, dtype if casts else torch.bfloat16, enabled=casts):
        before = target_logprobs(model, comparison_row.ids, comparison_row.doc_lengths)
    trained: dict[str, torch.Tensor] = {}
    if isinstance(method, Full):
        for name, p in model.named_parameters():  # one full weight at a time on the device
            weight = full_tensor(p.detach())
            if first:
                trained[name] = weight.to(stored_dtype(source)).cpu()
            del weight
    if not first:
        return 0.0
    stored = _name(stored_dtype(source))
    if isinstance(method, Full):
        exported = load_model(source, dtype=stored, device="cpu", trust_remote_code=trust_remote_code)
        if missing := trained.keys() ^ dict(exported.named_parameters()).keys():
            raise TrainError(f"{source}: the weight {min(missing)} is not among those trained; nothing was saved")
        exported.load_state_dict(trained, strict=False, assign=True)  # without weights that are tied to others
        exported.tie_weights()
    else:
        temporary = out / "adapter.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        with saving(out), quiet():
            model.save_pretrained(temporary)
            _sort_modules(temporary / "adapter_config.json")
            _put(temporary, out / "adapter")
        # Quantized from the same format as in training, or the 4-bit codes would differ.
        loaded = _name(dtype) if method.kind == "qlora" and dtype is not None else stored
        exported = _merge(source, out / "adapter", method, dtype=loaded, trust_remote_code=trust_remote_code)
        exported = exported.to(stored_dtype(source))
    trained.clear()
    save_model(exported, out / "model", source, end_ids)
    del exported
    after = target_logprobs(
        load_model(out / "model", dtype=stored, device="cpu", trust_remote_code=trust_remote_code),
        comparison_row.ids,
        comparison_row.doc_lengths,
    )
    return float(np.nanmax(np.abs(after - before)))


def _name(dtype: torch.dtype) -> Dtype:
    return cast(Dtype, str(dtype).removeprefix("torch."))


def _sort_modules(path: Path) -> None:
    """Sort what peft keeps in a set, so that the same run writes the same bytes."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _merge(source: Path, adapter: Path, method: Lora, *, dtype: Dtype, trust_remote_code: bool) -> PreTrainedModel:
    from peft import PeftModel

    with quiet():
        base = load_model(
            source, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code, four_bit=method.kind == "qlora"
        )
        base = base.dequantize() if method.kind == "qlora" else base
        return PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()


def save_model(model: PreTrainedModel, folder: Path, tokenizer_from: Path, end_ids: Set[int] = frozenset()) -> None:
    """Write a model folder with the tokenizer of `tokenizer_from`, complete or not at all."""
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
    """Rename a finished temporary folder, in place of an earlier one."""
    mode = next(temporary.glob("*config.json")).stat().st_mode
    for path in temporary.iterdir():
        path.chmod(mode)  # safetensors makes its files readable by their owner only
        sync_path(path)
    sync_path(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_path(folder.parent)
