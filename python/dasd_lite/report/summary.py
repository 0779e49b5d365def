"""One line per finished stage: how many, how fast, how good.

Input: a finished folder. Output: text. Invariant: every figure comes from results.py, as those of the report do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dasd_lite.report.results import StageFigures, read_accuracy, read_curve, read_figures
from dasd_lite.report.tables import monitored, with_error

if TYPE_CHECKING:
    from rich.table import Table


def summary(folder: Path) -> str:
    """Describe in one line what a finished stage made and what it took."""
    figures = read_figures(folder)
    parts = _PARTS.get(figures.stage, _counts)(figures)
    parts += [f"{figures.tokens_per_second:,.0f} tokens/s"] if figures.tokens_per_second is not None else []
    parts += [f"{figures.timing['skipped']:,.0f} skipped"] if "skipped" in figures.timing else []
    parts += [f"cost {figures.timing['cost']:,.2f}"] if "cost" in figures.timing else []
    parts += [f"{figures.seconds:.1f} s"] if figures.seconds is not None else []
    return ", ".join(parts)


def rejections(manifest: dict[str, Any]) -> Table | None:
    """Return a table of what the filters of `select` rejected; None if nothing, or for another stage's manifest."""
    from rich.table import Table

    counts = manifest["counts"]
    rejected = {reason: n for reason, n in counts.get("rejected", {}).items() if reason not in ("rank", "budget")}
    if manifest["stage"] != "select" or not rejected:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("  rejected by a filter")
    for name in ("number", "share", "value from", "to"):
        table.add_column(name, justify="right")
    for reason, number in rejected.items():
        low, high = counts["rejected_values"][reason]
        table.add_row(f"  {reason}", f"{number:,}", f"{number / counts['rollouts']:.1%}", _value(low), _value(high))
    return table


def _value(value: float) -> str:
    """Format a count of tokens as an integer and a share with three digits."""
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _counts(figures: StageFigures) -> list[str]:
    """Name the counts as they are: for a stage that has no words of its own."""
    return [f"{name} {number:,}" for name, number in figures.counts.items() if isinstance(number, int | float)]


def _sample(figures: StageFigures) -> list[str]:
    return [f"{figures.counts['rollouts']:,} rollouts of {figures.counts['prompts']:,} prompts"]


def _score(figures: StageFigures) -> list[str]:
    too_long = figures.counts.get("over_context")
    over = [f"{too_long:,} longer than the student's context"] if too_long else []
    return [f"{figures.counts['rollouts']:,} rollouts", *over]


def _select(figures: StageFigures) -> list[str]:
    counts = figures.counts
    reasons = [f"{name} {number:,}" for name, number in counts["rejected"].items()]
    kept = [f"kept {counts['kept']:,} of {counts['rollouts']:,} (rejected: {', '.join(reasons) or 'none'})"]
    if "lam" not in counts:
        return kept
    share = counts["effective_sample_size"]
    size = "no prompt with two kept answers" if share is None else f"effective sample size {share:.2f} of k"
    return [*kept, f"λ {counts['lam']:.3g}", size]


def _pack(figures: StageFigures) -> list[str]:
    counts = figures.counts
    return [f"{counts['rollouts']:,} rollouts in {counts['rows']:,} rows, {counts['fill']:.1%} full"]


def _train(figures: StageFigures) -> list[str]:
    counts, timing, curve = figures.counts, figures.timing, read_curve(figures.folder)
    parts = [f"{counts['steps']:,} steps"]
    parts += [f"loss {curve.first_loss:.3f} → {curve.last_loss:.3f}"] if curve is not None else []
    parts += [f"monitored {monitored(counts['monitored'])}"] if counts.get("monitored") else []
    # On a CPU the peak is that of the whole process, of which training is only a part.
    predicted = f"{timing.get('memory_predicted_bytes', 0.0) / 1e9:,.1f}"
    if "memory_peak_bytes" in timing:
        parts.append(f"peak {timing['memory_peak_bytes'] / 1e9:,.1f} GB ({predicted} predicted)")
    elif "process_peak_bytes" in timing:
        parts.append(f"process peak {timing['process_peak_bytes'] / 1e9:,.1f} GB ({predicted} predicted for training)")
    parts += [f"MFU {timing['mfu']:.0%}"] if "mfu" in timing else []
    if figures.manifest["config"]["method"]["kind"] != "full":
        parts.append(f"merged to within {counts['export_gap']:.1e} nat")
    return parts


def _mix(figures: StageFigures) -> list[str]:
    counts = figures.counts
    return [f"{counts['cut_off']:,} of {counts['prompts']:,} student answers cut off and finished by the teacher"]


def _evaluate(figures: StageFigures) -> list[str]:
    accuracy = read_accuracy(figures.folder).overall
    samples = accuracy.samples // accuracy.questions
    return [
        f"accuracy {with_error(accuracy)}% ({accuracy.questions:,} questions × {samples})",
        f"unparseable {accuracy.unparseable / accuracy.samples:.1%}",
        f"truncated {accuracy.truncated / accuracy.samples:.1%}",
    ]


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
