"""Which activations are computed again in the backward pass: of which layers, and whether attention's output is.

Input: a model of transformers. Invariant: gradients are those without recomputation, on a CPU to the bit.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from dasd_lite.errors import MissingExtraError
from dasd_lite.model.kernels import KERNEL_OPERATOR

try:
    import torch
    from torch.utils.checkpoint import create_selective_checkpoint_contexts
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = (
    KERNEL_OPERATOR,
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
)


def recompute(causal: PreTrainedModel, *, layers_kept: int = 0, keep_attention: bool = False) -> None:
    """Let the layers of a model compute their activations again in the backward pass.

    Args:
        causal: The model.
        layers_kept: So many layers, the last ones, keep theirs. They are the first to need them, and free them before
            the others compute anything again.
        keep_attention: Keep the output of attention, which costs the most to compute in long rows and is small. Only
            of torch's operators: the package flash-attn cannot be seen from outside.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _attention_operators())
    causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    layers = [module for module in causal.modules() if getattr(module, "gradient_checkpointing", None) is True]
    kinds = {type(layer) for layer in layers if type(layer).__name__ in set(causal._no_split_modules or ())}
    layers = [layer for layer in layers if type(layer) in kinds]
    for layer in layers[max(0, len(layers) - layers_kept) :]:
        vars(layer)["gradient_checkpointing"] = False


def _attention_operators() -> list[torch._ops.OpOverload]:
    """Return the operators of attention that this version of torch has."""
    with contextlib.suppress(ImportError):
        import torch.nn.attention.varlen
    packets = ((getattr(torch.ops, name.partition("::")[0]), name.partition("::")[2]) for name in _ATTENTION)
    return [getattr(namespace, name).default for namespace, name in packets if hasattr(namespace, name)]
