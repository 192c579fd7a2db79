"""The report's figures as SVG text: the same bytes for the same numbers, colours left to the page.

Figures are drawn in stand-in colours. `inline` turns them into the page's CSS variables, so that one drawing serves
light and dark; `standalone` into fixed ones on paper white, for files beside report.md. Text stays text.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# stand-in: (CSS variable, fixed colour). The series are told apart by lightness as well as by hue.
COLOURS = {
    "#010101": ("--ink", "#1b1d22"),
    "#020202": ("--muted", "#676b75"),
    "#030303": ("--rule", "#dfe1e6"),
    "#0000a1": ("--s1", "#1f5fa8"),
    "#0000a2": ("--s2", "#c4621a"),
    "#0000a3": ("--s3", "#2f8f83"),
    "#0000a4": ("--s4", "#8a4fa3"),
    "#0000a5": ("--s5", "#a08a1c"),
    "#0000a6": ("--s6", "#5b6b7d"),
}
INK, MUTED, RULE, *SERIES = COLOURS
PAPER = "#ffffff"
BINS = 300  # points drawn of a curve: each the mean of its bin
HISTOGRAM = 60  # bins
SMOOTH = 20  # the bold line averages a twentieth of the curve

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "font.family": "sans-serif",
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.formatter.useoffset": False,
    "lines.solid_capstyle": "round",
}


def bare_axes(figure: Figure) -> Axes:
    axes = figure.add_subplot()
    axes.tick_params(length=0)
    return axes


def to_svg(figure: Figure, name: str) -> str:
    """The figure as one <svg> element: no prolog, metadata, date or group ids; ids of definitions begin with `name`."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.DOTALL)  # its `*` rule would reach into the page
    svg = re.sub(r'<g id="[^"]*"/>\s*', "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'font-family: [^;"]*', "font-family: sans-serif", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)  # to a hundredth of a point
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    svg = svg.replace("<svg ", '<svg stroke-linejoin="round" ', 1)
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE).strip()


def inline(svg: str, description: str) -> str:
    """For a page that defines the CSS variables; description: plain text for those who do not see the figure."""
    for stand_in, (variable, _) in COLOURS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def standalone(svg: str) -> str:
    """A file of its own, in fixed colours."""
    for stand_in, (_, colour) in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    end = svg.index(">") + 1
    return f'{svg[:end]}\n <rect width="100%" height="100%" fill="{PAPER}"/>{svg[end:]}\n'


def draw_scores(rows: Sequence[tuple[str, Sequence[float], bool]], xlabel: str) -> str:
    """One line a row: a dot for every seed, a bar at their mean. rows: label, values, whether it stands out."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "scores"}):
        figure = Figure(figsize=(5.0, 0.34 * len(rows) + 0.62), layout="constrained")
        axes = bare_axes(figure)
        for y, (_, values, accented) in enumerate(rows):
            colour = SERIES[0] if accented else MUTED
            axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.55, markersize=4.5, markeredgewidth=0)
            axes.plot([np.mean(values)] * 2, [y - 0.27, y + 0.27], color=colour, linewidth=2.0)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], color=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        axes.set_xlabel(xlabel)
        return to_svg(figure, "scores")


def binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most BINS points: the means of equal runs."""
    cuts = np.linspace(0, len(x), min(len(x), BINS) + 1).astype(int)[:-1]
    counts = np.diff([*cuts, len(x)])
    return np.add.reduceat(x, cuts) / counts, np.add.reduceat(y, cuts) / counts


def running_mean(y: np.ndarray) -> np.ndarray:
    """Centred mean over about a twentieth of the curve, shorter at its ends."""
    half = len(y) // SMOOTH // 2
    sums = np.concatenate([[0.0], np.cumsum(y)])
    low, high = np.maximum(np.arange(len(y)) - half, 0), np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def draw_histogram(name: str, xlabel: str, groups: Mapping[str, Sequence[float]]) -> str:
    """How the values of each group are spread over the range of all, as shares of its own; finite ones only."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.0, 2.4), layout="constrained")
        axes = bare_axes(figure)
        finite = {label: np.asarray(values, float)[np.isfinite(values)] for label, values in groups.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(finite.values())), HISTOGRAM)
        for i, (label, values) in enumerate(finite.items()):
            weights = np.full(len(values), 100 / max(1, len(values)))
            axes.hist(values, edges.tolist(), weights=weights, color=SERIES[i], alpha=0.55, label=label)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("% of the samples")
        axes.grid(axis="x", visible=False)
        axes.legend(frameon=False, fontsize=8, labelcolor=MUTED, borderpad=0)
        return to_svg(figure, name)


def draw_curves(name: str, title: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """A curve for every label (iterations, values): thin as it is, bold its running mean."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = bare_axes(figure)
        for i, (label, (iterations, values)) in enumerate(curves.items()):
            x, y = binned(np.asarray(iterations, float), np.asarray(values, float))
            colour = SERIES[i % len(SERIES)]
            axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.7)
            axes.plot(x, running_mean(y), color=colour, linewidth=1.5, label=label)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="x", visible=False)
        axes.margins(x=0.01)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=MUTED, handlelength=1.2, ncols=3, loc="best", borderpad=0)
        return to_svg(figure, name)
