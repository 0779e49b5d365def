"""What shows on models of the demo's size: schedule, selection rule, mixed policy, on the validation questions.

    OMP_NUM_THREADS=1 python benchmarks/ablate_demo.py [--seeds 3] [--folder runs/ablation]

Every variant is the demo's recipe with a few keys changed. Teacher samples and scores are shared: a
folder with the same fingerprint is copied, not made again. Prints a Markdown table of accuracies at
T=1, mean over seeds ± standard deviation, which docs/evidence.md holds.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import dasd_lite
from dasd_lite.config.load import load_recipe
from dasd_lite.config.stages import Phase, RecipeConfig
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
    "low → high, rule ratio": ([LOW, HIGH], {"rule": "ratio"}),
    "low → high, rule length_matched": ([LOW, HIGH], {"rule": "length_matched"}),
    "low → high, rule random": ([LOW, HIGH], {"rule": "random"}),
}


def main() -> None:
    """Run all variants for all seeds and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for name, (phases, select) in VARIANTS.items():
            found.setdefault(name, []).append(run(options.folder / f"seed{seed}", name, phases, select, seed))
            print(f"seed {seed}: {name}: {found[name][-1]}", flush=True)
    print("\n| variant | before | after | chosen answers' mean tokens, last sampled phase |\n|---|---|---|---|")
    for name, runs in found.items():
        cells = (spread([r[key] for r in runs], digits) for key, digits in (("before", 3), ("after", 3), ("tokens", 1)))
        print(f"| {name} | {' | '.join(cells)} |")


def spread(values: list[float], digits: int) -> str:
    """Write mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def run(folder: Path, name: str, numbers: list[int], select: dict[str, Any], seed: int) -> dict[str, float]:
    """Run one variant; return the accuracies and the mean length of what was chosen."""
    demo = load_recipe(RECIPE, ['evaluate.prompts="demo:validation.jsonl"', f"seed={seed}"])
    out = folder / "".join(c if c.isalnum() else "-" for c in name)
    phases = [changed(demo.phase[number], select) for number in numbers]
    small = demo.model_copy(update={"out": out, "phase": phases})
    share(small, folder / "shared")
    run_steps(small)
    keep(small, folder / "shared")
    manifests = {step.name: read_manifest(step.folder) for step in plan(small)}
    sampled = [p.name for p in phases if p.source == "sample"][-1]
    return {
        "before": manifests["base/evaluate"]["counts"]["accuracy"],
        "after": manifests[f"{phases[-1].name}/evaluate"]["counts"]["accuracy"],
        "tokens": manifests[f"{sampled}/select"]["counts"]["mean_tokens_kept"],
    }


def changed(phase: Phase, select: dict[str, Any]) -> Phase:
    """Return the phase with other selection settings; a mixed one keeps its own."""
    if phase.source == "mix":
        return phase
    return phase.model_copy(update={"select": phase.select.model_copy(update=select)})


def shareable(small: RecipeConfig) -> list[Path]:
    """Return the folders, relative to the run's, that do not depend on the variant."""
    names = [Path(p.name) / stage for p in small.phase if p.source == "sample" for stage in ("sample", "score")]
    return [Path("base") / "evaluate", *names]


def share(small: RecipeConfig, shared: Path) -> None:
    """Put what an earlier variant made into this one's folder."""
    for name in shareable(small):
        if (shared / name).exists() and not (small.out / name).exists():
            shutil.copytree(shared / name, small.out / name)


def keep(small: RecipeConfig, shared: Path) -> None:
    """Keep what later variants can use."""
    for name in shareable(small):
        if (small.out / name).exists() and not (shared / name).exists():
            shutil.copytree(small.out / name, shared / name)


if __name__ == "__main__":
    main()
