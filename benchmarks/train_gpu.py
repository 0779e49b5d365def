"""Training a 4B student on one GPU against TRL's SFTTrainer: speed, utilisation and memory in one command.

    python benchmarks/train_gpu.py [--cases full-32k,full-64k,...] [--sides ours,trl] [--wheels FOLDER] [--json FILE]
    python benchmarks/train_gpu.py --ablate    ours also without liger, one_pass_loss, keep_attention, keep_layers
    python benchmarks/train_gpu.py --dry       the same code on a CPU with a tiny model, in two minutes

Needs torch 2.11, transformers 5.17, peft, accelerate, rich, this package and its dependencies; no network. The table
names what is missing beyond that (bitsandbytes, trl, flash-attn, liger-kernel). `--wheels FOLDER` installs the wheels
in that folder for this run only, beside the environment and without their dependencies, so that torch stays as it is:
`pip download --no-deps -d wheels trl==1.16.0 datasets dill multiprocess xxhash pandas bitsandbytes`, and whatever else
the table then names; `pip wheel --no-deps -w wheels .` adds this package. TRL may have an environment of its own:
`--their-python`, or benchmarks/.venv-trl, which bench_train.py makes.

The model has Qwen3-4B's exact shape and random weights. The lengths of documents are lognormal, median 8K, mean 13K
before they are clipped to the row, each after a masked prompt of 150 tokens, packed by pack_rows. Every step does the
same work, so a few suffice: the row of the plan whose attention cost is closest to the mean, with other ids. On both
sides: one row per step, bfloat16 under autocast over float32 weights (frozen ones: bfloat16 or NF4), fused AdamW,
gradient checkpointing over 4,096 tokens; 2 steps warm up, the median of 3 counts. Ours: the stage `train` as a
user runs it, the export included, and the seconds of its metrics.jsonl. Theirs:
train_gpu_trl.py, which describes its settings.

One formula for both, with T tokens in documents of L, H heads of D, N weights of the model in matrix products (among
them the embedding as output head), A of the adapter:

    FLOPs of a step = 6 N T                    full: forward 2, backward 4
                    = 4 N T + 6 A T            LoRA, QLoRA: no gradient of a frozen weight
                    + 6 · layers · H D · Σ L²  attention: 2 products of 2 L² H D forward, halved by causality, × 3
    MFU = FLOPs ÷ seconds ÷ the GPU's dense bfloat16 peak; what checkpointing computes again does not count

Peak memory is torch's max_memory_allocated in GB of 10⁹ bytes, and the goals are judged by it; the prediction of
costs/memory.py has 0.6 GB for CUDA on top. A run is estimated at 12 to 15 minutes on an H200 (model and rows 30 s; ten
processes that take 15 s to start and load; 60 s of our steps, 100 s of theirs; a minute for each of our checkpoints
and exports; 100 to 200 s to compile kernels);
`--minutes` ends it in time. Ours comes first, every case prints when it ends, and `--json` is rewritten each time, so
nothing is lost; it quotes the last lines of what failed. `--folder` keeps the model (8 GB) and the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_gpu_cases import CASES, RANK, SHAPE, SWITCHES, TINY, WARMUP, Result

HERE = Path(__file__).resolve().parent
MEASURED = 3


def main() -> None:
    """Make the model and rows, let both sides do every case in a process of its own, print and judge."""
    args = arguments()
    ends = time.monotonic() + 60 * args.minutes
    folder = args.folder or Path(tempfile.mkdtemp(prefix="train-gpu-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        install(args.wheels, folder)
        data = child("data", None, folder, args, 300)
        if "missing" in data:
            sys.exit(f"{data.get('log', '')}\nmodel and rows cannot be made: {data['missing']}")
        print(f"{data['device']}, torch {data['torch']}; model and rows in {data['took']:.0f} s", flush=True)
        cases: dict[str, dict[str, Result]] = {case: {} for case in args.cases}
        for side in [*args.sides, *(f"ours without {name}" for name in SWITCHES if args.ablate)]:
            for case in args.cases:
                result = measure(side, case, folder, args, ends)
                cases[case][side] = judged(result, data, case, args)
                print(f"{side:4}  {case:8}  {line(cases[case][side])}", flush=True)
                if args.json:
                    args.json.write_text(json.dumps({"machine": data, "cases": cases}, indent=1))
        report(cases, args)
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--cases", type=names, default=list(CASES), help=f"of {','.join(CASES)}")
    parser.add_argument("--sides", type=names, default=["ours", "trl"], help="of ours,trl")
    parser.add_argument("--folder", type=Path, help="keep model and rows here")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use in this run")
    parser.add_argument("--json", type=Path, help="write the raw figures to this file")
    parser.add_argument("--peak", type=float, help="the GPU's dense bfloat16 peak in TFLOP/s")
    parser.add_argument("--minutes", type=float, default=20.0, help="no case runs longer")
    parser.add_argument("--steps", type=int, default=MEASURED, help="steps that count")
    parser.add_argument("--their-python", default=None, help="the Python that has TRL")
    parser.add_argument("--their-attention", default="auto", help="attn_implementation of TRL's side")
    parser.add_argument("--ablate", action="store_true", help="ours also with each of its switches off")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args()
    for given, known in ((args.cases, CASES), (args.sides, ("ours", "trl"))):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"{', '.join(unknown)}: there is only {', '.join(known)}")
    return args


# --- processes ------------------------------------------------------------------------------------------


def install(wheels: Path | None, folder: Path) -> None:
    """Install the wheels of a folder beside the environment; one that does not fit is left out."""
    site, source = folder / "site", HERE.parent / "python"
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        done = subprocess.run([*command, "--target", str(site), str(wheel)], capture_output=True, text=True)
        if done.returncode:
            print(f"{wheel.name} left out: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}", flush=True)
    paths = [str(site)] if site.exists() else []  # from this call or an earlier one
    paths += [before] if (before := os.environ.get("PYTHONPATH")) else []
    paths += [str(source)] if list((source / "dasd_lite").glob("_rust*.so")) else []  # built here, but not installed
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def child(side: str, case: str | None, folder: Path, args: Any, seconds: float, attention: str = "auto") -> Result:
    """Run a side in a process of its own; its last line is the result, its errors go to a log."""
    side, _, without = side.partition(" without ")
    script = "train_gpu_trl.py" if side == "trl" else "train_gpu_cases.py"
    command = [their_python(folder, args) if side == "trl" else sys.executable, str(HERE / script), side]
    command += ["--folder", str(folder), "--steps", str(args.steps), "--attention", attention]
    command += ["--without", without] if without else []
    command += ["--case", case] if case else ["--cases", ",".join(args.cases)]
    env = {
        # Without it both sides lose some GB of a full GPU to fragments.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),  # the second case finds the kernels of the first
        **os.environ,
        # One GPU is measured, and TRL would refuse several.
        "CUDA_VISIBLE_DEVICES": "" if args.dry else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }
    log = folder / "logs" / f"{side}-{case or 'model'}-{without or attention.replace('/', '-')}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as errors:
        try:
            done = subprocess.run(
                command + ["--dry"] * args.dry,
                env=env,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"missing": f"not done in {seconds:.0f} s"}
    text = log.read_text(errors="replace").strip()
    try:
        result = dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        result = {"missing": f"exit code {done.returncode} {text[text.rfind(chr(10)) + 1 :][:100]}", "failed": True}
    return result | ({"log": text[-3000:]} if result.get("failed") else {})


def their_python(folder: Path, args: Any) -> str:
    """Return the Python that has TRL: the named one, ours with the wheels, bench_train.py's, or ours as it is."""
    own = HERE / ".venv-trl"
    has_own = (own / "ready").exists() and not (folder / "site" / "trl").exists()
    return args.their_python or (str(own / "bin" / "python") if has_own else sys.executable)


