"""Ablations on models of the demo's size: schedule, selection rule, mixed policy, on the validation questions.

    OMP_NUM_THREADS=1 python benchmarks/ablate_demo.py [--seeds 3] [--folder runs/ablation]

Every variant is the demo's recipe with a few keys changed. Variants reuse the answers and scores of those before them.
Prints the Markdown table of docs/evidence.md: accuracies at
T=1, mean over seeds ± standard deviation.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import dasd_lite
from dasd_lite.config.load import load_recipe
from dasd_lite.config.stages import Phase
from dasd_lite.data.manifest import read_manifest
from dasd_lite.run.pipeline import plan, run_steps

RECIPE = Path(dasd_lite.__file__).parent / "recipes" / "demo.toml"
LOW, HIGH, MIXED = 0, 1, 2
VARIANTS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "low only": ([LOW], {}),
    "high only": ([HIGH], {}),
    "low → high": ([LOW, HIGH], {}),
    "high → low": ([HIGH, LOW], {}),
    "low → high → mixed": ([LOW, HIGH, MIXED], {}),
    **{
        f"low → high, rule {rule}": ([LOW, HIGH], {"rule": rule})
        for rule in ("ratio", "length_matched", "rsr", "likelihood", "fewest", "longest", "shortest", "random")
    },
}


def main() -> None:
    """Run all variants for all seeds and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for name, (phases, select) in VARIANTS.items():
            results.setdefault(name, []).append(run(options.folder / f"seed{seed}", name, phases, select, seed))
            print(f"seed {seed}: {name}: {results[name][-1]}", flush=True)
    print("\n| variant | before | after | mean tokens of the chosen answers, last sampled phase |\n|---|---|---|---|")
    for name, runs in results.items():
        cells = (spread([r[key] for r in runs], digits) for key, digits in (("before", 3), ("after", 3), ("tokens", 1)))
        print(f"| {name} | {' | '.join(cells)} |")


def spread(values: list[float], digits: int) -> str:
    """Write mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def run(folder: Path, name: str, phase_numbers: list[int], select: dict[str, Any], seed: int) -> dict[str, float]:
    """Run one variant; return its accuracies and the mean length of the kept answers in tokens."""
    demo = load_recipe(RECIPE, ['evaluate.prompts="demo:validation.jsonl"', f"seed={seed}"])
    out = folder / "".join(c if c.isalnum() else "-" for c in name)
    others = [path for path in sorted(folder.glob("*")) if path != out]
    phases = [with_selection(demo.phase[number], select) for number in phase_numbers]
    recipe = demo.model_copy(update={"out": out, "phase": phases, "reuse": others})
    run_steps(recipe)
    manifests = {step.name: read_manifest(step.path) for step in plan(recipe)}
    sampled = [p.name for p in phases if p.source == "sample"][-1]
    return {
        "before": manifests["base/evaluate"]["counts"]["accuracy"],
        "after": manifests[f"{phases[-1].name}/evaluate"]["counts"]["accuracy"],
        "tokens": manifests[f"{sampled}/select"]["counts"]["mean_tokens_kept"],
    }


def with_selection(phase: Phase, select: dict[str, Any]) -> Phase:
    """Return the phase with these selection settings; a mixed phase keeps its own."""
    if phase.source == "mix":
        return phase
    return phase.model_copy(update={"select": phase.select.model_copy(update=select)})


if __name__ == "__main__":
    main()
