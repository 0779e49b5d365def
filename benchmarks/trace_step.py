"""One training step of the product, traced without a GPU and without weights: what each operation moves and computes.

Input: a model's shape, the options of `train`, a row's documents. Output: a `Trace`: every operation with the bytes
that it reads and writes and its FLOPs, and the most bytes that were alive at once. `load_trainable`, `Job.forward`, the
objective, the backward pass, clipping and the optimizer are the product's own; only their tensors are fake: they have
sizes and no content. Fake tensors are on the CPU, because torch's backward pass wants a driver for those of a GPU.
What a GPU does otherwise is put in its place:

* attention by torch's operator for documents of any length, as on Ampere and later (`varlen`), or side by side as on a
  T4; its FLOPs from the documents' lengths, halved by causality, and 2.5 times as many backward;
* Liger's kernels are not launched; what they read and write is counted. Their Python code around it is Liger's own;
* weights in 4 bits are bitsandbytes' layers with fake contents.

An operation counts once for every operand, as if caches kept nothing between two kernels and everything within one.
Views and allocations are free.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dasd_lite.config.train import TrainConfig
from dasd_lite.model import LOGIT_BYTES, attention, head_loss, kernels, logprobs
from dasd_lite.model.attention import PACKED, register
from dasd_lite.model.logprobs import causal_model
from dasd_lite.model.row import Row
from dasd_lite.training import trainable
from dasd_lite.training.job import Job
from dasd_lite.training.objectives import open_objective
from dasd_lite.training.optimizer import make_optimizer
from dasd_lite.training.ranks import Ranks

QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
}

# --- operations -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One kernel.

    Attributes:
        name: As torch or Liger names it.
        kind: matmul, attention, attention backward, optimizer or elementwise.
        read: Bytes.
        written: Bytes.
        flops: Of matrix products and attention; 0 for the rest.
    """

    name: str
    kind: str
    read: int
    written: int
    flops: float = 0.0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "resize_"}
