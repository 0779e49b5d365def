"""Draw the report's figures: numbers in, one SVG each out, to be placed inside an HTML page.

Invariants: text stays text and takes its font and color from the page; marks have fixed colors with a contrast of at
least 3 to white and to the page's dark ground; no external resource; no two figures share an id.
matplotlib is imported when a figure is drawn, not before.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_lite.data.records import OWN_TASK

Floats = npt.NDArray[np.float64]

_CLASSES = {"shared": "#858d97", "teacher": "#d4700f", "student": "#2f80d0"}
_ACCENT, _MUTED = "#8567e0", "#7d858e"
_PHASES = ("#0f9382", "#d8498f", "#a07f10", "#5b78e0", "#c0603e", "#77808a")
_LINES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))  # phases can be told apart without color
_SIZE = (4.1, 2.8)  # inches: 295 points wide, so 10-point text stays legible on a phone
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.8,
}


def _figure(draw: Callable[[Any], None], name: str, size: tuple[float, float] = _SIZE) -> str:
    """Draw one pair of axes as SVG; `name` salts its ids, so it must be unique on the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    svg = text.getvalue()
    # Groups are numbered from 1 in every figure and nothing refers to them.
    return re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])


def _legend_above(axes: Any, entries: int) -> Any:
    """Put the legend above the axes, where it hides nothing."""
    columns = min(entries, 3)
    return axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, columnspacing=1.2, handlelength=1.5)


def _phase_style(index: int) -> dict[str, Any]:
    return {"color": _PHASES[index % len(_PHASES)], "linestyle": _LINES[index % len(_LINES)]}