def measure(side: str, case: str, folder: Path, args: Any, ends: float) -> Result:
    """Let one side do one case before the time is up; if its best attention fails, with the plain one."""
    names = [args.their_attention] if side == "trl" else ["auto"]
    if side == "trl" and args.their_attention == "auto":
        names.append("sdpa")
    began, result = time.monotonic(), {"missing": "not run: the time is up"}
    for name in names:
        left = ends - time.monotonic()
        if left < 15:
            break
        result = child(side, case, folder, args, left, name)
        if not result.get("failed"):
            break
    return result | {"process_seconds": time.monotonic() - began}


# --- the figures ----------------------------------------------------------------------------------------


def flops(shape: dict[str, int], method: str, doc_lengths: list[int]) -> float:
    """Floating-point operations of a step on one row, by the formula above."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    query = shape["num_attention_heads"] * shape["head_dim"]
    key = shape["num_key_value_heads"] * shape["head_dim"]
    matrices = [(hidden, query), (hidden, key), (hidden, key), (query, hidden), *[(hidden, inner)] * 3]
    weights = layers * sum(a * b for a, b in matrices) + shape["vocab_size"] * hidden
    adapters = layers * sum(RANK * (a + b) for a, b in matrices)
    tokens = sum(doc_lengths)
    products = 6 * weights * tokens if method == "full" else (4 * weights + 6 * adapters) * tokens
    return float(products + 6 * layers * query * sum(length**2 for length in doc_lengths))


def judged(result: Result, data: Result, case: str, args: Any) -> Result:
    """Add tokens per second and MFU of the median step of those that count."""
    if "missing" in result:
        return result
    speeds = [tokens / took for tokens, took in zip(result["tokens"], result["seconds"], strict=True)]
    speed, lengths = statistics.median(speeds[WARMUP:]), data["doc_lengths"][case]
    work = flops(TINY if args.dry else SHAPE, CASES[case].method, lengths)
    peak = args.peak * 1e12 if args.peak else data["peak_flops"]
    mfu = work * speed / sum(lengths) / peak if peak else None
    return result | {"tokens_per_second": speed, "step_flops": work, "mfu": mfu}


def line(result: Result) -> str:
    """Describe one result."""
    if "missing" in result:
        return str(result["missing"])
    memory = gigabytes(result["peak_bytes"])
    if result.get("predicted_bytes"):
        memory += f" (predicted {gigabytes(result['predicted_bytes'])})"
    speed = f"{result['tokens_per_second']:,.0f} tokens/s, MFU {percent(result['mfu'])}, peak {memory}"
    return (
        f"{speed}, loss {result['losses'][-1]:.3f}, {result['process_seconds']:.0f} s in all {result['note']}".rstrip()
    )


def percent(share: float | None) -> str:
    """Write a share as it is printed."""
    return "–" if share is None else f"{100 * share:.1f} %"


def gigabytes(size: float | None) -> str:
    """Write bytes as they are printed."""
    return "–" if size is None else f"{size / 1e9:.1f} GB"


def report(cases: dict[str, dict[str, Result]], args: Any) -> None:
    """Print all cases in one table, and each goal with whether it is met."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=150)
    table = Table(
        "case", *(f"{side} {what}" for side in ("ours", "TRL") for what in ("tokens/s", "MFU", "peak")), "ratio"
    )
    for case, sides in cases.items():
        cells = []
        for side in ("ours", "trl"):
            one = sides.get(side, {"missing": "not run"})
            good = "missing" not in one
            speed = f"{one['tokens_per_second']:,.0f}" if good else one["missing"]
            cells += [speed, percent(one.get("mfu")), gigabytes(one.get("peak_bytes"))]
        ratio = ratio_of(sides)
        table.add_row(case, *cells, "–" if ratio is None else f"{ratio:.2f} ×")
    console.print(table)
    if args.ablate:
        console.print(ablation(cases))
    goals = Table("goal", "value", "")
    for goal, value, met in verdicts(cases):
        goals.add_row(goal, value, "not run" if met is None else "met" if met else "not met")
    console.print("--dry: no goal is judged by a tiny model" if args.dry else goals)