_FILLS = {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full"}
_OVERWRITES = {"copy_", "zero_", "fill_"}  # they do not read what they change
# They read as much of their first operand as they return, or as their last operand has.
_GATHERS = {"embedding", "index_select", "gather", "index", "nll_loss_forward", "nll_loss_backward"}
_SCATTERS = {"index_add_", "index_add", "scatter", "scatter_", "scatter_add_", "index_copy_", "index_put_"}
_IN_PLACE = {"addmm_": torch.ops.aten.addmm}  # products that torch's table of FLOPs does not have
_ATTENTION = {"_varlen_attn", "_scaled_dot_product_flash_attention_for_cpu"}
_ATTENTION_BACKWARD = {f"{name}_backward" for name in _ATTENTION}


def size_of(tensor: Tensor) -> int:
    """Return the bytes that a tensor's elements take in memory; an expanded dimension takes none."""
    if not tensor.numel():
        return 0
    shape = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return int(np.prod(shape, dtype=np.int64)) * tensor.element_size()


def storage_of(tensor: Tensor) -> int:
    """Return what tells apart the memory of two tensors."""
    return int(tensor.untyped_storage()._cdata)


class Trace(TorchDispatchMode):
    """Counts operations, and the bytes of the tensors that they make, while it is on."""

    def __init__(self, doc_lengths: Iterable[int] = ()) -> None:
        """Take the tokens of the documents that attention is computed over."""
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.now = self.peak = 0
        self.peak_at = ""
        self._sizes: dict[int, int] = {}
        self.pairs = sum(n * n / 2 for n in doc_lengths)

    @property
    def moved(self) -> int:
        """Bytes read and written by all operations."""
        return sum(one.moved * number for one, number in self.operations.items())

    def flops(self, kind: str) -> float:
        """Return the FLOPs of all operations of a kind."""
        return sum(one.flops * number for one, number in self.operations.items() if one.kind == kind)

    def count(self, name: str, kind: str, read: int, written: int, flops: float = 0.0) -> None:
        """Add an operation that torch does not see."""
        self.operations[Operation(name, kind, read, written, flops)] += 1

    def hold(self, num_bytes: int, name: str) -> None:
        """Note memory that is held only while the present operation runs."""
        if self.now + num_bytes > self.peak:
            self.peak, self.peak_at = self.now + num_bytes, name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        known = {storage_of(x) for x in given}
        new = [x for x in made if storage_of(x) not in known]
        for tensor in new:
            self._add(tensor)
        name = func.__name__.split(".")[0]
        self.hold(self._workspace(name, given), name)
        self._count(func, name, given, made, new)
        return result

    def _add(self, tensor: Tensor) -> None:
        key, storage = storage_of(tensor), tensor.untyped_storage()
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def _count(self, func: Any, name: str, given: list[Tensor], made: list[Tensor], new: list[Tensor]) -> None:
        changed = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if name in _FREE or (not new and not changed):  # nothing, or a view
            return
        read, written = sum(map(size_of, given)), sum(map(size_of, new))
        if name.startswith("_fused_adamw"):
            read = sum(map(size_of, given))
            written = read * 3 // 4  # all but the gradients
        elif changed:
            target = made[0] if made else given[0]
            if name in _SCATTERS:
                read, written = 2 * size_of(given[-1]), size_of(given[-1])
            else:
                written += size_of(target)
                if name in _OVERWRITES or "out" in func._overloadname:
                    read -= size_of(target)
        elif name in _FILLS:
            read = 0
        elif name in _GATHERS:
            read = sum(map(size_of, given[1:])) + min(size_of(given[0]), sum(map(size_of, new)))
        elif name == "embedding_dense_backward":
            read, written = sum(map(size_of, given)), written + size_of(given[0])  # zeros first, then the rows
        flops, kind = 0.0, "elementwise"
        if name in _ATTENTION:
            kind, flops = "attention", 4 * self._pairs(given[0])
        elif name in _ATTENTION_BACKWARD:
            kind, flops = "attention backward", 10 * self._pairs(given[1])
            workspace = self._workspace(name, given)
            read, written = read + workspace, written + workspace
        elif name == "gemm_4bit":  # of a row, it is a matrix made 16-bit again, and a product with that
            matrix = _dequantized_bytes(given)
            self.count("dequantize_4bit", "elementwise", sum(map(size_of, given[1:])), matrix)
            kind, read = "matmul", size_of(given[0]) + matrix
            flops = 2.0 * (matrix // given[0].element_size()) * (given[0].numel() // given[0].shape[-1])
        elif (packet := _IN_PLACE.get(name, func._overloadpacket)) in flop_registry:
            kind = "matmul"
            flops = float(flop_registry[packet](*_shaped(packet, given), out_val=made[0]))
        elif name.startswith("_fused_adamw"):
            kind = "optimizer"
        self.count(name, kind, read, written, flops)

    def _pairs(self, query: Tensor) -> float:
        """Return the pairs of tokens that see each other, over all heads, times the width of a head."""
        if query.dim() == 3:  # [T, H, W]
            return self.pairs * query.shape[1] * query.shape[2]
        number, heads, length, width = query.shape
        return number * heads * width * length * length / 2

    @staticmethod
    def _workspace(name: str, given: list[Tensor]) -> int:
        """Return what an operation allocates for itself.

        In flash-attention's backward pass, the queries' gradient in float32 and, where heads share keys, the gradients
        of keys and values for every head (csrc/flash_attn/flash_api.cpp, mha_varlen_bwd).
        """
        if name == "gemm_4bit":
            return _dequantized_bytes(given)
        if name != "_varlen_attn_backward":
            return 0
        query, key = given[1], given[2]
        shared = 2 * size_of(query) if query.shape[1] != key.shape[1] else 0
        return 4 * query.numel() + shared


def _dequantized_bytes(given: list[Tensor]) -> int:
    """Return the bytes of a 4-bit matrix in the format of its input."""
    return 2 * given[1].numel() * given[0].element_size()


def _shaped(packet: Any, given: list[Tensor]) -> list[Tensor]:
    """Return the tensors whose shapes the FLOPs of a matrix product follow from."""
    return given[:3] if packet in (torch.ops.aten.addmm, torch.ops.aten.baddbmm) else given[:2]


# --- Liger's kernels ------------------------------------------------------------------------------------

_LIGER = ("rms_norm", "swiglu", "rope")
# What each kernel reads and writes, by the names of its parameters.
_KERNELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "_rms_norm_forward_kernel": (("X_ptr", "W_ptr"), ("Y_ptr", "RSTD_ptr")),
    "_block_rms_norm_forward_kernel": (("X_ptr", "W_ptr"), ("Y_ptr", "RSTD_ptr")),
    "_rms_norm_backward_kernel": (("dY_ptr", "X_ptr", "W_ptr", "RSTD_ptr"), ("dX_ptr", "dW_ptr")),
    "_block_rms_norm_backward_kernel": (("dY_ptr", "X_ptr", "W_ptr", "RSTD_ptr"), ("dX_ptr", "dW_ptr")),
    "_swiglu_forward_kernel": (("a_ptr", "b_ptr"), ("c_ptr",)),
    "_swiglu_backward_kernel": (("dc_ptr", "a_ptr", "b_ptr"), ("a_ptr", "b_ptr")),
    "_triton_rope": (("q_ptr", "k_ptr", "cos", "sin"), ("q_ptr", "k_ptr")),
}


class _Launch:
    """Stands in for a kernel: `kernel[grid](…)` counts what it would read and write."""

    def __init__(self, name: str, parameters: list[str], traces: list[Trace]) -> None:
        self.name, self.parameters, self.traces = name, parameters, traces

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        if self.name not in _KERNELS:
            raise KeyError(f"{self.name}: it is not known what this kernel of Liger reads and writes")
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        reads, writes = (
            sum(size_of(given[name]) for name in names if isinstance(given[name], Tensor))
            for names in _KERNELS[self.name]
        )
        for trace in self.traces:
            trace.count(self.name, "elementwise", reads, writes)


def has_liger() -> bool:
    """Return whether liger-kernel is installed, whose Python code the trace runs."""
    from dasd_lite.costs.hardware import has_liger as installed

    return installed()


@contextlib.contextmanager
def liger_on_paper(traces: list[Trace]) -> Iterator[None]:
    """Let Liger's kernels be counted in place of launched."""
    import importlib

    import triton

    # It warns of backends that are not there, and a log may hold on to what the step has freed.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        for part in _LIGER:
            module = importlib.import_module(f"liger_kernel.ops.{part}")
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.runtime.jit.JITFunction):
                    stack.enter_context(mock.patch.object(module, name, _Launch(name, value.arg_names, traces)))
        yield


