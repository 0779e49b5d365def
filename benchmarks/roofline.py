"""A prediction, not a measurement: how fast a training step is on GPUs that are not here, and what it moves.

    python benchmarks/roofline.py [--cases full-32k,lora-32k,...] [--tables methods,items,gpus,trl] [--json FILE]

The product's own step (trace_step.py) on a model of Qwen3-4B's shape, and a row as in train_gpu.py: one row, then
clipping and AdamW. Every operation takes the longer of two times: its bytes ÷ the GPU's bandwidth, its FLOPs ÷ the
GPU's speed in products of this kind. What a GPU reaches of its data sheet is assumed, see `GPUS`; kernels follow each
other without a gap, so small models and short rows would be slower. Absolute times may be 15 % off; ratios and bytes
are better.

MFU is costs/flops.py's: model FLOPs ÷ time ÷ the data sheet's dense peak; recomputing does not count. "moved" is what
all operations read and write, each operand once. "peak" is the memory that torch would count, without CUDA's own.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from trace_step import QWEN3_4B, Trace, Traced, has_liger, trace_step
from train_gpu_cases import ALPHA, CASES, RANK, Case, documents_of

from dasd_lite.config.train import TrainConfig
from dasd_lite.costs.flops import training_flops
from dasd_lite.costs.hardware import Hardware, peak_flops
from dasd_lite.costs.memory import TrainingStep, most_layers_kept, predict_step
from dasd_lite.costs.shape import shape_of

SHAPE = shape_of(QWEN3_4B | {"model_type": "qwen3"})
MORE_CASES = {"full-8k": Case("full", 8192), "full-16k": Case("full", 16384), "lora-8k": Case("lora", 8192)}
MORE_CASES |= {"lora-64k": Case("lora", 65536), "qlora-16k": Case("qlora", 16384), "qlora-32k": Case("qlora", 32768)}
ALL_CASES = dict(sorted((CASES | MORE_CASES | {"qlora-64k": Case("qlora", 65536)}).items(), key=lambda x: str(x[1])))


@dataclass(frozen=True)
class Gpu:
    """What a GPU is assumed to reach.

    Attributes:
        device: As torch names it.
        bandwidth: Bytes per second of elementwise kernels, about 85 % of the data sheet's.
        matmul: FLOP/s of large products in 16 bits.
        attention: FLOP/s of attention forward and backward, by kernel.
    """

    device: str
    bandwidth: float
    matmul: float
    attention: dict[str, tuple[float, float]] = field(default_factory=dict)
    varlen: bool = True
    """Whether attention has a kernel for documents of any length."""
    memory: float = 0.0
    """Bytes, as torch reports them."""

    def seconds(self, trace: Trace, kernel: str) -> dict[str, float]:
        """Return the time of a step by kinds of operations."""
        forward, backward = self.attention[kernel]
        speeds = {"matmul": self.matmul, "attention": forward, "attention backward": backward}
        times: dict[str, float] = {}
        for operation, number in trace.operations.items():
            compute = operation.flops / speeds.get(operation.kind, self.matmul)
            kind = operation.kind.split()[0]
            times[kind] = times.get(kind, 0.0) + number * max(operation.moved / self.bandwidth, compute)
        return times


# H200, A100 and 4090: what public benchmarks of cuBLAS, of flash-attention 2 and 3 and of streaming kernels reach with
# heads of 128. 3060 and T4: assumed to reach the same shares of their data sheets as a 4090; a T4 has no
# flash-attention, its figures are for torch's memory-efficient kernel.
GPUS = {
    "H200": Gpu("NVIDIA H200", 4.0e12, 700e12, {"FA2": (370e12, 300e12), "FA3": (620e12, 480e12)}, memory=150e9),
    "A100": Gpu("NVIDIA A100-SXM4-80GB", 1.65e12, 255e12, {"FA2": (190e12, 160e12)}, memory=85e9),
    "4090": Gpu("NVIDIA GeForce RTX 4090", 0.88e12, 150e12, {"FA2": (135e12, 115e12)}, memory=25.3e9),
    "3060": Gpu("NVIDIA GeForce RTX 3060", 0.31e12, 23e12, {"FA2": (20e12, 17e12)}, memory=12.6e9),
    "T4": Gpu("Tesla T4", 0.26e12, 45e12, {"FA2": (18e12, 13e12)}, varlen=False, memory=15.6e9),
}


@dataclass(frozen=True)
class Variant:
    """How a step is done.

    Attributes:
        label: For the tables.
        liger: Whether Liger's kernels are used.
        attention: FA2 or FA3.
        casts: Whether adapters cast their inputs to float32, as PEFT does.
        one_pass: Whether head and loss take one pass.
        large_chunks: Whether chunks of logits are as large as the GPU has room for.
        keep_attention: Whether the output of attention is kept, where layers are computed again.
        keep_layers: Whether as many layers keep their activations as the GPU has room for.
        theirs: Whether the step is TRL's, as emulated here.
    """

    label: str
    liger: bool = True
    attention: str = "FA2"
    casts: bool = False
    one_pass: bool = True
    large_chunks: bool = True
    keep_attention: bool = True
    keep_layers: bool = True
    theirs: bool = False


@dataclass(frozen=True)
class Result:
    """What is predicted of one case, on one GPU."""

    case: str
    variant: str
    gpu: str
    seconds: dict[str, float]
    mfu: float
    moved_bytes: int
    peak_bytes: int
    predicted_bytes: float
    layers_kept: int

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


_USED = 0.9  # of a GPU's memory, see training/job.py


def config_of(case: Case, variant: Variant) -> TrainConfig:
    """Return the options of `train` for a case."""
    adapter = {} if case.method == "full" else {"rank": RANK, "alpha": ALPHA}
    return TrainConfig.model_validate(
        {
            "method": {"kind": case.method, **adapter},
            "dtype": "bfloat16",
            "liger": "on" if variant.liger else "off",
            "one_pass_loss": variant.one_pass,
            "gradient_checkpointing": "on",
        }
    )


def step_of(case: Case, variant: Variant, gpu: Gpu) -> TrainingStep:
    """Return the step as costs/memory.py sees it, with as much kept as the GPU has room for."""
    room = gpu.memory if variant.large_chunks else None
    hardware = Hardware(liger=variant.liger, varlen=gpu.varlen, memory=room, free=room)
    tokens = sum(documents_of(case.seq_len)[0])
    step = TrainingStep(SHAPE, config_of(case, variant), tokens, 1, hardware)
    if variant.theirs:
        return step
    with_attention = replace(step, keeps_attention=variant.keep_attention)
    if predict_step(with_attention).total <= _USED * gpu.memory:
        step = with_attention
    return replace(step, layers_kept=most_layers_kept(step, _USED * gpu.memory) if variant.keep_layers else 0)


@lru_cache
def traced(case: str, variant: Variant, varlen: bool, logits: int, layers_kept: int, keep_attention: bool) -> Traced:
    """Trace a case once, whatever GPU it is for."""
    kind = ALL_CASES[case]
    lengths, prompt = documents_of(kind.seq_len)
    more: dict[str, Any] = {"change": casting} if variant.casts else {}
    if variant.theirs:
        more = {"step": their_loss, "change": their_model}
    load = {"layers_kept": layers_kept, "keep_attention": keep_attention}
    config = config_of(kind, variant)
    return trace_step(QWEN3_4B, config, lengths, masked=prompt, varlen=varlen, logit_bytes=logits, load=load, **more)


def result(case: str, variant: Variant, gpu: str = "H200") -> Result:
    """Predict one case on one GPU."""
    kind, card = ALL_CASES[case], GPUS[gpu]
    lengths, prompt = documents_of(kind.seq_len)
    known = step_of(kind, variant, card)
    same = replace(variant, label="", attention="", keep_attention=False, keep_layers=False, large_chunks=False)
    step = traced(case, same, card.varlen, known.logit_bytes, known.layers_kept, known.keeps_attention)
    seconds = card.seconds(step.trace, variant.attention)
    work = training_flops(SHAPE, lengths, known.config.method, sum(lengths) - prompt * len(lengths))
    peak = peak_flops(card.device) or float("nan")
    predicted = predict_step(known)
    return Result(
        case,
        variant.label,
        gpu,
        seconds,
        work / sum(seconds.values()) / peak,
        step.trace.moved,
        step.total_bytes,
        predicted.total - predicted.overhead,
        known.layers_kept,
    )


def casting(model: Any) -> None:
    """Let adapters cast their inputs to float32."""
    for module in model.modules():
        vars(module).pop("cast_input_dtype_enabled", None)
        if hasattr(module, "cast_input_dtype_enabled"):
            vars(module)["cast_input_dtype_enabled"] = True


# --- TRL's step, emulated -------------------------------------------------------------------------------


def their_model(model: Any) -> None:
    """Undo what is ours: the residual stream in 16 bits in full training, and adapters that do not cast."""
    from dasd_lite.model.logprobs import causal_model

    causal_model(model).get_input_embeddings()._forward_hooks.clear()
    casting(model)


def their_loss(model: Any, row: Any, job: Any) -> Any:
    """Do what TRL 1.16's SFTTrainer does from a packed row to the loss, with our attention in place of flash-attention.

    Its head and loss are one operation over tiles of 4,096 tokens and 32,768 words (trl/kernels/chunked_logprob.py).
    """
    import torch

    from dasd_lite.model.attention import Documents
    from dasd_lite.model.logprobs import causal_model, target_positions

    causal = causal_model(model)
    documents = Documents.of(row.doc_lengths)
    positions = target_positions(row.loss_mask, row.doc_lengths)
    with job.autocast():
        ids = torch.from_numpy(row.ids.astype("int64"))[None]
        output = causal.base_model(
            input_ids=ids, position_ids=documents.position_ids, use_cache=False, documents=documents
        )
        hidden = output.last_hidden_state[0].index_select(0, torch.from_numpy(positions) - 1)
        return _tiled_loss()(hidden, causal.get_output_embeddings().weight).sum() / len(positions)


def _tiled_loss() -> Callable[..., Any]:
    """Return a loss whose operations are counted and not done."""
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    trace = next(mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Trace))

    def tiles(hidden: Any, weight: Any, passes: Callable[[int, int], None]) -> None:
        num, width, rows = len(hidden), weight.shape[1], weight.shape[0]
        for start in range(0, num, 4096):
            n = min(4096, num - start)
            if hidden.dtype != torch.bfloat16:
                trace.count("_to_copy", "elementwise", n * width * hidden.element_size(), 2 * n * width)
            for first in range(0, rows, 32768):
                words = min(32768, rows - first)
                if weight.dtype != torch.bfloat16:
                    trace.count("_to_copy", "elementwise", weight.element_size() * words * width, 2 * words * width)
                trace.count("mm", "matmul", 2 * width * (n + words), 2 * n * words, 2.0 * n * words * width)
                passes(n, words)

    class TiledLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
            ctx.save_for_backward(hidden, weight)
            tile = torch.empty(min(4096, len(hidden)), 32768, dtype=torch.bfloat16)
            tiles(hidden, weight, lambda n, words: trace.count("tile forward", "elementwise", 2 * n * words, 0))
            del tile
            return torch.empty(len(hidden))

        @staticmethod
        def backward(ctx: Any, grad: Any) -> tuple[Any, Any]:
            hidden, weight = ctx.saved_tensors
            width = weight.shape[1]
            has_weight = ctx.needs_input_grad[1]
            of_hidden = torch.zeros(hidden.shape)
            of_weight = torch.zeros(weight.shape) if has_weight else None
            tile = torch.empty(min(4096, len(hidden)), 32768, dtype=torch.bfloat16)

            def passes(n: int, words: int) -> None:
                trace.count("tile backward", "elementwise", 2 * n * words, 2 * n * words)
                flops, operands = 2.0 * n * words * width, 2 * words * n
                trace.count("addmm", "matmul", operands + (2 * words + 4 * n) * width, 4 * n * width, flops)
                if has_weight:
                    trace.count("addmm", "matmul", operands + (2 * n + 4 * words) * width, 4 * words * width, flops)

            tiles(hidden, weight, passes)
            del tile
            return of_hidden.to(hidden.dtype), None if of_weight is None else of_weight.to(weight.dtype)

    return TiledLoss.apply  # type: ignore[no-any-return]


# --- tables ---------------------------------------------------------------------------------------------


def methods(cases: list[str]) -> tuple[str, list[Result]]:
    """Every case on an H200."""
    best = [Variant("Liger, FA3", attention="FA3")] if has_liger() else []
    steps = [Variant("no Liger, FA2", liger=False), *best]
    return "Every case on an H200, with all changes", [result(case, variant) for case in cases for variant in steps]


def items(cases: list[str]) -> tuple[str, list[Result]]:
    """What each change brings, each on top of those before."""
    return "Each change on top of those before, on an H200", [
        result(case, variant)
        for case in cases
        if case in ("full-32k", "lora-32k", "qlora-8k")
        for variant in ITEMS
        if has_liger() or not variant.liger
    ]


def gpus(cases: list[str]) -> tuple[str, list[Result]]:
    """Cases that fit, on other GPUs."""
    fitting = [("A100", "full-32k"), ("A100", "lora-32k"), ("4090", "lora-16k"), ("4090", "qlora-32k")]
    fitting += [("3060", "qlora-8k"), ("3060", "qlora-16k"), ("T4", "qlora-8k"), ("T4", "qlora-16k")]
    steps = [BEFORE] + [Variant("all changes")] * has_liger()
    return "Cases that fit other GPUs", [
        result(case, variant, gpu) for gpu, case in fitting if case in cases for variant in steps
    ]


def trl(cases: list[str]) -> tuple[str, list[Result]]:
    """TRL's step, emulated in the same trace, beside ours."""
    steps = [Variant("TRL, emulated", has_liger(), theirs=True), Variant("ours", has_liger())]
    return "TRL 1.16's step, emulated, and ours, both with FA2 on an H200", [
        result(case, variant)
        for case in cases
        if case in ("full-32k", "full-64k", "lora-32k", "qlora-8k")
        for variant in steps
    ]