def ablation(cases: dict[str, dict[str, Result]]) -> Any:
    """Return a table of ours with each switch off, beside ours with all on."""
    from rich.table import Table

    table = Table("case", "switched off", "tokens/s", "MFU", "peak", "speed of ours with all on")
    for case, sides in cases.items():
        for name in SWITCHES:
            one = sides.get(f"ours without {name}", {"missing": "not run"})
            speeds = [side.get("tokens_per_second") for side in (sides.get("ours", {}), one)]
            gain = f"{speeds[0] / speeds[1]:.2f} ×" if all(speeds) else "–"
            speed = one.get("missing") or f"{one['tokens_per_second']:,.0f}"
            table.add_row(case, name, speed, percent(one.get("mfu")), gigabytes(one.get("peak_bytes")), gain)
    return table


def ratio_of(sides: dict[str, Result]) -> float | None:
    """Return how many times as fast ours is, if both ran."""
    speeds = [sides.get(side, {}).get("tokens_per_second") for side in ("ours", "trl")]
    return speeds[0] / speeds[1] if all(speeds) else None


def verdicts(cases: dict[str, dict[str, Result]]) -> list[tuple[str, str, bool | None]]:
    """Judge each goal: its words, the value, and whether it is met (None: not run)."""
    ours = {case: sides.get("ours", {"missing": "not run"}) for case, sides in cases.items()}

    def judge(goal: str, case: str, key: str, show: Callable[[Any], str], meets: Callable[[float], bool]) -> Any:
        one = ours.get(case, {"missing": "not run"})
        if one.get(key) is None:
            missing = one.get("missing", "not known")
            return goal, missing, False if missing == "out of memory" else None
        return goal, show(one[key]), meets(one[key])

    ratios = {case: ratio for case, sides in cases.items() if (ratio := ratio_of(sides)) is not None}
    faster = ", ".join(f"{case} {ratio:.2f} ×" for case, ratio in ratios.items()) or "not run"
    return [
        judge("MFU ≥ 45 %, full 4B, rows of 32K", "full-32k", "mfu", percent, lambda share: share >= 0.45),
        judge("MFU ≥ 33 %, LoRA 4B, rows of 32K", "lora-32k", "mfu", percent, lambda share: share >= 0.33),
        ("≥ 1.2 × TRL, in every case that both did", faster, min(ratios.values()) >= 1.2 if ratios else None),
        judge("full 4B, rows of 64K, under 141 GB", "full-64k", "peak_bytes", gigabytes, lambda size: size < 141e9),
        judge("QLoRA 4B, rows of 8K, under 8 GB", "qlora-8k", "peak_bytes", gigabytes, lambda size: size < 8e9),
        judge("LoRA 4B, rows of 16K, under 24 GB", "lora-16k", "peak_bytes", gigabytes, lambda size: size < 24e9),
    ]


if __name__ == "__main__":
    main()
