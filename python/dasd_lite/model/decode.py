"""What decoding a batch of answers needs of a model: keys and values written in place, and attention of one new token.

Input: a transformers model. Output: a cache for its forward, from which finished answers leave and which new ones
enter; and an attention that does not copy the keys for each query head. Invariant: what a row of the batch attends to
is the same as if it were alone.
Shapes: B rows, H key heads, T positions that the rows have in common, D head dimension. All rows end at the same
position, so shorter ones have padding on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dasd_lite.errors import MissingExtraError
from dasd_lite.model.architecture import Architecture, cache_argument

try:
    import torch
    from torch import Tensor
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise MissingExtraError("train", "transformers") from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GROUPED = "dasd_grouped"
_ROOM = 128  # positions that a cache grows by: it is copied once in so many tokens


def decoding_attention(architecture: Architecture) -> str:
    """Return the attention to decode with: ours, or the model's own where that computes something more."""
    if not architecture.packs or architecture.unusual_attention:
        return architecture.own_attention
    AttentionInterface.register(_GROUPED, _grouped_attention)
    AttentionMaskInterface.register(_GROUPED, _mask)
    return _GROUPED


def _grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with one new token per row, the heads that share a key laid along the query axis.

    8 × faster on a CPU than the copy of the keys that transformers makes if there is a mask. Prompts take its way.
    """
    batch, heads, length, dim = query.shape
    if length > 1:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], dim)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, -1), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *args: Any,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of a prompt as transformers does; one new token sees all that its layer keeps but the padding."""
    if q_length > 1:
        mask: Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, *args, attention_mask=attention_mask, **kwargs
        )
        return mask
    return None if attention_mask is None else attention_mask[:, None, None, kv_offset : kv_offset + kv_length]


class BatchCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped here
    """The cache of a batch, whose rows leave and are joined by others.

    Attention layers keep their keys and values in buffers with room for the next tokens; the states of others
    (convolutions, linear attention) are taken as transformers keeps them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Make an empty cache for `model`."""
        super().__init__(config=model.config)
        self.layers: list[Any] = [_in_place(layer) for layer in self.layers]
        if not self.layers:  # no layer types in the configuration: all see everything
            self.layer_class_to_replicate = _Buffers
        self._device = model.device
        self.attends = not self.layers or any(isinstance(layer, DynamicLayer) for layer in self.layers)
        """Whether any layer looks back at positions; the others carry states alone, which know no padding any more."""
        keyword = cache_argument(type(model))  # its instance's forward may be wrapped
        assert keyword is not None, "refused before"
        self.keyword = keyword
        """The argument of the model's forward that takes it."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may come several times."""
        index = torch.tensor(rows, device=self._device)
        moved = [i for i, row in enumerate(rows) if row != i]
        in_place = all(rows[i] >= len(rows) for i in moved)  # rows only leave, and others take their places
        places = torch.tensor(moved, device=self._device, dtype=torch.long) if in_place else None
        for layer in self.layers:
            if isinstance(layer, _Buffers):
                layer.select(index, places)
            else:
                _select_states(layer, index)

    def append(self, other: BatchCache, rows: Sequence[int]) -> None:
        """Add these rows of another cache of the same model, so that they end where those of this one do."""
        index = torch.tensor(rows, device=self._device)
        for layer, source in zip(self.layers, other.layers, strict=True):
            assert isinstance(layer, _Buffers) and isinstance(source, _Buffers), "states cannot be shifted in time"
            layer.append(source, index)

    def trim(self, positions: int) -> None:
        """Forget the first positions, where no row has anything but padding."""
        for layer in self.layers:
            assert isinstance(layer, _Buffers)
            layer.trim(positions)


def _select_states(layer: Any, index: Tensor) -> None:
    """Keep the rows of every tensor of a layer that has rows: transformers has no method for it."""
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # of several convolutions or recurrences
            value.update({key: state[index] for key, state in value.items() if _has_rows(state)})
        elif _has_rows(value):
            setattr(layer, name, value[index])


def _has_rows(state: Any) -> bool:
    return isinstance(state, Tensor) and state.dim() >= 2


def _in_place(layer: Any) -> Any:
    if type(layer) is DynamicSlidingWindowLayer:
        return _Buffers(layer.sliding_window)
    return _Buffers() if type(layer) is DynamicLayer else layer


class _Buffers(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one attention layer: the last `_kept` positions before `_end` of two buffers [B', H, T', D].

    With a sliding window, only what the next token still sees is kept.
    """

    def __init__(self, sliding_window: int | None = None) -> None:
        super().__init__()
        self.is_sliding = sliding_window is not None
        self.sliding_window = sliding_window
        self._buffers: list[Tensor] = []
        self._rows = 0
        self._kept = self._end = self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, H, new, D]; return all that the new tokens may see."""
        self._rows, _, new, _ = key_states.shape
        if not self._buffers:
            self._buffers = [
                each.new_empty((0, *each.shape[1:2], 0, each.shape[3])) for each in (key_states, value_states)
            ]
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if self._end + new > self._buffers[0].shape[2] or self._rows > self._buffers[0].shape[0]:
            self._resize(self._rows, self._kept, self._kept + new + _ROOM)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self._rows, :, self._end : self._end + new] = states
        self._end, self._length = self._end + new, self._length + new
        seen = self._kept + new
        self._kept = seen if self.sliding_window is None else min(seen, self.sliding_window - 1)
        self.keys, self.values = self._views(seen)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many positions `query_length` new tokens see, theirs included, and how many are before these."""
        return self._kept + query_length, self._length - self._kept

    def get_seq_length(self) -> int:
        """Return the number of positions so far."""
        return self._length

    def select(self, index: Tensor, places: Tensor | None) -> None:
        """Keep the rows of `index`; of these only `places` move, unless that is None."""
        self._rows = len(index)
        if places is None:
            self._buffers = [buffer[index] for buffer in self._buffers]
        elif len(places):
            for buffer in self._buffers:
                live = buffer[:, :, self._end - self._kept : self._end]
                live[places] = live[index[places]]

    def append(self, source: _Buffers, index: Tensor) -> None:
        """Add rows of another layer, right-aligned."""
        if not self._buffers:  # of a layer that shares those of another
            return
        first, last = self._rows, self._rows + len(index)
        kept = max(self._kept, source._kept)
        if last > self._buffers[0].shape[0] or kept > self._end:
            self._resize(last, kept, kept + _ROOM)
        for buffer, view in zip(self._buffers, source._views(source._kept), strict=True):
            buffer[first:last, :, self._end - source._kept : self._end] = view[index]
        self._rows, self._kept, self._length = last, kept, max(self._length, source._length)

    def trim(self, positions: int) -> None:
        """Forget the first positions."""
        self._length -= positions
        self._kept = min(self._kept, self._length)

    def _views(self, positions: int) -> list[Tensor]:
        return [buffer[: self._rows, :, self._end - positions : self._end] for buffer in self._buffers]

    def _resize(self, rows: int, end: int, capacity: int) -> None:
        """Make buffers for `rows` rows and `capacity` positions; what is kept ends at position `end` of them.

        The rest is zero: padding has no weight, but NaN times zero is NaN.
        """
        old_rows = min(self._rows, self._buffers[0].shape[0])
        for i, buffer in enumerate(self._buffers):
            larger = buffer.new_zeros((rows, buffer.shape[1], capacity, buffer.shape[3]))
            larger[:old_rows, :, end - self._kept : end] = buffer[:old_rows, :, self._end - self._kept : self._end]
            self._buffers[i] = larger
        self._end = end
