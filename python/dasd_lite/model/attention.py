"""Attention over documents that follow each other in one row and must not see each other.

Input: queries, keys and values of one flat row [1, heads, T, dim], and the `Documents` in it. Invariants: the result
for a token depends on its own document alone, to the bit (the gradients of a GPU's kernels are added up in any order);
nothing of size T × T exists. Registered with transformers under the name `PACKED`, so every architecture that passes
its keyword arguments on to its attention can use it.

How: on a GPU in 16 bits, by a kernel for documents of any length (kernels.py). Elsewhere documents
of about equal length are put side by side, padded at the end, and computed in one call of scaled_dot_product_attention
with `is_causal`; a token never sees later ones, so the padding needs no mask. A long document is a group of its own,
which is the plain loop over documents.

Shapes: T tokens of the row, P tokens after padding (under 2 T), D documents, N documents of one group and L tokens of
the longest, H heads, W their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_lite.errors import MissingExtraError, TrainError
from dasd_lite.method.packing import Lengths
from dasd_lite.model.kernels import heads_of, pick_kernel

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

PACKED = "dasd_packed"
# Cost of one more call, in query-key pairs: a document joins a group if the pairs that padding wastes cost less. On a
# CPU a call costs 4,800 (8 heads of 64) to 9,300 pairs (4 of 16): forward and backward of 32 documents of 60 tokens
# take 3.0 ms together and 7.0 ms in a loop; from 500 tokens on there is nothing to gain. A whole training step of a
# tiny model is 10 to 25 % faster than with the loop, at 2,048 as at 8,192. A GPU computes more pairs in the time of a
# launch; its figure is an estimate.
_CALL_COST = {"cpu": 4096, "cuda": 1 << 19}


@dataclass(frozen=True)
class Documents:
    """Where the documents of a row begin and end, and how attention puts them side by side.

    Attributes:
        lengths: Tokens of each document; int64 numpy [D].
        position_ids: From 0 in each document; int64 tensor [1, T].
        groups: (N, L) of each group, in the order of the padded layout.
        to_padded: Token of each padded slot; int64 tensor [P], or None if the padded layout is the row itself.
        to_row: Padded slot of each token; int64 tensor [T], or None likewise.
        edges: First token of each document, and T; int32 tensor [D + 1].
    """

    lengths: npt.NDArray[np.int64]
    position_ids: Tensor
    groups: tuple[tuple[int, int], ...]
    to_padded: Tensor | None
    to_row: Tensor | None
    edges: Tensor

    @classmethod
    def of(cls, lengths: Lengths, device: torch.device | str = "cpu") -> Documents:
        """Plan the attention of a row whose documents have these lengths."""
        array = np.asarray(lengths, dtype=np.int64)
        starts = np.cumsum(array) - array
        device = torch.device(device)
        order, groups = _group(array, _CALL_COST.get(device.type, _CALL_COST["cuda"]))
        num_tokens = int(array.sum())
        positions = np.arange(num_tokens) - np.repeat(starts, array)
        to_padded = np.empty(sum(n * length for n, length in groups), dtype=np.int64)
        to_row = np.empty(num_tokens, dtype=np.int64)
        slot = 0
        for i, width in zip(order, np.repeat(*np.array(groups, dtype=np.int64).T[::-1]), strict=True):
            start, length = starts[i], array[i]
            # Padding repeats the document's own last token: any value would do, except a neighbor's.
            to_padded[slot : slot + width] = start + np.minimum(np.arange(width), length - 1)
            to_row[start : start + length] = slot + np.arange(length)
            slot += width
        same = slot == num_tokens and bool((to_row == np.arange(num_tokens)).all())
        return cls(
            array,
            to_device(positions[None], device),
            tuple(groups),
            None if same else to_device(to_padded, device),
            None if same else to_device(to_row, device),
            to_device(np.append(starts, num_tokens).astype(np.int32), device),
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max())


def to_device(array: npt.NDArray[Any], device: torch.device | str) -> Tensor:
    """Return an array as a tensor on a device; to a GPU, without waiting for what it computes."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _group(lengths: npt.NDArray[np.int64], call_cost: int) -> tuple[npt.NDArray[np.int64], list[tuple[int, int]]]:
    """Group documents of similar length; return their order and each group's (number, longest)."""
    order = np.argsort(-lengths, kind="stable")
    groups: list[tuple[int, int]] = []
    for length in lengths[order].tolist():
        if groups:
            number, longest = groups[-1]
            if longest**2 - length**2 <= call_cost and longest <= 2 * length:
                groups[-1] = (number + 1, longest)
                continue
        groups.append((1, length))
    return order, groups


