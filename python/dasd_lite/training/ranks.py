"""The processes of one training run: which is the first, what they exchange, how weights are sharded.

Input: the environment that torchrun or `launch` sets. Invariant: every method but `is_first` has to be called by all
processes, in the same order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dasd_lite.console import is_rank
from dasd_lite.errors import DasdError, remote_error
from dasd_lite.model.logprobs import causal_model, enable_run_inside
from dasd_lite.training.environment import WAIT_MINUTES

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from dasd_lite.model.logprobs import LanguageModel

Value = TypeVar("Value")
_SLOW = timedelta(hours=2)  # one process may read or write a large model on a slow disk


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen from one of them.

    Attributes:
        rank: Which one this is, over all machines.
        size: How many there are.
        device: Device of this one.
        local: Which one of its machine this is.
    """

    rank: int = 0
    size: int = 1
    device: str = "auto"
    local: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Wait less long for the others: a process that hangs in a step holds all GPUs."""
        if self.size == 1:
            yield
            return
        _set_timeout(timedelta(minutes=WAIT_MINUTES))
        yield
        _set_timeout(_SLOW)

    def sum(self, values: list[float]) -> list[float]:
        """Add up numbers over all processes."""
        if self.size == 1:
            return values
        import torch

        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Add up the gradients of weights that every process has whole."""
        if self.size == 1:
            return
        import torch

        gradients = []
        for p in parameters:
            if p.grad is None:  # a process without a row in this step
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def from_first(self, work: Callable[[], Value]) -> Value:
        """Let the first process do `work`, and return its result in all; a DasdError is raised in all."""
        if self.size == 1:
            return work()
        import torch

        outcome: list[Any] = [None, None]  # the result, or the error
        if self.is_first:
            try:
                outcome[0] = work()
            except DasdError as error:
                outcome[1] = (type(error).__name__, str(error))
        torch.distributed.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise remote_error(*outcome[1])
        result: Value = outcome[0]
        return result

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with the first process's and return it."""
        if self.size > 1:
            import torch

            torch.distributed.broadcast(tensor, 0)
        return tensor

    def in_turn(self, work: Callable[[], Value]) -> Value:
        """Do `work` in one process of this machine after the other: it takes memory that all have to share."""
        result: Value | None = None
        for turn in range(max(self.gather(self.local)) + 1):
            if turn == self.local:
                result = work()
            self.gather(None)
        return cast(Value, result)

    def gather(self, value: Value) -> list[Value]:
        """Return the value of every process, in order."""
        if self.size == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Connect this process with the others, if there are any, for as long as the context lasts."""
    if not is_rank():
        yield Ranks()
        return
    import torch

    local = int(os.environ["LOCAL_RANK"])
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(local)
    # Numbers and objects that are exchanged are in host memory, gradients on the GPU.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=_SLOW)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    yield Ranks(rank, size, f"cuda:{local}" if has_gpu else "cpu", local)
    torch.distributed.destroy_process_group()  # not after an error: it could wait for those that do not know of it


def _set_timeout(timeout: timedelta) -> None:
    """Change how long collective operations of the default group wait; torch has no public function for it."""
    import torch

    torch.distributed.distributed_c10d._set_pg_timeout(timeout)


def mesh_of(ranks: Ranks) -> DeviceMesh:
    """Return all processes as `shard` takes them; all have to call it at the same time."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(torch.device(ranks.device).type, (ranks.size,))


def shard(model: LanguageModel, dtype: torch.dtype, mesh: DeviceMesh) -> PreTrainedModel:
    """Shard the float32 weights of a model over the processes; its forward pass computes in `dtype`.

    Every process takes its part of the model that it has loaded, without waiting for another.

    Each layer is gathered when its turn comes and freed afterwards. The model moves to the device layer by layer, so it
    never has to fit there whole.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    causal = causal_model(model)
    enable_run_inside(causal)
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    layer_kinds = set(causal._no_split_modules or ())
    for module in [m for m in causal.modules() if type(m).__name__ in layer_kinds]:
        fully_shard(module.float(), mesh=mesh, mp_policy=policy)
    # Otherwise the outermost weights stay gathered after a forward pass without a backward one, and are not trained.
    return fully_shard(causal.float(), mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@contextlib.contextmanager
def gathered(model: LanguageModel) -> Iterator[None]:
    """Keep sharded weights whole between forward passes without gradients, for many short ones in a row."""
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a weight in one piece, whether or not it is sharded; all processes have to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