BEFORE = Variant("before", False, "FA2", True, False, False, False, False)
ITEMS = [
    BEFORE,
    Variant("+ Liger", True, "FA2", True, False, False, False, False),
    Variant("+ FA3", True, "FA3", True, False, False, False, False),
    Variant("+ adapters do not cast", True, "FA3", False, False, False, False, False),
    Variant("+ one-pass loss", True, "FA3", False, True, False, False, False),
    Variant("+ larger chunks", True, "FA3", False, True, True, False, False),
    Variant("+ attention kept", True, "FA3", False, True, True, True, False),
    Variant("+ layers kept", True, "FA3"),
]
TABLES = {"methods": methods, "items": items, "gpus": gpus, "trl": trl}


def table_of(title: str, results: list[Result]) -> list[str]:
    """Return a table in Markdown."""
    kinds = ("elementwise", "matmul", "attention", "optimizer")
    head = [
        "case",
        "GPU",
        "step",
        "layers kept",
        "TB moved",
        *kinds,
        "s",
        "MFU",
        "GB at the peak",
        "predicted ÷ traced",
    ]
    lines = [f"**{title}**", "", f"| {' | '.join(head)} |", f"|---|---|---|{'---:|' * (len(head) - 3)}"]
    for one in results:
        cells = [one.case, one.gpu, one.variant, str(one.layers_kept), f"{one.moved_bytes / 1e12:.2f}"]
        cells += [f"{one.seconds.get(kind, 0):.2f}" for kind in kinds]
        cells += [f"{one.total:.2f}", f"{100 * one.mfu:.1f} %", f"{one.peak_bytes / 1e9:.1f}"]
        cells += ["–" if one.variant.startswith("TRL") else f"{one.predicted_bytes / one.peak_bytes:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    """Predict the cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(ALL_CASES), help=f"of {','.join(ALL_CASES)}")
    parser.add_argument("--tables", default=",".join(TABLES), help=f"of {','.join(TABLES)}")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    cases, tables = args.cases.split(","), args.tables.split(",")
    for given, known in ((cases, ALL_CASES), (tables, TABLES)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{', '.join(unknown)}: there is only {', '.join(known)}")
    warnings.filterwarnings("ignore")  # of fake tensors, about what they stand in for
    if not has_liger():
        print("liger-kernel is not installed: nothing is predicted with it\n")
    figures: dict[str, Any] = {}
    for name in tables:
        title, results = TABLES[name](cases)
        print("\n".join(table_of(title, results)), flush=True)
        figures[name] = [asdict(one) for one in results]
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
