"""What the backward pass needs, kept in host memory until then; copied while the GPU computes.

Input: a forward pass inside `offloading()`. Invariants: values come back unchanged; nothing is read before it has
arrived, and no memory is used again before it has been copied, by events between the streams; the GPU holds at most
`_IN_FLIGHT` tensors on their way out and `_AHEAD` on their way back.

Order: a tensor starts its way out when autograd keeps it. In the backward pass, when one is asked for, those that were
kept before it start their way back, since they are asked for next.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dasd_lite.errors import MissingExtraError

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

_OFFLOADED_NUMEL = 1 << 16  # smaller tensors are not worth the transfer
_IN_FLIGHT, _AHEAD = 2, 1


@contextlib.contextmanager
def offloading() -> Iterator[None]:
    """Keep large tensors that the backward pass needs in host memory until then, except weights."""
    transfers = Transfers(Link())
    with torch.autograd.graph.saved_tensors_hooks(transfers.pack, transfers.unpack):
        yield


class Link:
    """Copies between a device and the host, each direction on a stream of its own; on a CPU at once."""

    def __init__(self) -> None:
        """Make the streams when the first tensor of a GPU comes."""
        self._streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}

    def copy(self, target: Tensor, source: Tensor, device: torch.device, way: str) -> Any:
        """Begin to copy when the computation so far is done; return what `wait` takes."""
        if device.type != "cuda":
            target.copy_(source)
            return None
        if (device, way) not in self._streams:
            self._streams[device, way] = torch.cuda.Stream(device)
        stream = self._streams[device, way]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def wait(self, event: Any, device: torch.device) -> None:
        """Let the computation from here on come after a copy; the host does not wait."""
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)


@dataclass
class _Kept:
    """A tensor in host memory."""

    host: Tensor
    device: torch.device
    back: Tensor | None = None
    """Itself on the device again, or on its way."""
    arrived: Any = None
    was_asked_for: bool = False


class Transfers:
    """The tensors that one forward pass keeps."""

    def __init__(self, link: Link) -> None:
        """Begin with none."""
        self._link = link
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._kept: list[_Kept] = []

    def pack(self, tensor: Tensor) -> Tensor | int:
        """Begin to copy a tensor out, unless it is small or a weight; return what `unpack` takes."""
        is_weight = tensor.is_leaf or (tensor._base is not None and tensor._base.is_leaf)
        if is_weight or tensor.numel() < _OFFLOADED_NUMEL:
            return tensor
        device = tensor.device
        host = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=device.type == "cuda")
        # The tensor is held until the computation waits for its copy: its memory may be used again only after that.
        self._leaving.append((tensor, self._link.copy(host, tensor, device, "out")))
        while len(self._leaving) > _IN_FLIGHT:
            self._link.wait(self._leaving.popleft()[1], device)
        self._kept.append(_Kept(host, device))
        return len(self._kept) - 1

    def unpack(self, packed: Tensor | int) -> Tensor:
        """Return the tensor, and begin to copy back those that will be asked for next."""
        if isinstance(packed, Tensor):
            return packed
        kept = self._kept[packed]
        while self._leaving:
            self._link.wait(self._leaving.popleft()[1], kept.device)
        self._fetch(kept)
        for earlier in self._kept[max(0, packed - _AHEAD) : packed]:
            if not earlier.was_asked_for:
                self._fetch(earlier)
        back, kept.back, kept.was_asked_for = kept.back, None, True
        self._link.wait(kept.arrived, kept.device)
        assert back is not None
        return back

    def _fetch(self, kept: _Kept) -> None:
        if kept.back is None:
            # Of the computation's own stream, so that it is freed in the order in which it is used.
            kept.back = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=kept.device)
            kept.arrived = self._link.copy(kept.back, kept.host, kept.device, "back")

    def __del__(self) -> None:
        """Wait for what was never asked for: its memory is about to be used again."""
        for kept in self._kept:
            if kept.back is not None:
                self._link.wait(kept.arrived, kept.device)
