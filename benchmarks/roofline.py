"""A prediction, not a measurement: how fast a training step is on GPUs that are not here, and what it moves.

    python benchmarks/roofline.py [--cases full-32k,lora-32k,...] [--tables items,trl,H200,A100,...] [--json FILE]

The product's own step (trace_step.py) on a model of Qwen3-4B's shape, and a row as in train_gpu.py: one row, then
clipping and AdamW. Every operation takes the longer of two times: its bytes ÷ the GPU's bandwidth, its FLOPs ÷ the
GPU's speed in products of this kind. What a GPU reaches of its data sheet is assumed, see `GPUS`; kernels follow each
other without a gap, so small models and short rows would be slower. Absolute times may be 15 % off; ratios and bytes
are better.

Offloaded activations are copied while the GPU computes, so the step takes the longer of the two times. "before" is the
step as it was without what training/recompute.py, model/head_loss.py, model/offload.py and training/trainable.py do
for speed, without Liger's kernels, and with flash-attention 2.

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
from functools import cache, partial
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
ALL_CASES = dict(
    sorted(
        (CASES | MORE_CASES | {"qlora-64k": Case("qlora", 65536)}).items(), key=lambda x: (x[1].method, x[1].seq_len)
    )
)


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
    link: float = 24e9
    """Bytes per second to or from pinned host memory: PCIe 4, unless it is said."""

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
    "H200": Gpu("NVIDIA H200", 4.0e12, 700e12, {"FA2": (370e12, 300e12), "FA3": (620e12, 480e12)}, True, 150e9, 50e9),
    "A100": Gpu("NVIDIA A100-SXM4-80GB", 1.65e12, 255e12, {"FA2": (190e12, 160e12)}, memory=85e9),
    "4090": Gpu("NVIDIA GeForce RTX 4090", 0.88e12, 150e12, {"FA2": (135e12, 115e12)}, memory=25.3e9),
    "3060": Gpu("NVIDIA GeForce RTX 3060", 0.31e12, 23e12, {"FA2": (20e12, 17e12)}, memory=12.6e9),
    "T4": Gpu("Tesla T4", 0.26e12, 45e12, {"FA2": (18e12, 13e12)}, False, 15.6e9, 12e9),
}


@dataclass(frozen=True)
class Variant:
    """How a step is done.

    Attributes:
        label: For the tables.
        liger: Whether Liger's kernels are used.
        attention: FA2 or FA3.
        casts: Whether adapters cast their inputs to float32, as PEFT does.
        in_place: Whether adapters add their output in place, which PEFT does not do.
        one_pass: Whether head and loss take one pass.
        large_chunks: Whether chunks of logits are as large as the GPU has room for.
        keep_attention: Whether the output of attention is kept, where layers are computed again.
        keep_layers: Whether as many layers keep their activations as the GPU has room for.
        theirs: Whether the step is TRL's, as emulated here.
        offloads: Whether activations are kept in host memory.
        overlaps: Whether they are copied while the GPU computes.
    """

    label: str
    liger: bool = True
    attention: str = "FA2"
    casts: bool = False
    in_place: bool = True
    one_pass: bool = True
    large_chunks: bool = True
    keep_attention: bool = True
    keep_layers: bool = True
    theirs: bool = False
    offloads: bool = False
    overlaps: bool = True


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
    fits: bool
    copy_seconds: float = 0.0
    """Of what goes to the host and back."""
    overlaps: bool = True

    @property
    def total(self) -> float:
        """Seconds of a step."""
        computing = sum(self.seconds.values())
        return max(computing, self.copy_seconds) if self.overlaps else computing + self.copy_seconds


FIGURES: list[Result] = []  # all that were predicted, for --json
_USED = 0.9  # of a GPU's memory, see training/job.py


def config_of(case: Case, variant: Variant, dtype: str = "bfloat16") -> TrainConfig:
    """Return the options of `train` for a case."""
    adapter = {} if case.method == "full" else {"rank": RANK, "alpha": ALPHA}
    return TrainConfig.model_validate(
        {
            "method": {"kind": case.method, **adapter},
            "dtype": dtype,
            "liger": "on" if variant.liger else "off",
            "one_pass_loss": variant.one_pass,
            "gradient_checkpointing": "on",
            "offload_activations": variant.offloads,
        }
    )


def dtype_of(variant: Variant, gpu: Gpu) -> str:
    """Return the number format: a T4 has float16, with a residual stream in float32, which it was not before."""
    return "bfloat16" if gpu.varlen or variant.casts else "float16"


def step_of(case: Case, variant: Variant, gpu: Gpu) -> TrainingStep:
    """Return the step as costs/memory.py sees it, with as much kept as the GPU has room for."""
    room = gpu.memory if variant.large_chunks else None
    hardware = Hardware(liger=variant.liger, varlen=gpu.varlen, memory=room, free=room)
    tokens = sum(documents_of(case.seq_len)[0])
    step = TrainingStep(SHAPE, config_of(case, variant, dtype_of(variant, gpu)), tokens, 1, hardware)
    if variant.theirs or variant.offloads:
        return step
    with_attention = replace(step, keeps_attention=variant.keep_attention)
    if predict_step(with_attention).total <= _USED * gpu.memory:
        step = with_attention
    return replace(step, layers_kept=most_layers_kept(step, _USED * gpu.memory) if variant.keep_layers else 0)


@cache
def traced(
    case: str, variant: Variant, dtype: str, varlen: bool, logits: int, layers_kept: int, keep_attention: bool
) -> Traced:
    """Trace a case once, whatever GPU it is for. Offloading changes none of its operations."""
    kind = ALL_CASES[case]
    lengths, prompt = documents_of(kind.seq_len)
    more: dict[str, Any] = {"change": partial(as_peft_does, casts=variant.casts, in_place=variant.in_place)}
    if variant.theirs:
        more = {"step": their_loss, "change": their_model}
    load = {"layers_kept": layers_kept, "keep_attention": keep_attention}
    config = config_of(kind, variant, dtype)
    return trace_step(QWEN3_4B, config, lengths, masked=prompt, varlen=varlen, logit_bytes=logits, load=load, **more)


def fits(case: str, variant: Variant, gpu: str) -> bool:
    """Return whether a case is predicted to fit a GPU."""
    return predict_step(step_of(ALL_CASES[case], variant, GPUS[gpu])).total <= GPUS[gpu].memory


def result(case: str, variant: Variant, gpu: str = "H200") -> Result:
    """Predict one case on one GPU."""
    kind, card = ALL_CASES[case], GPUS[gpu]
    lengths, prompt = documents_of(kind.seq_len)
    known = step_of(kind, variant, card)
    same = Variant("", variant.liger, "", variant.casts, variant.in_place, variant.one_pass, theirs=variant.theirs)
    dtype = known.config.dtype
    step = traced(case, same, dtype, card.varlen, known.logit_bytes, known.layers_kept, known.keeps_attention)
    seconds = card.seconds(step.trace, variant.attention)
    work = training_flops(SHAPE, lengths, known.config.method, sum(lengths) - prompt * len(lengths))
    peak = peak_flops(card.device) or float("nan")
    predicted = predict_step(known)
    needed = predicted.total - predicted.overhead
    there_and_back = 2 * (known.kept - known._kept_on_gpu)
    figures = Result(
        case,
        variant.label,
        gpu,
        seconds,
        0.0,
        step.trace.moved,
        step.total_bytes if not variant.offloads else int(needed),
        needed,
        known.layers_kept,
        fits(case, variant, gpu),
        there_and_back / card.link if variant.offloads else 0.0,
        variant.overlaps,
    )
    FIGURES.append(replace(figures, mfu=work / figures.total / peak))
    return FIGURES[-1]


def as_peft_does(model: Any, *, casts: bool, in_place: bool) -> None:
    """Undo what is ours in adapters, unless it is asked for."""
    for module in model.modules():
        if casts and hasattr(module, "cast_input_dtype_enabled"):
            vars(module)["cast_input_dtype_enabled"] = True
        if not in_place and hasattr(module, "lora_A"):
            vars(module).pop("forward", None)


# --- TRL's step, emulated -------------------------------------------------------------------------------


def their_model(model: Any) -> None:
    """Undo what is ours: the residual stream in 16 bits in full training, and how adapters compute."""
    from dasd_lite.model.logprobs import causal_model

    causal_model(model).get_input_embeddings()._forward_hooks.clear()
    as_peft_does(model, casts=True, in_place=False)


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


def items(cases: list[str]) -> list[str]:
    """What each change brings, each on top of those before."""
    chosen = [case for case in cases if case in ("full-32k", "lora-32k", "qlora-8k")]
    return table_of(
        "Each change on top of those before, on an H200",
        [result(case, variant) for case in chosen for variant in ITEMS if has_liger() or not variant.liger],
    )


def trl(cases: list[str]) -> list[str]:
    """TRL's step, emulated in the same trace, beside ours."""
    steps = [Variant("TRL, emulated", has_liger(), theirs=True), Variant("ours", has_liger())]
    chosen = [case for case in cases if case in ("full-32k", "full-64k", "lora-32k", "qlora-8k")]
    return table_of(
        "TRL 1.16's step, emulated, and ours, both with FA2 on an H200",
        [result(case, variant) for case in chosen for variant in steps],
    )


