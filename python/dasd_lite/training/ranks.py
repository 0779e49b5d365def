"""The processes of one training: who is first, what they exchange, how weights are sharded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dasd_lite.errors import DasdError, remote_error
from dasd_lite.model.logprobs import causal_model, run_inside
from dasd_lite.training.launch import is_rank

_WAIT = timedelta(hours=2)  # for the slowest process at a meeting point: one may read a large model from a slow disk


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: str = "auto"
    local: int = 0
    """Which process of its machine."""

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks for all."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Add up numbers over all processes."""
        if self.size == 1:
            return values
        import torch

        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def sum_gradients(self, parameters: list[Any]) -> None:
        """Add up the gradients of weights that are whole in each process."""
        if self.size == 1:
            return
        import torch

        for p in parameters:
            if p.grad is None:  # a process without a row in this step
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        parts = flat.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad.copy_(part.view_as(p))

    def from_first(self, work: Callable[[], Any]) -> Any:
        """Let the first process do something and tell the others what came of it; an error of ours is raised in all."""
        if self.size == 1:
            return work()
        import torch

        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = work()
            except DasdError as error:
                told[1] = (type(error).__name__, str(error))
        torch.distributed.broadcast_object_list(told)
        if told[1] is not None:
            raise remote_error(*told[1])
        return told[0]

    def broadcast(self, tensor: Any) -> Any:
        """Overwrite a tensor by the first process's, so that all do the same next; return it."""
        if self.size > 1:
            import torch

            torch.distributed.broadcast(tensor, 0)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return what each process has to say."""
        if self.size == 1:
            return [value]
        import torch

        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the others for as long as the context lasts; alone when there are none."""
    if not is_rank():
        yield Ranks()
        return
    import torch

    local = int(os.environ["LOCAL_RANK"])
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(local)
    # Numbers that are added up and objects that are passed on lie in host memory, gradients on the GPU.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=_WAIT)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    yield Ranks(rank, size, f"cuda:{local}" if has_gpu else "cpu", local)
    torch.distributed.destroy_process_group()  # not after an error: it could wait for those that do not know of it


def shard(model: Any, dtype: Any, ranks: Ranks) -> Any:
    """Spread the weights of a model, in float32, over the processes; the forward pass computes in `dtype`.

    Each layer is brought together when its turn comes and let go of afterwards. The model is moved to the device layer
    by layer, so that it never has to fit on one whole.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    causal = causal_model(model)
    run_inside(causal)
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(torch.device(ranks.device).type, (ranks.size,))
    layer_kinds = set(causal._no_split_modules or ())
    for module in [m for m in causal.modules() if type(m).__name__ in layer_kinds]:
        fully_shard(module.float(), mesh=mesh, mp_policy=policy)
    # Else the outermost weights stay together after a forward pass without a backward one, and are not trained.
    return fully_shard(causal.float(), mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def full_tensor(tensor: Any) -> Any:
    """Return a weight that may be spread over processes in one piece; all processes have to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
