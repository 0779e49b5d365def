"""A model made trainable: full, LoRA or QLoRA."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from dasd_lite.config.models import Dtype, Switch
from dasd_lite.config.train import Full, Lora
from dasd_lite.costs.hardware import has_liger
from dasd_lite.errors import ConfigError, MissingExtraError
from dasd_lite.model.load import load_model, pick_device, pick_dtype, quiet, stored_dtype
from dasd_lite.model.logprobs import causal_model
from dasd_lite.training.recompute import recompute
from dasd_lite.training.requirements import layer_conflicts, liger_conflict

try:
    import torch
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from dasd_lite.model.logprobs import LanguageModel


def load_trainable(
    folder: Path,
    method: Full | Lora,
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    gradient_checkpointing: bool = False,
    layers_kept: int = 0,
    keep_attention: bool = False,
    liger: Switch = "off",
    adapter: Path | None = None,
    to_shard: bool = False,
    trust_remote_code: bool = False,
    patches: contextlib.ExitStack | None = None,
) -> LanguageModel:
    """Load a model to train by `method`, in train mode.

    Args:
        folder: The model's.
        method: Full training, or an adapter. A new adapter is drawn from torch's generator.
        dtype: Format of frozen weights, unless qlora makes them 4 bits; trained weights are float32.
        device: Where to load it.
        gradient_checkpointing: Compute activations again in the backward pass.
        layers_kept: With it, so many layers keep theirs, counted from the last.
        keep_attention: With it, the output of attention is kept.
        liger: Whether to use Liger's kernels.
        adapter: Folder of an adapter to continue with.
        to_shard: Leave the weights in host memory in their stored format, for `ranks.shard`.
        trust_remote_code: Run code that comes with the model.
        patches: Gets what undoes Liger's changes to transformers' modules, which any other model in this process would
            get too; None: they are undone at once, and only what the model itself holds stays.

    Raises:
        ConfigError: The folder holds no such model, or an option does not fit it.
    """
    is_lora = isinstance(method, Lora)
    four_bit = isinstance(method, Lora) and method.kind == "qlora"
    own = str(stored_dtype(folder)).removeprefix("torch.") if to_shard else "float32"
    model = load_model(
        folder,
        dtype=dtype if is_lora else cast(Dtype, own),
        device="cpu" if to_shard else device,
        trust_remote_code=trust_remote_code,
        four_bit=four_bit,
    )
    target = pick_device(device)
    if liger == "on" or (liger == "auto" and target.type == "cuda" and has_liger()):
        _apply_liger(model, target, patches)
    if isinstance(method, Lora):
        compute_dtype = pick_dtype(dtype, target)
        model = _add_adapter(model, folder, method, adapter, compute_dtype)
        if compute_dtype != torch.float32:
            _leave_inputs(model)
    causal = causal_model(model)
    if gradient_checkpointing:
        recompute(causal, layers_kept=layers_kept, keep_attention=keep_attention)
    causal.get_input_embeddings().register_forward_hook(_narrow)
    return model.train()


def _narrow(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], hidden: torch.Tensor) -> torch.Tensor:
    """Start the residual stream in bfloat16 where that is computed in: under autocast it would stay float32 throughout.

    Where float16 is, it is float32: the stream of a large model may pass 65,504.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(torch.float32 if dtype == torch.float16 else dtype)


def _leave_inputs(model: torch.nn.Module) -> None:
    """Keep adapters from casting their inputs to float32, the format of their weights.

    Autocast casts them back at once, so results are the same to the bit; what autograd keeps is 9 % less.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            vars(module)["cast_input_dtype_enabled"] = False


def _apply_liger(model: PreTrainedModel, device: torch.device, patches: contextlib.ExitStack | None) -> None:
    """Replace norms, rotary embeddings and MLPs by Liger's kernels; the loss stays ours.

    Liger changes the model, and also names in the modules of transformers (classes of norms and MLPs, the function for
    rotary embeddings), with which a model on a CPU cannot compute.
    """
    if fault := liger_conflict(has_gpu=device.type == "cuda"):
        raise ConfigError(fault)
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    with contextlib.ExitStack() if patches is None else contextlib.nullcontext(patches) as undo:
        modules = {module for name, module in sys.modules.items() if name.startswith("transformers.models.")}
        for module in modules:
            undo.callback(_restore, module, dict(vars(module)))
        with quiet():
            _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def _restore(module: ModuleType, names: dict[str, Any]) -> None:
    for name, value in names.items():
        if vars(module).get(name) is not value:
            setattr(module, name, value)


def _add_adapter(
    model: PreTrainedModel, folder: Path, method: Lora, adapter: Path | None, dtype: torch.dtype
) -> PeftModel:
    try:
        from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise MissingExtraError("train", "peft") from error
    if isinstance(method.target_modules, list):
        names = (name for name, _ in model.named_modules())
        for fault in layer_conflicts(method.target_modules, names, str(folder)):
            raise ConfigError(fault)
    if method.kind == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        # peft makes everything but the 4-bit weights float32. They are frozen, so that adds nothing (norms compute in
        # float32 anyway), but the embeddings of a vocabulary of 152K would take 1.6 GB of an 8 GB GPU, and the outputs
        # of the norms twice the memory.
        for p in model.parameters():
            if p.dtype == torch.float32:
                p.data = p.data.to(dtype)
    if adapter is not None:
        _check_adapter(adapter, method)
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    lora = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=method.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _check_adapter(folder: Path, method: Lora) -> None:
    """Refuse to continue with an adapter of another shape."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no adapter to start from ({error}); use train.method.start = 'merged'") from error
    targets = sorted(config.get("target_modules") or ())
    if isinstance(method.target_modules, list) and targets != sorted(set(method.target_modules)):
        raise ConfigError(
            f"train.method.target_modules = {method.target_modules}, but the adapter to start from has {targets}; make"
            " them equal, or use start = 'merged'"
        )
    for key, name, wanted in (("r", "rank", method.rank), ("lora_alpha", "alpha", method.alpha)):
        if config.get(key) != wanted:
            raise ConfigError(
                f"train.method.{name} = {wanted}, but the adapter to start from has {config.get(key)}; make them equal,"
                " or use start = 'merged'"
            )