# --- the model ------------------------------------------------------------------------------------------


def _four_bit(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Replace linear layers, but for the output head, by bitsandbytes' with fake contents, as transformers does."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    head = causal_model(model).get_output_embeddings()
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not torch.nn.Linear or linear is head:
                continue
            rows, columns = linear.weight.shape
            with unset_fake_temporarily():  # its weights are a subclass that cannot be fake
                new = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, device="meta")
            blocks = rows * columns // 64
            state = QuantState(
                absmax=torch.empty(blocks, dtype=torch.uint8),
                shape=torch.Size((rows, columns)),
                code=torch.empty(16),
                blocksize=64,
                quant_type="nf4",
                dtype=dtype,
                offset=torch.empty(()),
                state2=QuantState(
                    absmax=torch.empty(blocks // 256), code=torch.empty(256), blocksize=256, dtype=torch.float32
                ),
            )
            packed = torch.empty(rows * columns // 2, 1, dtype=torch.uint8)
            new.weight = torch.nn.Parameter(packed, requires_grad=False)
            new.weight.quant_state = state
            new.weight.bnb_quantized = True
            new.weight.quant_type = "nf4"
            new.weight.compress_statistics = True
            new.support_avx512bf16_for_cpu = False
            new.compute_type_is_set = True
            setattr(parent, name, new)


def _load_fake(folder: Path, *, dtype: str, four_bit: bool = False, **options: Any) -> torch.nn.Module:
    """Do what load_model does, with fake weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    config = AutoConfig.from_pretrained(folder)
    format_ = getattr(torch, dtype)
    with mock.patch("transformers.initialization._init_weights", False, create=True):
        model = AutoModelForCausalLM.from_config(config, dtype=format_, attn_implementation=PACKED)
    if four_bit:
        _four_bit(model, format_)
        model.is_loaded_in_4bit = True
    return model.eval()


def bytes_held(tensors: Iterable[Tensor]) -> int:
    """Return the memory of tensors, each storage once."""
    return sum({storage_of(t): t.untyped_storage().nbytes() for t in tensors}.values())


def weights_of(model: torch.nn.Module) -> list[Tensor]:
    """Return all weights, with what bitsandbytes keeps beside those in 4 bits."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for p in model.parameters():
        if hasattr(p, "quant_state"):
            tensors += [
                p.quant_state.absmax,
                p.quant_state.code,
                p.quant_state.state2.absmax,
                p.quant_state.state2.code,
            ]
    return tensors


# --- the step -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    """A step's operations, and its memory as torch would count it on a GPU.

    Attributes:
        trace: All operations, from the hidden states of the first layer to the last weight's update.
        fixed_bytes: Weights, gradients and moments.
        peak_bytes: The most that is alive beside them.
        peak_at: The operation at which that is.
    """

    trace: Trace
    fixed_bytes: int
    peak_bytes: int
    peak_at: str

    @property
    def total_bytes(self) -> int:
        """Peak of the memory without CUDA's context and fragmentation."""
        return self.fixed_bytes + self.peak_bytes


def trace_step(
    shape: dict[str, Any],
    config: TrainConfig,
    doc_lengths: Iterable[int],
    *,
    masked: int = 0,
    checkpointing: bool = True,
    varlen: bool = True,
    logit_bytes: int = LOGIT_BYTES,
    step: Callable[[Any, Row, Job], Tensor] | None = None,
    change: Callable[[torch.nn.Module], None] | None = None,
    load: dict[str, Any] | None = None,
) -> Traced:
    """Trace one optimizer step on one row, the last of several, so that gradients of earlier ones exist.

    Args:
        shape: Of a Qwen3, as in config.json.
        config: Options of `train`; `dtype` must be named, and `liger` be "on" or "off".
        doc_lengths: Tokens of the row's documents.
        masked: Tokens at the beginning of each document that are not trained on.
        checkpointing: Whether layers compute their activations again.
        varlen: Whether attention has a kernel for documents of any length.
        logit_bytes: Of float32 logits that exist at once; a large GPU with room takes more.
        step: Another way from a model and a row to the loss than the product's.
        change: Is applied to the model before the step.
        load: More arguments of load_trainable.
    """
    lengths = [int(n) for n in doc_lengths]
    places = np.concatenate([np.arange(n) for n in lengths])
    row = Row(np.zeros(len(places), np.int32), places >= masked, np.array(lengths, np.int32), ())
    trace, dtype = Trace(lengths), getattr(torch, config.dtype)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "config.json").write_text(json.dumps({**shape, "model_type": "qwen3", "dtype": config.dtype}))
        traces: list[Trace] = []
        for patch in _patches(dtype, varlen, logit_bytes, traces):
            stack.enter_context(patch)
        if config.liger == "on":
            stack.enter_context(liger_on_paper(traces))
        stack.enter_context(fake)
        patches = trainable.GlobalPatches()
        model = trainable.load_trainable(
            folder,
            config.method,
            dtype=config.dtype,
            device="cpu",
            gradient_checkpointing=checkpointing,
            liger=config.liger,
            patches=patches,
            **(load or {}),
        )
        if change is not None:
            change(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(model, config)
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes the moments
        held = [*weights_of(model), *(p.grad for p in trained if p.grad is not None)]
        held += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        fixed = bytes_held(held)
        job = job_of(model, config, dtype)
        traces.append(trace)
        stack.enter_context(patches.active())
        with trace:
            loss = step(model, row, job) if step else job.forward(job.prepare(row, row.num_targets))[0]
            loss.backward()
            del loss
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)  # what Job.clip does
            optimizer.step()
    return Traced(trace, fixed, trace.peak, trace.peak_at)


def job_of(model: Any, config: TrainConfig, dtype: torch.dtype) -> Job:
    """Return a Job that has what its forward pass needs."""
    unused: Any = None
    return Job(
        task=SimpleNamespace(config=config),  # type: ignore[arg-type]
        ranks=Ranks(device="cpu"),
        objective=open_objective(config.objective),
        grader=None,
        rows=unused,
        schedule=unused,
        model=model,
        dtype=dtype,
        is_sharded=False,
        cost=None,
        peak_flops=None,
        comparison_row=unused,
        end_ids=frozenset(),
        is_monitored=False,
    )


def _add_product(traces: list[Trace], sum_VE: Tensor, gradients_CV: Tensor, hidden_CE: Tensor) -> None:
    """Count a product of 16-bit matrices that is added to a float32 one, for which a CPU has no kernel."""
    total, flops = size_of(sum_VE), 2.0 * gradients_CV.numel() * hidden_CE.shape[1]
    for trace in traces:
        trace.count("addmm", "matmul", total + size_of(gradients_CV) + size_of(hidden_CE), total, flops)


def _patches(dtype: torch.dtype, varlen: bool, logit_bytes: int, traces: list[Trace]) -> Iterator[Any]:
    """Put a GPU's ways in the place of a CPU's."""
    kernel = kernels.Kernel("flash attention", kernels._torch_varlen(dtype)) if varlen else None
    yield mock.patch.object(attention, "pick_kernel", lambda *args: kernel)
    yield mock.patch.object(logprobs, "_logit_bytes", lambda device: logit_bytes)
    yield mock.patch.object(head_loss, "_cached_rows", lambda logits: None)  # a GPU takes a chunk whole
    yield mock.patch.object(head_loss, "_add_product", partial(_add_product, traces))
    yield mock.patch.object(attention, "_shares_heads", lambda query, mask: False)  # a T4's kernel does not
    yield mock.patch.dict(attention._CALL_COST, cpu=attention._CALL_COST["cuda"])
    yield mock.patch.object(trainable, "load_model", _load_fake)
    yield mock.patch.object(trainable, "liger_conflict", lambda **options: None)
    # PEFT asks without naming a device, which means a GPU's autocast.
    enabled = torch.is_autocast_enabled
    yield mock.patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device))
    # Everything is on one device already, and fake weights cannot be moved.
    yield mock.patch.object(torch.nn.Module, "to", lambda module, *args, **options: module)


if __name__ == "__main__":
    sys.exit("this is a module; run benchmarks/roofline.py")
