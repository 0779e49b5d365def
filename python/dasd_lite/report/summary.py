"""One line per finished stage: how many, how fast, how well.

Input: a finished folder and its manifest. Output: text. Invariant: every figure is read from the
folder, none is computed anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dasd_lite.data.manifest import read_timing

if TYPE_CHECKING:
    from rich.table import Table


def summary(folder: Path, manifest: dict[str, Any]) -> str:
    """Say what a stage made, in one line."""
    counts, timing = manifest["counts"], read_timing(folder)
    if inner := _INNER.get(manifest["stage"]):  # another model's part is a folder of its own
        timing["seconds"] += read_timing(folder / inner).get("seconds", 0)
    parts = _PARTS[manifest["stage"]](counts, timing)
    if manifest["stage"] == "train" and manifest["config"]["method"]["kind"] != "full":
        parts.append(f"merged to within {counts['export_gap']:.1e} nat")
    return ", ".join([*parts, f"{timing.get('seconds', 0):.1f} s"])


def rejections(manifest: dict[str, Any]) -> Table | None:
    """Return what select's filters rejected as a table; none when there is nothing, or another stage's manifest."""
    from rich.table import Table

    counts = manifest["counts"]
    rejected = {r: n for r, n in counts.get("rejected", {}).items() if r not in ("rank", "budget")}
    if manifest["stage"] != "select" or not rejected:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("  rejected by a filter")
    for name in ("number", "share", "value from", "to"):
        table.add_column(name, justify="right")
    for reason, number in rejected.items():
        low, high = counts["rejected_values"][reason]
        table.add_row(f"  {reason}", f"{number:,}", f"{number / counts['rollouts']:.1%}", _figure(low), _figure(high))
    return table


def _figure(value: float) -> str:
    """Write a count of tokens whole, and a share with three digits."""
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _rate(timing: dict[str, float]) -> list[str]:
    rate = [f"{timing['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in timing else []
    rate += [f"{timing['left_out']:,.0f} left out"] if "left_out" in timing else []
    return rate + ([f"cost {timing['cost']:,.2f}"] if "cost" in timing else [])


def _sample(counts: dict[str, Any], timing: dict[str, float]) -> list[str]:
    return [f"{counts['rollouts']:,} rollouts of {counts['prompts']:,} prompts", *_rate(timing)]


def _score(counts: dict[str, Any], timing: dict[str, float]) -> list[str]:
    over = [f"{counts['over_context']:,} over the student's context"] if counts.get("over_context") else []
    return [f"{counts['rollouts']:,} rollouts", *over, *_rate(timing)]


def _select(counts: dict[str, Any], timing: dict[str, float]) -> list[str]:
    reasons = [f"{name} {number:,}" for name, number in counts["rejected"].items()]
    kept = [f"kept {counts['kept']:,} of {counts['rollouts']:,} (rejected: {', '.join(reasons) or 'none'})"]
    if "lam" not in counts:
        return kept
    share = counts["effective_sample_size"]
    told = "no prompt with two kept" if share is None else f"effective sample size {share:.2f} of k"
    return [*kept, f"λ {counts['lam']:.3g}", told]


def _pack(counts: dict[str, Any], timing: dict[str, float]) -> list[str]:
    return [f"{counts['rollouts']:,} rollouts in {counts['rows']:,} rows, {counts['fill']:.1%} full"]


def _train(counts: dict[str, Any], timing: dict[str, float]) -> list[str]:
    loss = f"loss {counts['first_loss']:.3f} → {counts['final_loss']:.3f}"
    utilisation = [f"MFU {timing['mfu']:.0%}"] if "mfu" in timing else []
    looks = [f"watched {watched(counts['watched'])}"] if counts.get("watched") else []
    return [f"{counts['steps']:,} steps", loss, *looks, *_memory(timing), *utilisation, *_rate(timing)]


def watched(looks: Sequence[Mapping[str, Any]]) -> str:
    """Say how many answers were right when training was watched, before it and after."""
    return f"{looks[0]['right']} → {looks[-1]['right']} of {looks[-1]['questions']} right"


def _memory(timing: dict[str, float]) -> list[str]:
    """The truth beside the prediction; on a CPU all of the process, of which training is a part."""
    predicted = timing.get("memory_predicted_bytes", 0.0) / 1e9
    if "memory_peak_bytes" in timing:
        return [f"peak {timing['memory_peak_bytes'] / 1e9:,.1f} GB ({predicted:,.1f} predicted)"]
    if "process_peak_bytes" in timing:
        return [
            f"process at most {timing['process_peak_bytes'] / 1e9:,.1f} GB ({predicted:,.1f} predicted for training)"
        ]
    return []


def _mix(counts: dict[str, Any], timing: dict[str, float]) -> list[str]:
    return [
        f"{counts['cut_off']:,} of {counts['prompts']:,} student answers cut off and ended by the teacher",
        *_rate(timing),
    ]


def _evaluate(counts: dict[str, Any], timing: dict[str, float]) -> list[str]:
    return [
        f"accuracy {counts['accuracy']:.3f} ± {counts['standard_error']:.3f}"
        f" ({counts['questions']:,} questions × {counts['samples'] // counts['questions']})",
        f"unparseable {counts['unparseable']:,}",
        f"truncated {counts['truncated']:,}",
        *_rate(timing),
    ]


_INNER = {"mix": "student", "score": "teacher"}
_PARTS = {
    "sample": _sample,
    "ingest": _sample,
    "score": _score,
    "select": _select,
    "pack": _pack,
    "train": _train,
    "mix": _mix,
    "evaluate": _evaluate,
}
