"""The spectrum of a diagonal as a picture: all entries, and below them layer by layer."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hesscli.render import bins, words
from hesscli.render.figures import canvas
from hesscli.render.figures.canvas import label_sizes, scale_by_size
from hesscli.results import DiagResult, Histogram, Interval, LayerDiagonal, Quantile

# In inches: the panel of all entries, what lies below it and below the layers, and the gap
# between columns.
_PANEL, _BETWEEN, _BOTTOM, _GAP = 1.7, 0.85, 1.0, 0.18
# Inches of a row for at most so many layers: shape where they are few, one page for many.
_ROWS = ((4, 0.8), (12, 0.55), (30, 0.38), (canvas.MOST_LAYERS, 0.23))
_COLOURS = {-1: canvas.NEGATIVE, 0: "#98a3ae", 1: canvas.ACCENT}
# In rows: where a histogram stands below its row's middle, how tall it is, and its mark.
_BASE, _TALL, _MARK = 0.28, 0.74, 0.4
# Where logarithmic heights begin, so that a single entry is seen.
_LEAST = 0.5


def diag_figure(result: DiagResult) -> Figure:
    """Draw how the diagonal's entries spread, for the network and for each layer.

    All share one axis of sizes, logarithmic on either side of zero. Layers run in model order
    from top to bottom; with many, those of largest trace are drawn and a note says so.

    Args:
        result: the answer of ``hesscli diag``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    layers = words.largest(result.layers, canvas.MOST_LAYERS)
    tall = len(layers) * next(row for most, row in _ROWS if len(layers) <= most)
    histograms = [result.diagonal.histogram, *(layer.histogram for layer in layers)]
    histogram, *spectra = bins.trimmed(histograms)
    with canvas.style():
        height = canvas.TOP + _PANEL + _BETWEEN + tall + _BOTTOM
        figure = canvas.page(height, _title(result), canvas.provenance(result))
        whole = figure.add_axes((0.3, 0.7, 0.5, 0.2))
        rows = figure.add_axes((0.3, 0.1, 0.5, 0.5), sharex=whole)
        scale_by_size(whole, histogram.edges)
        _draw_whole(whole, histogram)
        _describe_whole(whole, result)
        _draw_layers(rows, layers, spectra)
        width = _arrange(figure, whole, rows, layers, tall)
        for axes in (whole, rows):
            label_sizes(axes, histogram.edges, width)
        canvas.note(figure, _notes(result, layers, histogram))
    return figure


def _title(result: DiagResult) -> str:
    report = result.diagonal
    title = f"Diagonal of the {words.matrix_name(result.problem)}: norm {words.number(report.norm)}"
    if report.relative_error != 0:
        title += f"   (relative error {words.percent(report.relative_error)})"
    return title


def _draw_whole(axes: Axes, histogram: Histogram) -> None:
    most = max((1, *histogram.counts))
    span = 1.4 * most / _LEAST
    axes.set_yscale("log")
    axes.set_ylim(_LEAST * span**-0.12, _LEAST * span)
    heights = [max(count, _LEAST) for count in histogram.counts]
    _draw_bins(axes, histogram.edges, heights, _LEAST)
    low, middle, high = (bins.quantile(histogram, level) for level in (0.05, 0.5, 0.95))
    _mark(axes, _LEAST * span**-0.06, (low, high), middle)
    powers = range(len(str(most)))
    ticks = [10**power for power in powers[:: 1 + len(powers) // 4]]
    axes.set_yticks(ticks, [words.count(tick) for tick in ticks], color=canvas.QUIET, fontsize=9)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("entries")
    axes.grid()


def _describe_whole(axes: Axes, result: DiagResult) -> None:
    """In words beside the panel: how many entries there are, and their sum."""
    lines = (
        "all layers",
        f"{words.count(sum(result.diagonal.histogram.counts))} entries",
        f"{words.percent(result.diagonal.negative_fraction)} negative",
        "trace " + words.with_error(result.trace.estimate, words.half_width(result.trace.interval)),
    )
    for index, line in enumerate(lines):
        axes.annotate(
            line,
            (1, 1),
            (_GAP * 72, -9 - 15 * index),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=9,
        )


def _draw_layers(axes: Axes, layers: list[LayerDiagonal], spectra: list[Histogram]) -> None:
    canvas.name_rows(axes, [layer.name for layer in layers])
    for row, (layer, histogram) in enumerate(zip(layers, spectra, strict=True)):
        base, full = row + _BASE, math.log(max((1, *histogram.counts)) / _LEAST)
        logarithms = [math.log(max(count, _LEAST) / _LEAST) for count in histogram.counts]
        heights = [base - _TALL * logarithm / full for logarithm in logarithms]
        _draw_bins(axes, histogram.edges, heights, base)
        if layer.quantiles:
            _mark(axes, row + _MARK, *_spread(layer.quantiles))
    axes.set_xlabel("size of an entry, log scale")
    axes.grid(axis="x")


def _draw_bins(axes: Axes, edges: tuple[float, ...], heights: list[float], base: float) -> None:
    """A silhouette on each side of zero, and between them what is around it."""
    axes.axhline(base, color=canvas.LINE, linewidth=0.8)
    for sign, colour in _COLOURS.items():
        if side := bins.side(edges, sign):
            tops, ends = heights[side.start : side.stop], edges[side.start : side.stop + 1]
            axes.stairs(tops, ends, baseline=base, fill=True, color=colour)


def _mark(axes: Axes, height: float, ends: Interval, middle: float) -> None:
    canvas.whisker(axes, height, ends)
    axes.plot(middle, height, "o", markersize=3.5, color=canvas.INK, zorder=3)


def _spread(quantiles: tuple[Quantile, ...]) -> tuple[Interval, float]:
    """From the 5% to the 95% quantile, and the one nearest to the median."""
    inner = [quantile.value for quantile in quantiles if 0.05 <= quantile.level <= 0.95]
    median = min(quantiles, key=lambda quantile: abs(quantile.level - 0.5)).value
    return (min(inner, default=median), max(inner, default=median)), median


def _arrange(
    figure: Figure, whole: Axes, rows: Axes, layers: list[LayerDiagonal], tall: float
) -> float:
    """Give names and numbers the room they need, and the spectra what is left.

    Returns:
        The width of the spectra in inches.
    """
    numbers = canvas.columns(
        rows,
        _GAP,
        {
            "mean": [words.with_error(layer.mean, layer.mean_stderr) for layer in layers],
            "negative": [words.percent(layer.negative_fraction) for layer in layers],
        },
    )
    left = canvas.SIDE + max(canvas.names_width(rows), 0.7) + 0.1
    width = canvas.WIDTH - canvas.SIDE - left - numbers
    canvas.place(figure, rows, left, _BOTTOM, width, tall)
    canvas.place(figure, whole, left, _BOTTOM + tall + _BETWEEN, width, _PANEL)
    return width


def _notes(result: DiagResult, layers: list[LayerDiagonal], histogram: Histogram) -> list[str]:
    notes = [
        "Heights are logarithms of counts, in each layer up to its own highest.",
        "Lines run from the 5% to the 95% quantile, dots are medians.",
    ]
    around = bins.side(histogram.edges, 0)
    if any(histogram.counts[bin] for bin in around):
        notes.append(f"Grey: within ± {words.number(histogram.edges[around.stop], 2)}.")
    hidden = len(result.layers) - len(layers)
    if hidden:
        notes.append(f"{words.count(hidden, 'layer')} of smaller trace not drawn.")
    return notes