def accuracy(
    task: str, names: Sequence[str], means: Sequence[float], errors: Sequence[float], teacher: float | None = None
) -> str:
    """Draw accuracy (0 to 1) on a task with its standard error, before distillation and after each phase.

    `teacher` is the accuracy of the teacher, as a line to reach.
    """

    def draw(axes: Any) -> None:
        xs = np.arange(len(names))
        heights = 100 * np.asarray(means)
        bars = 100 * np.nan_to_num(np.asarray(errors))
        axes.plot(xs, heights, color=_MUTED, alpha=0.5, linewidth=1.5)
        axes.errorbar(xs, heights, bars, fmt="o", color=_ACCENT, capsize=4, markersize=7)
        for x, y, bar in zip(xs, heights, bars, strict=True):
            axes.annotate(f"{y:.1f}", (x, y + bar), (0, 5), textcoords="offset points", ha="center", weight="bold")
        if teacher is not None:
            axes.axhline(100 * teacher, color=_CLASSES["teacher"], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xticks(xs, names, fontsize=10)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(0, 112)
        axes.set_yticks(range(0, 101, 20))
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("accuracy, %" if task == OWN_TASK else f"accuracy on {task}, %")

    return _figure(draw, f"accuracy-{task}", (5.4, 2.9))


def plane(counts: npt.NDArray[np.int64], beta: float, name: str) -> str:
    """Draw the sentences as a 2D histogram of p_S (x) and p_T (y); counts are `[p_S bins, p_T bins]`."""

    def draw(axes: Any) -> None:
        # One color, more opaque where there are more sentences: transparency suits a light and a dark ground.
        log = np.log1p(counts.T.astype(np.float64))
        image = np.empty((*log.shape, 4))
        image[..., :3] = (0.55, 0.47, 0.85)
        image[..., 3] = np.where(log > 0, 0.12 + 0.88 * log / max(float(log.max()), 1e-9), 0.0)
        axes.imshow(image, origin="lower", extent=(0, 1, 0, 1), interpolation="none", aspect="auto")
        line = {"color": _MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
        axes.plot([0, 1 - beta], [beta, 1], **line)
        axes.plot([beta, 1], [0, 1 - beta], **line)
        axes.text(0.04, 0.95, "teacher", va="top", weight="bold")
        axes.text(0.97, 0.04, "student", ha="right", weight="bold")
        axes.grid(visible=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="p of the student", ylabel="p of the teacher")

    return _figure(draw, f"plane-{name}")


def difference(counts: npt.NDArray[np.int64], edges: Floats, beta: float, name: str) -> str:
    """Draw the histogram of p_T − p_S with ±β marked."""

    def draw(axes: Any) -> None:
        middles = (edges[1:] + edges[:-1]) / 2
        kinds = np.where(middles > beta, "teacher", np.where(middles < -beta, "student", "shared"))
        shares = 100 * counts / max(int(counts.sum()), 1)
        axes.bar(middles, shares, width=np.diff(edges), color=[_CLASSES[kind] for kind in kinds])
        low, high = (float(edges[np.flatnonzero(counts)[i]]) if counts.any() else 0.0 for i in (0, -1))
        axes.set_xlim(min(low, -2 * beta) - 0.02, max(high + 0.03, 2 * beta) + 0.02)
        for edge, text, side in ((-beta, "−β", -1), (beta, "β", 1)):
            axes.axvline(edge, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                *(text, (edge, 1), (4 * side, 0), axes.get_xaxis_transform(), "offset points"),
                ha="left" if side > 0 else "right",
                va="top",
            )
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="p of the teacher − p of the student", ylabel="sentences, %")

    return _figure(draw, f"difference-{name}")


def positions(candidates: npt.NDArray[np.int64], kept: npt.NDArray[np.int64] | None, name: str) -> str:
    """Draw the share of each class by sentence position: the kept answers solid, all candidates dashed."""

    def draw(axes: Any) -> None:
        answers = candidates.sum(axis=1)  # that have a sentence at each position
        last = int(np.flatnonzero(answers >= max(0.1 * answers[0], 1))[-1]) + 1  # at least a tenth of them do
        width = -(-last // 30)
        for table, line in ((candidates, (0, (4, 2))), (kept, "-")):
            if table is None:
                continue
            binned = np.add.reduceat(table[:last], np.arange(0, last, width), axis=0)
            shares = 100 * binned / np.maximum(binned.sum(axis=1, keepdims=True), 1)
            middles = 1 + (width - 1) / 2 + width * np.arange(len(binned))
            for column, (kind, color) in enumerate(_CLASSES.items()):
                label = kind if table is candidates else None
                axes.plot(middles, shares[:, column], color=color, linestyle=line, label=label, linewidth=1.6)
        axes.set(xlabel="position of the sentence in its answer", ylabel="share of class, %", ylim=(0, 103))
        axes.set_xlim(0.5, max(last, 2) + 0.5)
        for handle in _legend_above(axes, 3).get_lines():
            handle.set_linestyle("-")

    return _figure(draw, f"positions-{name}")


def densities(series: Sequence[tuple[str, Floats]]) -> str:
    """Draw the density of the answers' geometric-mean token probability (paper Fig. 3a)."""

    def draw(axes: Any) -> None:
        low = min(float(np.quantile(values, 0.005)) for _, values in series)
        edges = np.linspace(max(low - 0.02, 0), 1, 60)
        for i, (label, values) in enumerate(series):
            _outline(axes, values, edges, label, i)
        axes.set(xlabel="geometric mean of an answer's token probabilities", ylabel="density", ylim=(0, None))
        _legend_above(axes, len(series))

    return _figure(draw, "densities")


def lengths(series: Sequence[tuple[str, Floats]]) -> str:
    """Draw the density of the answers' lengths."""

    def draw(axes: Any) -> None:
        top = max(float(values.max()) for _, values in series)
        log = top > 4000  # lengths span orders of magnitude
        low = max(min(float(values.min()) for _, values in series), 1)
        edges = (
            np.geomspace(low, top + 1, 50)
            if log
            else np.linspace(max(low - 0.05 * (top - low), 0), top + 0.05 * (top - low) + 1, 50)
        )
        for i, (label, values) in enumerate(series):
            _outline(axes, values, edges, label, i)
        axes.set_xscale("log" if log else "linear")
        axes.set(xlabel="answer length in tokens of the student", ylabel="density", ylim=(0, None), yticks=[])
        _legend_above(axes, len(series))

    return _figure(draw, "lengths")


def _outline(axes: Any, values: Floats, edges: Floats, label: str, index: int) -> None:
    """Draw a slightly smoothed histogram as a line."""
    density = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values) / np.diff(edges)
    smooth = np.convolve(np.pad(density, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")
    middles, style = (edges[1:] + edges[:-1]) / 2, _phase_style(index)
    axes.plot(middles, smooth, label=label, **style)
    axes.fill_between(middles, smooth, color=style["color"], alpha=0.1, linewidth=0)


def training(curves: Sequence[tuple[str, Floats, Floats]], name: str, ylabel: str) -> str:
    """Draw a quantity over the optimizer steps of all phases, one phase after another."""

    def draw(axes: Any) -> None:
        first = 0.0
        for i, (label, steps, values) in enumerate(curves):
            axes.plot(first + steps, values, label=label, color=_phase_style(i)["color"])
            first += float(steps[-1])
            if i + 1 < len(curves):
                axes.axvline(first + 0.5, color=_MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.set(xlabel="optimizer step", ylabel=ylabel)
        axes.set_ylim(bottom=0)
        _legend_above(axes, len(curves))

    return _figure(draw, name)


def cut_off(lengths: Floats, cut: npt.NDArray[np.bool_], name: str) -> str:
    """Draw the share of the student's answers that reached the length limit, by the teacher's length (paper Fig. 7)."""

    def draw(axes: Any) -> None:
        bins = min(8, max(len(lengths) // 25, 1))
        for part in np.array_split(np.argsort(lengths, kind="stable"), bins):
            share = float(cut[part].mean())
            smoothed = (cut[part].sum() + 1) / (len(part) + 2)  # 0 of a few answers is not a certain 0 %
            error = np.sqrt(smoothed * (1 - smoothed) / len(part))
            axes.errorbar(float(lengths[part].mean()), 100 * share, 100 * error, fmt="o", color=_ACCENT, capsize=3)
        axes.set(xlabel="tokens in the teacher's answer (groups of equal size)", ylabel="cut off, %")
        axes.set_ylim(0, min(max(axes.get_ylim()[1], 10), 103))

    return _figure(draw, f"cut-off-{name}")
