"""What train_gpu.py measures, and our side of it: the cases, the model, the rows, and our training on them.

    python benchmarks/train_gpu_cases.py data|ours --folder FOLDER [--case full-32k] [--dry]

The last line printed is the result in JSON: tokens, seconds and loss of every step, and the peak of the memory; or
`missing` and the reason. `data` writes `FOLDER`/model and rows as pack writes them; `ours` trains on one row a step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
}
TINY = SHAPE | {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SHRUNK = 64  # a row of the dry run is this many times shorter
MEDIAN, SIGMA, PROMPT = 8192, 0.985, 150  # of the documents' lengths; the mean is the median × exp(σ² ÷ 2) = 13.3K
RANK, ALPHA, LEARNING_RATE = 32, 64.0, 1e-5
WARMUP = 2


@dataclass(frozen=True)
class Case:
    """What is trained how, on rows of which length."""

    method: str
    seq_len: int


CASES = {
    "full-32k": Case("full", 32768),
    "full-64k": Case("full", 65536),
    "qlora-8k": Case("qlora", 8192),
    "lora-16k": Case("lora", 16384),
    "lora-32k": Case("lora", 32768),
}
NEEDED = {"full": (), "lora": ("peft",), "qlora": ("peft", "bitsandbytes")}
FASTER = ("flash_attn", "liger_kernel")  # what either side uses if it is installed
SWITCHES: dict[str, dict[str, Any]] = {
    "liger": {"liger": "off"},
    "one_pass_loss": {"one_pass_loss": False},
    "keep_attention": {"keep_attention": "off"},
    "keep_layers": {"keep_layers": 0},
}
"""What is switched off, one at a time, by `--ablate`."""
Result = dict[str, Any]


def main() -> None:
    """Make the model and rows, or train by our stage."""
    run({"data": make_data, "ours": run_ours})


def run(works: dict[str, Callable[[Any], Result]]) -> None:
    """Do what the command line names; print the result, or why there is none."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=list(works))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES), help="those that `data` writes rows for")
    parser.add_argument("--case", choices=list(CASES))
    parser.add_argument("--steps", type=int, default=3, help="steps that count")
    parser.add_argument("--attention", default="auto", help="attn_implementation of TRL's side")
    parser.add_argument("--without", choices=list(SWITCHES), help="what our side does without")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args()
    args.cases = args.cases.split(",")
    print(json.dumps(guarded(lambda: works[args.what](args))))


def guarded(work: Callable[[], Result]) -> Result:
    """Return what `work` does, or why it could not."""
    try:
        return work()
    except ModuleNotFoundError as error:
        traceback.print_exc()
        return {"missing": f"{error.name} not installed"}
    except Exception as error:  # whatever it is, the other cases continue
        traceback.print_exc()
        if "out of memory" in str(error).lower():
            return {"missing": "out of memory"}
        text = (str(error).strip().splitlines() or [""])[0]
        return {"missing": f"{type(error).__name__}: {text[:100]}", "failed": True}


def require(*modules: str) -> None:
    """Name a missing module before anything is loaded."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"no module named {module}", name=module)


# --- model and rows -------------------------------------------------------------------------------------


def seq_len_of(case: str, *, dry: bool) -> int:
    """Return the tokens of a row."""
    return CASES[case].seq_len // (SHRUNK if dry else 1)


def make_data(args: Any) -> Result:
    """Write the model and the rows of each case, unless an earlier call did."""
    began = time.perf_counter()
    import torch

    on_gpu = torch.cuda.is_available() and not args.dry
    if not on_gpu and not args.dry:
        raise RuntimeError("there is no CUDA GPU; --dry runs on a CPU")
    if not (args.folder / "model").exists():
        make_model(args.folder / "model", args)
    lengths = {case: make_rows(case, args) for case in args.cases}
    from dasd_lite.costs.hardware import peak_flops

    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    return {
        "device": device,
        "torch": torch.__version__,
        "peak_flops": peak_flops(device),
        "took": time.perf_counter() - began,
        "doc_lengths": lengths,
    }


def make_model(folder: Path, args: Any) -> None:
    """Write a random model; on a GPU it is drawn there, in seconds."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(**(TINY if args.dry else SHAPE), tie_word_embeddings=True, rope_parameters=rope)
    with torch.device("cpu" if args.dry else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if args.dry else torch.bfloat16)
    temporary = folder.with_name("model.tmp")
    model.save_pretrained(temporary)
    temporary.rename(folder)