BEFORE = Variant("before", False, "FA2", True, False, False, False, False, False, overlaps=False)
ITEMS = [
    BEFORE,
    Variant("+ Liger", True, "FA2", True, False, False, False, False, False),
    Variant("+ FA3", True, "FA3", True, False, False, False, False, False),
    Variant("+ adapters do not cast", True, "FA3", False, False, False, False, False, False),
    Variant("+ adapters add in place", True, "FA3", False, True, False, False, False, False),
    Variant("+ one-pass loss", True, "FA3", False, True, True, False, False, False),
    Variant("+ larger chunks", True, "FA3", False, True, True, True, False, False),
    Variant("+ attention kept", True, "FA3", False, True, True, True, True, False),
    Variant("+ layers kept", True, "FA3"),
]
TABLES: dict[str, Callable[[list[str]], list[str]]] = {"items": items, "trl": trl}


def table_of(title: str, results: list[Result]) -> list[str]:
    """Return a table in Markdown."""
    kinds = ("elementwise", "matmul", "attention", "optimizer")
    head = ["case", "step", "layers kept", "TB moved", *kinds, "s", "MFU", "GB at the peak"]
    lines = [f"**{title}**", "", f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    for one in results:
        cells = [one.case, one.variant, str(one.layers_kept), f"{one.moved_bytes / 1e12:.2f}"]
        cells += [f"{one.seconds.get(kind, 0):.2f}" for kind in kinds]
        cells += [f"{one.total:.2f}", f"{100 * one.mfu:.1f} %", f"{one.peak_bytes / 1e9:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def before_and_after(gpu: str, cases: list[str]) -> list[str]:
    """Return a table of the cases that fit a GPU: each figure before all changes, and after them."""
    head = ["case", "TB moved", "elementwise", "matmul", "attention", "s", "MFU", "GB at the peak", "layers kept"]
    best = max(GPUS[gpu].attention)
    lines = [f"**{gpu}: before → after, with {best}**" if GPUS[gpu].varlen else f"**{gpu}: before → after**", ""]
    lines += [f"| {' | '.join([*head, 'predicted ÷ traced'])} |", f"|---|{'---:|' * len(head)}"]
    for case in cases:
        steps = (Variant("after", has_liger(), best, offloads=offloads) for offloads in (False, True))
        step = next((step for step in steps if fits(case, step, gpu)), None)
        if step is None:
            continue
        after = result(case, step, gpu)
        pair = (result(case, replace(BEFORE, offloads=step.offloads), gpu), after)

        def cell(show: Callable[[Result], str], pair: tuple[Result, Result] = pair) -> str:
            return " → ".join(show(one) if one.fits else "–" for one in pair)

        offloaded = bool(after.copy_seconds)
        cells = [f"{case}, offloaded" if offloaded else case, cell(lambda one: f"{one.moved_bytes / 1e12:.2f}")]
        cells += [
            cell(lambda one, kind=kind: f"{one.seconds.get(kind, 0):.2f}")  # type: ignore[misc]
            for kind in ("elementwise", "matmul", "attention")
        ]
        cells += [cell(lambda one: f"{one.total:.2f}"), cell(lambda one: f"{100 * one.mfu:.1f}") + " %"]
        cells += [cell(lambda one: f"{one.peak_bytes / 1e9:.1f}"), str(after.layers_kept)]
        cells += ["–" if offloaded else f"{after.predicted_bytes / after.peak_bytes:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


TABLES |= {gpu: partial(before_and_after, gpu) for gpu in GPUS}


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
    for name in tables:
        print("\n".join(TABLES[name](cases)), flush=True)
        if args.json:
            args.json.write_text(json.dumps([asdict(one) for one in FIGURES], indent=1))


if __name__ == "__main__":
    main()
