"""A model made trainable: full, LoRA or QLoRA."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from dasd_lite.config.models import Dtype, Switch
from dasd_lite.config.train import Full, Lora
from dasd_lite.console import is_first, note
from dasd_lite.costs.hardware import has_liger
from dasd_lite.errors import ConfigError, MissingExtraError
from dasd_lite.model.load import load_model, pick_device, pick_dtype, quiet, stored_dtype
from dasd_lite.model.logprobs import causal_model
from dasd_lite.training.adapter import add_adapter
from dasd_lite.training.recompute import recompute
from dasd_lite.training.requirements import liger_conflict

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
    context: int | None = None,
    patches: GlobalPatches | None = None,
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
        context: Longest sequence that the model is served with; see load_model.
        patches: Gets what Liger replaced in transformers' modules; None: it is not needed.

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
        context=context,
    )
    target = pick_device(device)
    if liger == "on" or (liger == "auto" and target.type == "cuda" and has_liger()):
        _apply_liger(model, target, patches)
    if isinstance(method, Lora):
        compute_dtype = pick_dtype(dtype, target)
        model = _adapted(model, method, adapter, compute_dtype)
        _add_in_place(model)
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


def _add_in_place(model: PeftModel) -> None:
    """Let plain adapters add their output to the layer's in one product, in place.

    PEFT scales and adds outputs of a layer's width, and copies those of 4-bit layers before: a fifth of what a step
    moves. Here the narrow tensor between the two matrices is scaled. Equal up to rounding, which is less in 16 bits.
    """
    for module in model.modules():
        if type(module).__name__ in ("Linear", "Linear4bit") and hasattr(module, "lora_A"):
            base, (name, *others) = module.get_base_layer(), module.active_adapters
            is_plain = not others and not module.lora_variant and module.lora_B[name].bias is None
            if is_plain and type(base).__name__ in ("Linear", "Linear4bit"):
                vars(module)["forward"] = partial(_adapted_forward, module, name, module.forward)


def _adapted_forward(
    layer: Any, name: str, own_forward: Callable[..., torch.Tensor], x: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Do what the `forward` of a LoRA layer of PEFT does."""
    if layer.disable_adapters or layer.merged or options:
        return own_forward(x, **options)
    rows = x.flatten(0, -2)  # before the layer: in-place changes of a view would cost copies in the backward pass
    if torch.is_autocast_enabled(device := x.device.type):
        # Once for both products. 4-bit layers return the format of their input: a float32 stream, as with float16,
        # would make the MLP float32 too.
        rows = rows.to(torch.get_autocast_dtype(device))
    first, second = layer.lora_A[name], layer.lora_B[name].weight
    result: torch.Tensor = layer.base_layer(rows)
    rows = layer.lora_dropout[name](layer._cast_input_dtype(rows, first.weight.dtype))
    narrow = first(rows) * layer.scaling[name]
    return result.addmm_(narrow.to(result.dtype), second.T.to(result.dtype)).view(*x.shape[:-1], -1)


@dataclass
class GlobalPatches:
    """Names in the modules of transformers that Liger replaces by its own, for every model in this process.

    They are in force only inside `active`: with Liger's norms, MLPs and rotary embeddings no model computes on a CPU.
    """

    replaced: list[tuple[ModuleType, str, Any, Any]] = field(default_factory=list)
    """Module, name, what it is, and Liger's."""

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Put Liger's in force for as long as the context lasts."""
        for module, name, _, ligers in self.replaced:
            setattr(module, name, ligers)
        try:
            yield
        finally:
            for module, name, own, _ in self.replaced:
                setattr(module, name, own)


def _apply_liger(model: PreTrainedModel, device: torch.device, patches: GlobalPatches | None) -> None:
    """Replace norms, rotary embeddings and MLPs by Liger's kernels; the loss stays ours.

    Most of it changes the model itself. What it changes in transformers is undone at once, and goes to `patches`.
    """
    if fault := liger_conflict(has_gpu=device.type == "cuda"):
        raise ConfigError(fault)
    if not has_liger(kind := model.config.model_type):
        if is_first():
            note(f"liger-kernel has no kernels for {kind}, so training is slower than with them and needs more memory")
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    modules = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
    before = [(module, dict(vars(module))) for module in modules]
    with quiet():
        _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    for module, names in before:
        for name, own in names.items():
            if (ligers := vars(module).get(name)) is not own:
                setattr(module, name, own)
                if patches is not None:
                    patches.replaced.append((module, name, own, ligers))


def _adapted(model: PreTrainedModel, method: Lora, adapter: Path | None, dtype: torch.dtype) -> PeftModel:
    if method.kind == "qlora":
        try:
            from peft import prepare_model_for_kbit_training
        except ImportError as error:
            raise MissingExtraError("train", "peft") from error
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        # peft makes everything but the 4-bit weights float32. They are frozen, so that adds nothing (norms compute in
        # float32 anyway), but the embeddings of a vocabulary of 152K would take 1.6 GB of an 8 GB GPU, and the outputs
        # of the norms twice the memory.
        for p in model.parameters():
            if p.dtype == torch.float32:
                p.data = p.data.to(dtype)
    return add_adapter(model, method, adapter)