def documents_of(seq_len: int, shrunk: int = 1) -> tuple[list[int], int]:
    """Return the lengths of a typical row's documents, and of the prompt in each of them.

    Drawn documents are packed; the row is the full one whose attention is closest to the mean of all.
    """
    import numpy as np

    from dasd_lite.method.packing import pack_rows

    median, prompt = (max(2, value // shrunk) for value in (MEDIAN, PROMPT))
    drawn = np.random.default_rng(0).lognormal(math.log(median), SIGMA, 2000).astype(np.int64).clip(prompt + 2, seq_len)
    plan = pack_rows(drawn, seq_len)
    rows = [drawn[plan.row(r)] for r in range(plan.num_rows)]
    costs = [float((row.astype(float) ** 2).sum()) for row in rows]
    full = [r for r, row in enumerate(rows) if row.sum() > 0.97 * seq_len]
    lengths: list[int] = rows[min(full, key=lambda r: abs(costs[r] - sum(costs) / len(costs)))].tolist()
    return lengths, prompt


def make_rows(case: str, args: Any) -> list[int]:
    """Write as many rows as there are steps, for us and as an Arrow file for TRL; return their documents' lengths."""
    import numpy as np
    import pyarrow as pa

    from dasd_lite.data.manifest import identify
    from dasd_lite.data.records import ROW
    from dasd_lite.data.writer import ShardWriter

    shape, shrunk = (TINY, SHRUNK) if args.dry else (SHAPE, 1)
    lengths, prompt = documents_of(seq_len_of(case, dry=args.dry), shrunk)
    rng = np.random.default_rng(1)
    name = f"rows-{case}-{WARMUP + args.steps}"
    if (args.folder / name / "manifest.json").exists():
        return lengths
    mask = [place >= prompt for length in lengths for place in range(length)]
    made = [
        {
            "ids": rng.integers(3, shape["vocab_size"], sum(lengths)).tolist(),
            "loss_mask": mask,
            "doc_lengths": lengths,
            "uids": [f"{r}.{d}" for d in range(len(lengths))],
        }
        for r in range(WARMUP + args.steps)
    ]
    table = pa.Table.from_pylist(made, schema=ROW)
    with pa.ipc.new_file(str(args.folder / f"{name}.arrow"), table.schema) as file:
        file.write_table(table)
    with ShardWriter(args.folder / name, identify("pack", 1, {}, {"rows": name}), {"rows": ROW}) as writer:
        writer.write("rows", table)
        writer.publish({})
    return lengths


# --- our side -------------------------------------------------------------------------------------------


def run_ours(args: Any) -> Result:
    """Train by our stage and read its metrics."""
    case = CASES[args.case]
    require("torch", "transformers", "dasd_lite", *NEEDED[case.method])
    from dasd_lite.config.train import TrainConfig
    from dasd_lite.stages.train import train

    adapter = {} if case.method == "full" else {"rank": RANK, "alpha": ALPHA}
    config = TrainConfig.model_validate(
        {
            "method": {"kind": case.method, **adapter},
            "epochs": 1,
            "learning_rate": LEARNING_RATE,
            "min_learning_rate": LEARNING_RATE,
            "warmup_ratio": 0,
            "micro_batch_size": 1,
            "grad_accum_steps": 1,
            "num_processes": 1,
            "checkpoint_every": 10**9,
            "must_fit": False,
            **SWITCHES.get(args.without, {}),
        }
    )
    steps = WARMUP + args.steps
    out = args.folder / "out" / args.case
    shutil.rmtree(out, ignore_errors=True)
    train(args.folder / f"rows-{args.case}-{steps}", args.folder / "model", config, out=out, max_steps=steps)
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    timing = json.loads((out / "timing.json").read_text()) if (out / "timing.json").exists() else {}
    seen = [timing.get("memory_peak_bytes"), *(text.get("memory_bytes") for text in lines)]
    shutil.rmtree(out)
    return {
        "tokens": [text["tokens"] for text in lines],
        "seconds": [text["seconds"] for text in lines],
        "losses": [text["loss"] for text in lines],
        "mfu_of_metrics": lines[-1].get("mfu"),
        "peak_bytes": max((int(value) for value in seen if value), default=None),
        "predicted_bytes": timing.get("memory_predicted_bytes") or predicted_bytes(config, args),
        "note": ", ".join(name for name in FASTER if importlib.util.find_spec(name)),
    }


def predicted_bytes(config: Any, args: Any) -> float:
    """Return what the package predicts for full rows, with 0.6 GB for CUDA, which torch does not count."""
    import torch

    from dasd_lite.costs.hardware import Hardware
    from dasd_lite.costs.memory import predict
    from dasd_lite.costs.shape import read_shape

    on_gpu = torch.cuda.is_available()
    hardware = Hardware(
        element_bytes=2 if on_gpu else 4,
        is_float16=on_gpu and torch.cuda.get_device_capability() < (8, 0),
        varlen=on_gpu and torch.cuda.get_device_capability() >= (8, 0),
        liger=on_gpu and importlib.util.find_spec("liger_kernel") is not None,
        on_gpu=on_gpu,
    )
    shape = read_shape(args.folder / "model")
    return predict(shape, config, seq_len=seq_len_of(args.case, dry=args.dry), hardware=hardware).total


if __name__ == "__main__":
    main()