class _Permute(torch.autograd.Function):  # whose `apply` torch does not annotate
    """Select rows of `x` [A, …] by `index` [B]; `inverse` [A] says where in the result each of them is.

    The usual backward pass would add up scattered rows. Here each real token has one slot, and padding takes no part in
    the loss, so the gradient is a plain selection: 3 × faster on a CPU and, on a GPU, the same in every run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        if len(inverse) <= len(index):  # padding is dropped
            return grad.index_select(0, inverse), None, None
        padded = grad.new_zeros((len(inverse), *grad.shape[1:]))  # padding gets no gradient
        return padded.index_copy_(0, index, grad), None, None


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls in every layer; returns [1, T, H, W]."""
    if documents is None or attention_mask is not None or query.shape[0] != 1:
        raise TrainError(
            f"{type(module).__name__} does not pass the documents of the row on; this architecture is not supported"
        )
    unknown = [name for name in ("s_aux", "softcap", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise TrainError(f"{type(module).__name__} needs {', '.join(unknown)}, which packed attention does not support")
    # [T, H, W]. All is a view, in the backward pass too: that of `x[0]` would copy the gradient.
    rows = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    kernel = None if dropout else pick_kernel(query.device, _compute_dtype(query), heads_of(*rows))
    if kernel is not None:
        q, k, v = rows
        return kernel.attend(q, k, v, documents.edges, documents.longest, scaling, sliding_window).unsqueeze(0), None
    if documents.to_padded is not None:
        rows = [_Permute.apply(x, documents.to_padded, documents.to_row) for x in rows]  # type: ignore[no-untyped-call]
    parts, slot = [], 0
    for number, length in documents.groups:
        size = number * length
        q, k, v = (x[slot : slot + size].unflatten(0, (number, length)).transpose(1, 2) for x in rows)
        if sliding_window is not None and length > sliding_window:
            out = _windowed(q, k, v, sliding_window, scaling, dropout)
        else:
            out = _causal(q, k, v, None, scaling, dropout)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        slot += size
    result = parts[0] if len(parts) == 1 else torch.cat(parts)
    if documents.to_padded is not None:
        result = _Permute.apply(result, documents.to_row, documents.to_padded)  # type: ignore[no-untyped-call]
    return result.unsqueeze(0), None


def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float) -> Tensor:
    """Attention [N, H, L, W] to the tokens that `mask` allows; None: all that are not later."""
    gqa = q.shape[1] != k.shape[1]
    if gqa and not _shares_heads(q, mask):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        gqa = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=gqa
    )


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, dropout: float) -> Tensor:
    """Attention [N, H, L, W] to the last `window` tokens, L > window, without anything of size L × L.

    The documents are cut into blocks of one window. A block sees itself and the one before it, the same part of them in
    every block; only the first one has none before it.
    """
    number, length = len(q), q.shape[2]
    num_blocks = -(-length // window)
    q, k, v = (F.pad(x, (0, 0, 0, num_blocks * window - length)) for x in (q, k, v))
    first, later = q.split([window, (num_blocks - 1) * window], dim=2)
    start = _causal(first, k[:, :, :window], v[:, :, :window], None, scale, dropout)
    queries = later.unflatten(2, (num_blocks - 1, window)).transpose(1, 2).flatten(0, 1)
    # [N, heads, blocks, W, 2 windows]: pairs of blocks, each beginning one after the other.
    keys, values = (x.unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))
    mask = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device).tril(window).triu(1)
    rest = _causal(queries, keys, values, mask, scale, dropout)
    rest = rest.unflatten(0, (number, num_blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat((start, rest), dim=2)[:, :, :length]


def _shares_heads(query: Tensor, mask: Tensor | None) -> bool:
    """Return whether a kernel without an L × L matrix takes fewer key heads than query heads."""
    if query.device.type != "cuda":
        return True
    dtype = _compute_dtype(query)
    # Flash attention does: 16 bits, no mask, Ampere or later. A T4 only has the kernel that does not.
    return mask is None and dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _compute_dtype(query: Tensor) -> torch.dtype:
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def register() -> None:
    """Register `PACKED` with transformers, which then passes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, _packed_attention)
