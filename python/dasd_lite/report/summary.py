"""One line per finished stage: how many, how fast, how good.

Input: a finished folder. Output: text. Invariant: every figure comes from results.py, as those of the report do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dasd_lite.config.stages import CLASS_RULES
from dasd_lite.costs.estimate import format_bytes
from dasd_lite.data.records import OWN_TASK
from dasd_lite.grading.grade import VERDICTS
from dasd_lite.grading.rollouts import REASONS
from dasd_lite.grading.statistics import Accuracy
from dasd_lite.report.accuracy_tables import interval, with_error
from dasd_lite.report.results import StageResult, read_accuracy, read_curve, read_result
from dasd_lite.report.tables import DASH, monitored

_FEW = 0.1  # share of sentences in the rarer kind, below which a count of them is a count of all
_STRONG = 0.8  # a rank correlation
_MANY = 0.3  # share of questions

if TYPE_CHECKING:
    from rich.table import Table


def summary(folder: Path) -> str:
    """Describe in one line what a finished stage made and what it took."""
    result = read_result(folder)
    parts = _PARTS.get(result.stage, _counts)(result)
    parts += [f"{result.tokens_per_second:,.0f} tokens/s"] if result.tokens_per_second is not None else []
    parts += [f"{result.timing['skipped']:,.0f} skipped"] if "skipped" in result.timing else []
    parts += [f"cost {result.timing['cost']:,.2f}"] if "cost" in result.timing else []
    parts += [f"{result.seconds:.1f} s"] if result.seconds is not None else []
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
        values = (DASH, DASH) if reason in REASONS else (_value(low), _value(high))
        table.add_row(f"  {reason}", f"{number:,}", f"{number / counts['rollouts']:.1%}", *values)
    return table


def warnings(manifest: dict[str, Any]) -> list[str]:
    """Return what is worth a second look in what a stage made, a line each."""
    return [line for line in (teacher_warning(manifest), rule_warning(manifest)) if line is not None]


def teacher_warning(manifest: dict[str, Any]) -> str | None:
    """Return a line about a teacher that is right on few questions; None if it is not, or nobody knows."""
    if manifest["stage"] != "select":
        return None
    grades, required = manifest["counts"]["grades"], manifest["config"].get("require_right")
    right, questions = grades["questions_right"], grades["questions"]
    if 2 * right >= questions or manifest["counts"].get("mixed"):  # mixed policy asks what the student got wrong
        return None
    what = "; select.require_right = 'where_known' would leave wrong answers out" if right and required == "no" else ""
    return (
        f"  the teacher has a right answer to {right:,} of {questions:,} questions whose answer is known, fewer than"
        f" half{what}"
    )


def rule_warning(manifest: dict[str, Any]) -> str | None:
    """Return a line about a selection rule that decides little, or something else than it says; None if all is well."""
    measured, rule = manifest["counts"].get("choice"), manifest["config"].get("rule")
    if manifest["stage"] != "select" or not measured or not measured["questions"]:
        return None
    correlation, share = measured["length_correlation"] or 0.0, measured["teacher_share"]
    lines = []
    if rule in CLASS_RULES and share is not None and not _FEW <= share <= 1 - _FEW:
        lines.append(f"{share:.0%} of all sentences are teacher sentences, so they hardly tell answers apart")
    if rule not in ("longest", "shortest") and abs(correlation) >= _STRONG:
        way = "long" if correlation > 0 else "short"
        lines.append(f"it prefers {way} answers (rank correlation with length {correlation:+.2f})".replace("-", "−"))
    for name, words in (("tied", "the best scores are equal"), ("could_flip", "engine noise could change the choice")):
        if (measured[name] or 0.0) >= _MANY:
            lines.append(f"{words} in {measured[name]:.0%} of the questions")
    return f"  rule {rule!r}: {'; '.join(lines)}" if lines else None


def _value(value: float) -> str:
    """Format a count of tokens as an integer and a share with three digits."""
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _counts(result: StageResult) -> list[str]:
    """Name the counts as they are: for a stage that has no words of its own."""
    return [f"{name} {number:,}" for name, number in result.counts.items() if isinstance(number, int | float)]


def _sample(result: StageResult) -> list[str]:
    return [f"{result.counts['rollouts']:,} rollouts of {result.counts['prompts']:,} prompts"]


def _ingest(result: StageResult) -> list[str]:
    logprobs = result.counts.get("logprobs")
    return [*_sample(result), *([f"{logprobs['aligned']:,} with log-probabilities"] if logprobs else [])]


def _score(result: StageResult) -> list[str]:
    too_long = result.counts.get("over_context")
    over = [f"{too_long:,} longer than the student's context"] if too_long else []
    return [f"{result.counts['rollouts']:,} rollouts", *over]


def _select(result: StageResult) -> list[str]:
    counts = result.counts
    reasons = [f"{name} {number:,}" for name, number in counts["rejected"].items()]
    kept = [f"kept {counts['kept']:,} of {counts['rollouts']:,} (rejected: {', '.join(reasons) or 'none'})"]
    if lost := counts.get("prompts_lost"):
        kept.append(f"{lost:,} of {counts['prompts']:,} questions lost all their candidates")
    grades = counts["grades"]
    if grades["graded"]:
        kept.append(f"{grades.get('right', 0) / grades['graded']:.1%} of {grades['graded']:,} graded answers right")
    if "lam" not in counts:
        return kept
    share = counts["effective_sample_size"]
    size = "no prompt with two kept answers" if share is None else f"effective sample size {share:.2f} of k"
    return [*kept, f"λ {counts['lam']:.3g}", size]


def _pack(result: StageResult) -> list[str]:
    counts = result.counts
    return [f"{counts['rollouts']:,} rollouts in {counts['rows']:,} rows, {counts['fill']:.1%} full"]


def _train(result: StageResult) -> list[str]:
    counts, timing, curve = result.counts, result.timing, read_curve(result.folder)
    parts = [f"{counts['steps']:,} steps"]
    parts += [f"loss {curve.first_loss:.3f} → {curve.last_loss:.3f}"] if curve is not None else []
    parts += [f"monitored {monitored(counts['monitored'])}"] if counts.get("monitored") else []
    # On a CPU the peak is that of the whole process, of which training is only a part.
    known = timing.get("memory_predicted_bytes")
    predicted = "none" if known is None else format_bytes(known)
    if "memory_peak_bytes" in timing:
        parts.append(f"peak {format_bytes(timing['memory_peak_bytes'])} ({predicted} predicted)")
    elif "process_peak_bytes" in timing:
        parts.append(f"process peak {format_bytes(timing['process_peak_bytes'])} ({predicted} predicted for training)")
    parts += [f"MFU {timing['mfu']:.0%}"] if "mfu" in timing else []
    if result.manifest["config"]["method"]["kind"] != "full":
        parts.append(f"merged to within {counts['export_gap_mean']:.1e} nat")
    return parts


def _mix(result: StageResult) -> list[str]:
    counts, rescue = result.counts, result.manifest["config"].get("rescue", "cut_off")
    kinds = [f"{counts['cut_off']:,} cut off"] if rescue == "either" else []
    kinds += [f"{counts['wrong']:,} wrong"] if rescue != "cut_off" else []
    ungraded = [f"{counts['ungraded']:,} cannot be graded"] if counts.get("ungraded") else []
    if kinds:
        what = " and ".join(kinds)
        return [
            f"{what} of {counts['prompts']:,} student answers, {counts['rollouts']:,} finished by the teacher",
            *ungraded,
        ]
    return [f"{counts['cut_off']:,} of {counts['prompts']:,} student answers cut off and finished by the teacher"]


def _evaluate(result: StageResult) -> list[str]:
    """Describe the accuracy on each task: that on one's own questions without its name."""
    return [part for task, own in read_accuracy(result.folder).tasks.items() for part in _accuracy(task, own)]


def _accuracy(task: str, own: Accuracy) -> list[str]:
    name = "accuracy" if task == OWN_TASK else task
    answers = own.num_answers
    shares = {verdict.replace("_", " "): own.verdicts.get(verdict, 0) for verdict in VERDICTS[2:]}
    counted = f"{own.num_questions:,} questions × {own.k}"
    measured = f"{with_error(own)}% (standard error over {counted})"
    if own.mean in (0.0, 1.0) and own.num_questions > 1:  # no error of 0 follows from that
        measured = f"{100 * own.mean:.1f}% (95% interval {interval(own.interval())} over {counted})"
    return [
        f"{name} {measured}",
        *(f"{verdict} {number / answers:.1%}" for verdict, number in shares.items() if number),
        f"cut off {own.truncated / answers:.1%}",
        f"mean length {own.tokens / answers:,.1f} tokens",
    ]


_PARTS = {
    "sample": _sample,
    "ingest": _ingest,
    "score": _score,
    "select": _select,
    "pack": _pack,
    "train": _train,
    "mix": _mix,
    "evaluate": _evaluate,
}
