"""Kernels of attention for documents of any length: which of them a GPU has, tried before they are used.

Input: the GPU, the number format, the sizes of the heads. Output: a kernel, or None, which means that documents are put
side by side for scaled_dot_product_attention. Invariant: a kernel is used only after it has given the results and the
gradients of each document alone on two small ones; one that fails in any way is passed over.

Order: flash attention 3 or 4 where it is installed and the GPU is one it was made for (a third faster there), then
version 2, torch's own before the package's. The newer ones are reached by torch's switch, so all but the last are one
operator of torch, whose output checkpointing can keep.

Shapes: T tokens, H heads of queries, W their width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from dasd_lite.console import is_first, note
from dasd_lite.errors import MissingExtraError

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None, int | None], Tensor]
"""Takes queries, keys and values [T, heads, W], edges of the documents [D + 1], the longest, scale, and window."""

KERNEL_OPERATOR = "torch_attn::_varlen_attn"
"""Name of torch's operator, whose output checkpointing can keep."""

_in_use: list[str] = []
_AMPERE = (8, 0)
_NEWER = {9: ("FA3", "FA4"), 10: ("FA4",)}  # by major compute capability: what there is for it, the faster first
_WIDEST = 256
_TRIAL_LENGTHS, _TRIAL_WINDOW = (40, 24), 16
_TOLERANCE = 0.02  # of the norm; rounding to bfloat16 is 0.004, a leak between documents 1


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention over documents of any length."""

    name: str
    """As it is printed, and stands in the manifest."""
    attend: Attend


@dataclass(frozen=True)
class HeadSizes:
    """Numbers of heads of queries and of keys, and the widths of queries, keys and values."""

    num_heads: int
    num_kv_heads: int
    query: int
    key: int
    value: int

    @property
    def are_supported(self) -> bool:
        """Whether kernels take them: one width, a multiple of 8 up to 256."""
        return self.query == self.key == self.value and self.query % 8 == 0 and self.query <= _WIDEST


def heads_of(query: Tensor, key: Tensor, value: Tensor) -> HeadSizes:
    """Read the sizes from tensors [T, heads, W]."""
    return HeadSizes(query.shape[1], key.shape[1], query.shape[2], key.shape[2], value.shape[2])


@lru_cache
def pick_kernel(device: torch.device, dtype: torch.dtype, heads: HeadSizes) -> Kernel | None:
    """Return the first kernel that works; None on a CPU, in float32, before Ampere, and for unusual heads.

    Says once which one it is.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or not heads.are_supported:
        return None
    if torch.cuda.get_device_capability(device) < _AMPERE:
        return None
    for kernel in _candidates(device, dtype):
        if _is_right(kernel, device, dtype, heads):
            if is_first() and kernel.name not in _in_use:
                note(f"attention over packed documents: {kernel.name}")
            _in_use.append(kernel.name)
            return kernel
    return None


def kernels_in_use() -> str:
    """Name what computes attention in this process, for the manifest."""
    return ", ".join(dict.fromkeys(_in_use)) or "scaled_dot_product_attention"


def _candidates(device: torch.device, dtype: torch.dtype) -> Iterator[Kernel]:
    """Yield the kernels there are, the fastest first; each is active in torch when it is yielded."""
    varlen = _torch_varlen(dtype)
    if varlen is not None:
        # The switch is one for the whole process: heads of another size get what the first ones have.
        for name in () if _in_use else _NEWER.get(torch.cuda.get_device_capability(device)[0], ()):
            if _activate(name):
                yield Kernel(f"flash attention {name[-1]}", varlen)
                torch.nn.attention.restore_flash_attention_impl()  # it was passed over
        active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
        yield Kernel(f"flash attention {active[-1]}" if active else "torch's flash attention 2", varlen)
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:  # also where only the package of version 4 is there
        return
    yield Kernel("flash-attn's flash attention 2", _flash_attn(flash_attn_varlen_func, dtype))


def _activate(name: str) -> bool:
    """Let torch's operator run on another version of flash attention; return whether it does."""
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)  # from torch 2.11 on
    if activate is None:
        return False
    try:
        activate(name)
    except Exception:  # its package is missing, or does not fit this version of torch
        return False
    return True


def _torch_varlen(dtype: torch.dtype) -> Attend | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:  # torch 2.10 has another argument for causality, and no window
        return None
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}

    def attend(
        q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int, scale: float | None, window: int | None
    ) -> Tensor:
        q, k, v = (x.to(dtype) for x in (q, k, v))  # autocast does not know these kernels
        if not options:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        spans = (-1 if window is None else window - 1, 0)
        out: Tensor = varlen_attn(  # type: ignore[assignment]  # it returns a pair only for return_aux
            q, k, v, edges, edges, longest, longest, scale=scale, window_size=spans, **options
        )
        return out

    return attend


def _flash_attn(function: Callable[..., Tensor], dtype: torch.dtype) -> Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int, scale: float | None, window: int | None
    ) -> Tensor:
        q, k, v = (x.to(dtype) for x in (q, k, v))
        spans = (-1 if window is None else window - 1, -1 if window is None else 0)
        return function(q, k, v, edges, edges, longest, longest, softmax_scale=scale, causal=True, window_size=spans)

    return attend


# --- the trial --------------------------------------------------------------------------------------


def _is_right(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: HeadSizes) -> bool:
    """Return whether a kernel computes two small documents, and their gradients, as each of them alone."""
    # The first forward pass, in which this is asked, may be one without gradients.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        random = torch.Generator(device).manual_seed(0)
        total = sum(_TRIAL_LENGTHS)
        sizes = [(heads.num_heads, heads.query), (heads.num_kv_heads, heads.key), (heads.num_kv_heads, heads.value)]
        inputs = [torch.randn(total, *size, generator=random, device=device).to(dtype) for size in sizes]
        given = torch.randn(total, heads.num_heads, heads.value, generator=random, device=device)
        edges = torch.tensor([0, _TRIAL_LENGTHS[0], total], dtype=torch.int32, device=device)

        def packed(window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return kernel.attend(q, k, v, edges, max(_TRIAL_LENGTHS), None, window)

        try:
            for window in (None, _TRIAL_WINDOW):
                wanted = _with_gradients(_alone, window, [x.float() for x in inputs], given)
                found = _with_gradients(packed, window, inputs, given)
                if not all(_are_close(one, other) for one, other in zip(found, wanted, strict=True)):
                    return False
        except Exception:  # whatever a library says of a GPU or sizes it was not made for
            return False
    return True


def _with_gradients(
    attend: Callable[[int | None, Tensor, Tensor, Tensor], Tensor],
    window: int | None,
    inputs: list[Tensor],
    given: Tensor,
) -> list[Tensor]:
    """Return attention's result for queries, keys and values, and its gradients by them."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out = attend(window, q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given.to(out.dtype))]


def _alone(window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each document by itself, with plain matrices."""
    parts = []
    for queries, keys, values in zip(*(x.split(_TRIAL_LENGTHS) for x in (q, k, v)), strict=True):
        mask = torch.ones(len(queries), len(queries), dtype=torch.bool, device=q.device).tril()
        mask = mask if window is None else mask.triu(1 - window)
        q, k, v = (x.transpose(0, 1) for x in (queries, keys, values))
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


def _are_close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found.float() - wanted).norm() <= _TOLERANCE * wanted.norm())
