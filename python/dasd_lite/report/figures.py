"""Draw the report's figures: numbers in, one SVG each out, to stand in the middle of an HTML page.

Invariants: text stays text; no resource from elsewhere; every colour is a variable of the page's style
(`--ink`, `--teacher`, …), so that one drawing reads well on a light and on a dark ground; no two
figures of a page share an id. matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# matplotlib wants real colours: each variable of the page has a stand-in that occurs nowhere else.
_VARIABLES = ("ink", "muted", "grid", "shared", "teacher", "student", "none", "accent", "paper")
_PHASES = 6
_STAND_IN = {name: f"#00fe{i:02x}" for i, name in enumerate((*_VARIABLES, *(f"phase{i}" for i in range(_PHASES))))}
_LINES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))  # told apart without colours as well
_SIZE = (4.1, 2.8)  # inches: 295 points wide, so that type of 10 points stays legible on a phone


def _figure(draw: Callable[[Any], None], name: str, label: str, size: tuple[float, float] = _SIZE) -> str:
    """Draw one pair of axes and return it as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.parse_math": False,
        "text.color": _STAND_IN["ink"],
        "axes.labelcolor": _STAND_IN["muted"],
        "axes.edgecolor": _STAND_IN["muted"],
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _STAND_IN["muted"],
        "ytick.color": _STAND_IN["muted"],
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _STAND_IN["grid"],
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "legend.handlelength": 1.8,
        "lines.linewidth": 1.8,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    return _inline(text.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> str:
    """Make a drawing fit to stand in a page: no prolog, ids of its own, the page's colours and type."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"font: (?:[a-z]+ )?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    for variable, colour in _STAND_IN.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'<svg([^>]*?) width="[^"]+"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]+"', r"<svg\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _legend_above(axes: Any, entries: int) -> Any:
    """Put the legend over the axes, where it hides nothing."""
    columns = min(entries, 3)
    return axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, columnspacing=1.2, handlelength=1.5)


def _phase_style(index: int) -> dict[str, Any]:
    return {"color": _STAND_IN[f"phase{index % _PHASES}"], "linestyle": _LINES[index % len(_LINES)]}


def accuracy(names: Sequence[str], means: Sequence[float], errors: Sequence[float]) -> str:
    """Draw accuracy with its standard error before distillation and after each phase."""

    def draw(axes: Any) -> None:
        places = np.arange(len(names))
        heights = 100 * np.asarray(means)
        reach = 100 * np.nan_to_num(np.asarray(errors))
        axes.plot(places, heights, color=_STAND_IN["grid"], linewidth=1.5)
        axes.errorbar(places, heights, reach, fmt="o", color=_STAND_IN["accent"], capsize=4, markersize=7)
        for x, y, e in zip(places, heights, reach, strict=True):
            axes.annotate(f"{y:.1f}", (x, y + e), (0, 5), textcoords="offset points", ha="center", weight="bold")
        axes.set_xticks(places, names, fontsize=10)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(0, 112)
        axes.set_yticks(range(0, 101, 20))
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("accuracy, %")

    return _figure(draw, "accuracy", "Accuracy with standard error before and after each phase", (5.4, 2.9))


def plane(counts: npt.NDArray[np.int64], beta: float, name: str) -> str:
    """Draw how many sentences have which p_S (right) and p_T (up)."""

    def draw(axes: Any) -> None:
        # One colour, more opaque where more sentences are: an image with its own alpha suits any ground.
        shown = np.log1p(counts.T.astype(np.float64))
        alpha = np.where(counts.T > 0, 0.12 + 0.88 * shown / max(float(shown.max()), 1e-9), 0.0)
        image = np.zeros((*alpha.shape, 4))
        image[..., :3] = (0.55, 0.47, 0.85)
        image[..., 3] = alpha
        axes.imshow(image, origin="lower", extent=(0, 1, 0, 1), interpolation="none", aspect="auto")
        line = {"color": _STAND_IN["muted"], "linewidth": 1, "linestyle": (0, (4, 3))}
        axes.plot([0, 1 - beta], [beta, 1], **line)
        axes.plot([beta, 1], [0, 1 - beta], **line)
        axes.text(0.04, 0.95, "teacher", color=_STAND_IN["teacher"], va="top", weight="bold")
        axes.text(0.97, 0.04, "student", color=_STAND_IN["student"], ha="right", weight="bold")
        axes.grid(visible=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="p of the student", ylabel="p of the teacher")

    return _figure(draw, f"plane-{name}", f"Sentences by the student's and the teacher's probability, phase {name}")


def difference(counts: npt.NDArray[np.int64], edges: Floats, beta: float, name: str) -> str:
    """Draw the histogram of p_T − p_S with ±β marked."""

    def draw(axes: Any) -> None:
        middles = (edges[1:] + edges[:-1]) / 2
        kinds = np.where(middles > beta, "teacher", np.where(middles < -beta, "student", "shared"))
        shares = 100 * counts / max(int(counts.sum()), 1)
        axes.bar(middles, shares, width=np.diff(edges), color=[_STAND_IN[kind] for kind in kinds])
        low, high = (float(edges[np.flatnonzero(counts)[i]]) if counts.any() else 0.0 for i in (0, -1))
        axes.set_xlim(min(low, -2 * beta) - 0.02, max(high + 0.03, 2 * beta) + 0.02)
        for edge, text, side in ((-beta, "−β", -1), (beta, "β", 1)):
            axes.axvline(edge, color=_STAND_IN["muted"], linewidth=1, linestyle=(0, (4, 3)))
            place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate(text, (edge, 1), (4 * side, 0), ha="left" if side > 0 else "right", va="top", **place)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="p of the teacher − p of the student", ylabel="sentences, %")

    return _figure(draw, f"difference-{name}", f"Histogram of p_T − p_S, phase {name}")


def positions(candidates: npt.NDArray[np.int64], kept: npt.NDArray[np.int64] | None, name: str) -> str:
    """Draw the share of each class by sentence position: the kept answers solid, all candidates dashed."""

    def draw(axes: Any) -> None:
        reached = candidates.sum(axis=1)
        last = int(np.flatnonzero(reached >= max(0.1 * reached[0], 1))[-1]) + 1  # a tenth of the answers get there
        width = -(-last // 30)
        for table, line in ((candidates, (0, (4, 2))), (kept, "-")):
            if table is None:
                continue
            binned = np.add.reduceat(table[:last], np.arange(0, last, width), axis=0)
            shares = 100 * binned / np.maximum(binned.sum(axis=1, keepdims=True), 1)
            places = 1 + (width - 1) / 2 + width * np.arange(len(binned))
            for column, kind in enumerate(("shared", "teacher", "student")):
                label = kind if table is candidates else None
                colour = _STAND_IN[kind]
                axes.plot(places, shares[:, column], color=colour, linestyle=line, label=label, linewidth=1.6)
        axes.set(xlabel="sentence of the answer", ylabel="share of class, %", ylim=(0, 103))
        axes.set_xlim(0.5, max(last, 2) + 0.5)
        for handle in _legend_above(axes, 3).get_lines():
            handle.set_linestyle("-")

    return _figure(draw, f"positions-{name}", f"Share of each class by sentence position, phase {name}")


def densities(series: Sequence[tuple[str, Floats]]) -> str:
    """Draw the density of the answers' geometric-mean token probability (paper Fig. 3a)."""

    def draw(axes: Any) -> None:
        low = min(float(np.quantile(values, 0.005)) for _, values in series)
        edges = np.linspace(max(low - 0.02, 0), 1, 60)
        for i, (label, values) in enumerate(series):
            _outline(axes, values, edges, label, i)
        axes.set(xlabel="geometric mean of an answer's token probabilities", ylabel="density", ylim=(0, None))
        _legend_above(axes, len(series))

    return _figure(draw, "densities", "Density of the answers' geometric-mean probability by phase")


def lengths(series: Sequence[tuple[str, Floats]]) -> str:
    """Draw the density of the answers' lengths."""

    def draw(axes: Any) -> None:
        top = max(float(values.max()) for _, values in series)
        long = top > 4000  # lengths over several orders of magnitude want a log scale
        low = max(min(float(values.min()) for _, values in series), 1)
        edges = (
            np.geomspace(low, top + 1, 50)
            if long
            else np.linspace(max(low - 0.05 * (top - low), 0), top + 0.05 * (top - low) + 1, 50)
        )
        for i, (label, values) in enumerate(series):
            _outline(axes, values, edges, label, i)
        axes.set_xscale("log" if long else "linear")
        axes.set(xlabel="tokens of the student in an answer", ylabel="density", ylim=(0, None), yticks=[])
        _legend_above(axes, len(series))

    return _figure(draw, "lengths", "Density of the answers' lengths by phase")


def _outline(axes: Any, values: Floats, edges: Floats, label: str, index: int) -> None:
    """Draw a histogram, slightly smoothed, as a line."""
    shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values) / np.diff(edges)
    smooth = np.convolve(np.pad(shares, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")
    axes.plot((edges[1:] + edges[:-1]) / 2, smooth, label=label, **_phase_style(index))
    axes.fill_between((edges[1:] + edges[:-1]) / 2, smooth, color=_phase_style(index)["color"], alpha=0.1, linewidth=0)


def training(curves: Sequence[tuple[str, Floats, Floats]], name: str, ylabel: str) -> str:
    """Draw a quantity over the optimiser steps, the phases one behind the other."""

    def draw(axes: Any) -> None:
        first = 0.0
        for i, (label, steps, values) in enumerate(curves):
            style = _phase_style(i) | {"linestyle": "-"}
            axes.plot(first + steps, values, label=label, **style)
            first += float(steps[-1])
            if i + 1 < len(curves):
                axes.axvline(first + 0.5, color=_STAND_IN["muted"], linewidth=0.8, linestyle=(0, (2, 3)))
        axes.set(xlabel="optimiser step", ylabel=ylabel)
        axes.set_ylim(bottom=0)
        _legend_above(axes, len(curves))

    return _figure(draw, name, f"{ylabel} over the optimiser steps, by phase")


def cut_off(lengths: Floats, cut: npt.NDArray[np.bool_], name: str) -> str:
    """Draw the share of the student's answers that the cap cut off, by the teacher's length (paper Fig. 7)."""

    def draw(axes: Any) -> None:
        bins = min(8, max(len(lengths) // 25, 1))
        for part in np.array_split(np.argsort(lengths, kind="stable"), bins):
            share = float(cut[part].mean())
            guess = (cut[part].sum() + 1) / (len(part) + 2)  # none cut off among few is no certainty
            error = np.sqrt(guess * (1 - guess) / len(part))
            axes.errorbar(
                float(lengths[part].mean()), 100 * share, 100 * error, fmt="o", color=_STAND_IN["accent"], capsize=3
            )
        axes.set(xlabel="tokens in the teacher's answer (groups of equal size)", ylabel="cut off, %")
        axes.set_ylim(0, min(max(axes.get_ylim()[1], 10), 103))

    return _figure(draw, f"cut-off-{name}", "Share of the student's answers that were cut off, by length")
