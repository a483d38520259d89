"""Plots of named series: curves over a training, one line a layer, distributions. They know neither runs nor commands.

Each function returns a figure, which `save` writes. Colours are Okabe and Ito's, which the colour-blind tell apart, and
viridis for depth. Legends stand above the axes, where they hide nothing. Nothing here touches pyplot: no window, no
global state.

Colours go by the order of names: of `names`, where it is given so that several plots agree, else of first appearance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

from fbiedge.files import atomic_file

Values = Sequence[float] | npt.NDArray[Any]
Series = Mapping[str, tuple[Values, Values]]  # by the name that the legend shows: x and y
TOKENS = "tokens seen"
_Numbers = npt.NDArray[np.float64]
_Look = tuple[str, Any]  # colour and line style

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_STEPS = (1, 2, 2.5, 5, 10)
# Of a logarithmic axis over fewer than so many decades, the labelled multiples of each power of ten.
_LOG_TICKS = ((1, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)), (2, (1.0, 2.0, 5.0)), (3, (1.0, 3.0)), (np.inf, (1.0,)))
_WIDTH = 7.5  # inches; at 160 dots each, 1200 pixels
_STYLE: Any = {
    "font.size": 11, "axes.labelsize": 11, "legend.fontsize": 10.5, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555", "axes.linewidth": 0.8,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e3e3e3", "grid.linewidth": 0.7, "axes.titlesize": 11,
    "lines.linewidth": 1.7, "legend.frameon": False, "figure.dpi": 160, "savefig.dpi": 160,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes of a plot with several above one another."""

    y_label: str
    series: Series
    log_y: bool = False
    smooth: bool = False  # a running mean over a 50th of the points, in front of the points themselves
    dots: bool = False  # for few points, such as evaluations
    may_coincide: bool = False  # a series that lies on an earlier one is dashed, so that both are seen
    height: float = 2.0  # inches


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many values lie between edges[i] and edges[i + 1]; `outside` of all edges lie some more."""

    edges: npt.NDArray[np.float64]  # [bins + 1]
    counts: npt.NDArray[np.int64]  # [bins]
    outside: int = 0


def plot_curves(
    series: Series,
    *,
    y_label: str,
    x_label: str = TOKENS,
    log_y: bool = False,
    smooth: bool = False,
    dots: bool = False,
    height: float = 4.2,
    names: Sequence[str] = (),
) -> Figure:
    """All series in one pair of axes."""
    panel = Panel(y_label=y_label, series=series, log_y=log_y, smooth=smooth, dots=dots, height=height)
    return plot_panels([panel], x_label=x_label, names=names)


def plot_panels(panels: Sequence[Panel], *, x_label: str = TOKENS, names: Sequence[str] = ()) -> Figure:
    """Panels above one another over the same x; a series has the same colour in all of them."""
    looks = _looks(names, (name for panel in panels for name in panel.series))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.6 + sum(panel.height for panel in panels)), layout="constrained")
        rows = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [p.height for p in panels]}
        )[:, 0]
        for axes, panel in zip(rows, panels, strict=True):
            drawn: list[tuple[_Numbers, _Numbers]] = []
            for name, (x, y) in panel.series.items():
                points = _numbers(x), _masked(_numbers(y), panel.log_y)
                covered = sum(_coincide(points, other) for other in drawn) if panel.may_coincide else 0
                _line(axes, *points, looks[name], panel, covered)
                drawn.append(points)
            _finish_y(axes, panel.y_label, panel.log_y)
        _finish_x(rows[-1], x_label)
        figure.align_ylabels(list(rows))
        _legend(figure, looks)
    return figure


def plot_layers(
    runs: Mapping[str, tuple[Values, Sequence[Values]]], *, y_label: str, x_label: str = TOKENS, log_y: bool = False
) -> Figure:
    """A line for each layer, dark for the first to bright for the last; runs side by side over the same y.

    runs: by name, x and for each layer its y. From 200 points on a line is the running mean over a 100th of them.
    """
    deepest = max(len(layers) for _, layers in runs.values())
    # Not to the end of viridis, whose yellow is lost on white.
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.93, deepest)))
    with matplotlib.rc_context(_STYLE):
        columns = min(len(runs), 3)
        lines = -(-len(runs) // columns)
        figure = Figure(figsize=(max(_WIDTH, 4.0 * columns), 0.6 + 3.6 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axes, (name, (x, layers)) in zip(grid.flat, runs.items(), strict=False):
            for number, y in enumerate(layers):
                smoothed = _running_mean(_masked(_numbers(y), log_y), max(1, len(y) // 100))
                axes.plot(_numbers(x), smoothed, color=colours(number), linewidth=1.3)
            if len(runs) > 1:
                axes.set_title(name, loc="left")
            _finish_y(axes, y_label if axes in grid[:, 0] else "", log_y)
            _finish_x(axes, x_label)
        for axes in grid.flat[len(runs) :]:
            axes.remove()
        norm = BoundaryNorm(np.arange(deepest + 1) - 0.5, deepest)
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(grid.flat[: len(runs)]), fraction=0.04, pad=0.02)
        bar.set_label("layer (0: next to the embedding)")
        bar.set_ticks(range(0, deepest, max(1, deepest // 8)))
        bar.minorticks_off()
        bar.ax.grid(False)
    return figure


def plot_distributions(
    groups: Mapping[str, Mapping[str, Histogram]], *, x_label: str, names: Sequence[str] = ()
) -> Figure:
    """A small histogram for each group, all over the same x; series of a group, such as runs, over one another.

    What lies outside of the edges of any is said beneath.
    """
    looks = _looks(names, (name for histograms in groups.values() for name in histograms))
    with matplotlib.rc_context(_STYLE):
        columns = min(4, len(groups))
        lines = -(-len(groups) // columns)
        figure = Figure(figsize=(max(_WIDTH, 2.6 * columns), 0.5 + 2.2 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, squeeze=False)
        outside = total = 0
        for index, (axes, (group, histograms)) in enumerate(zip(grid.flat, groups.items(), strict=False)):
            for name, histogram in histograms.items():
                counted = int(histogram.counts.sum()) + histogram.outside
                outside, total = outside + histogram.outside, total + counted
                colour, style = looks[name]
                shares = 100 * histogram.counts / max(1, counted)
                axes.stairs(shares, histogram.edges, fill=True, color=colour, alpha=0.25 if len(looks) < 4 else 0)
                axes.stairs(shares, histogram.edges, color=colour, linestyle=style, linewidth=1.4)
            axes.set_title(group, loc="left")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=_STEPS))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=_STEPS))
            if index % columns == 0:
                axes.set_ylabel("scales in a bin (%)")
            if index + columns >= len(groups):
                axes.tick_params(labelbottom=True)
        for axes in grid.flat[len(groups) :]:
            axes.remove()
        beyond = f"; {100 * outside / total:.2g} % lie outside" if outside else ""
        figure.supxlabel(x_label + beyond, fontsize=11)
        _legend(figure, looks)
    return figure


def save(figure: Figure, out: Path) -> None:
    """Write a PNG, whole or not at all, the same bytes for the same figure. Raises OutputError."""
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _line(axes: Axes, x: _Numbers, y: _Numbers, look: _Look, panel: Panel, covered: int) -> None:
    """covered: how many lines lie beneath it."""
    colour, style = look
    window = max(1, len(y) // 50) if panel.smooth else 1
    if window > 1:
        axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.7)
        y = _running_mean(y, window)
    if covered:
        style = (0, (4, 4 * covered))
    marker: Any = {"marker": "o", "markersize": 3.5} if panel.dots or len(x) == 1 else {}
    axes.plot(x, y, color=colour, linestyle=style, **marker)


def _coincide(points: tuple[_Numbers, _Numbers], others: tuple[_Numbers, _Numbers]) -> bool:
    """Whether a line hides another over half of its length or more: by no more than a hundredth of its height apart."""
    (x, y), (other_x, other_y) = points, others
    known = np.isfinite(y)
    if not known.any() or not len(other_x):
        return False
    apart = np.abs(np.interp(x, other_x, other_y, left=np.nan, right=np.nan) - y)
    return bool((apart <= 0.01 * np.ptp(y[known])).mean() >= 0.5)


def _looks(wanted: Sequence[str], found: Iterable[str]) -> dict[str, _Look]:
    """Colour and line style of each name that was found, no two of the first 28 alike."""
    there = dict.fromkeys(found)
    return {
        name: (_COLOURS[index % len(_COLOURS)], _STYLES[index // len(_COLOURS) % len(_STYLES)])
        for index, name in enumerate(dict.fromkeys([*wanted, *there]))
        if name in there
    }


def _legend(figure: Figure, looks: Mapping[str, _Look]) -> None:
    """Above the axes, which keep their size, where there is more than one series to tell apart."""
    if len(looks) < 2:
        return
    shown = [name if len(name) <= 70 else f"{name[:30]} … {name[-35:]}" for name in looks]
    width, height = figure.get_size_inches()
    columns = max(1, min(len(shown), int(width * 12 / (max(map(len, shown)) + 6))))
    figure.set_size_inches(width, height + 0.23 * -(-len(shown) // columns))
    handles = [Line2D([], [], color=colour, linestyle=style, linewidth=2) for colour, style in looks.values()]
    figure.legend(handles, shown, loc="outside upper left", ncols=columns)


def _finish_x(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=_STEPS))
    axes.margins(x=0.01)


def _finish_y(axes: Axes, label: str, log: bool) -> None:
    axes.set_ylabel(label)
    if not log:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS))
        if axes.get_ylim()[1] > 2000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = np.log10(high / low) if low > 0 else 1.0
    subs = next(subs for most, subs in _LOG_TICKS if decades < most)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda _value, _position: ""))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:.5g}"))


def _numbers(values: Values) -> _Numbers:
    """As fp64; what is no finite number is left out of the line."""
    numbers = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _masked(y: _Numbers, log: bool) -> _Numbers:
    """A logarithmic axis has no place for zero."""
    return np.where(y > 0, y, np.nan) if log else y


def _running_mean(y: _Numbers, window: int) -> _Numbers:
    """Mean of the `window` points around each, of fewer at the ends; gaps are passed over."""
    known = np.isfinite(y)
    sums = np.convolve(np.where(known, y, 0.0), np.ones(window), mode="same")
    counts = np.convolve(known.astype(np.float64), np.ones(window), mode="same")
    return np.where(known, sums / np.maximum(counts, 1), np.nan)
