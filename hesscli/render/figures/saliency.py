"""The saliencies of weights as a picture, layer by layer from the highest mean down."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hesscli.render import bins, perturbations, words
from hesscli.render.figures import canvas
from hesscli.render.figures.canvas import label_sizes, scale_by_size
from hesscli.results import LOW_LEVERAGE, Histogram, IhvpResult, LayerSensitivity, SaliencyReport

# In inches: what lies below the rows, and the gap between columns.
_BOTTOM, _GAP = 1.0, 0.2
# Inches of a row for at most so many layers: shape where they are few, one page for many.
_ROWS = ((4, 0.8), (12, 0.55), (30, 0.38), (canvas.MOST_LAYERS, 0.23))
# In rows: where a histogram stands below its row's middle, how tall it is, and its marks.
_BASE, _TALL, _MARK = 0.26, 0.72, 0.4
# Where logarithmic heights begin, so that a single weight is seen.
_LEAST = 0.5


def saliency_figure(result: IhvpResult) -> Figure:
    """Draw how the saliencies of each layer's weights spread.

    Layers run from the highest mean saliency down, on one logarithmic axis; with many, the
    highest are drawn and a note says so.

    Args:
        result: an answer of ``hesscli ihvp`` with layers.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    layers = sorted(result.layers, key=lambda layer: layer.rank)[: canvas.MOST_LAYERS]
    tall = len(layers) * next(row for most, row in _ROWS if len(layers) <= most)
    spectra = bins.trimmed([layer.saliency.histogram for layer in layers])
    with canvas.style():
        height = canvas.TOP + 0.2 + tall + _BOTTOM
        figure = canvas.page(height, _title(layers), canvas.provenance(result))
        rows = figure.add_axes((0.3, 0.1, 0.5, 0.7))
        scale_by_size(rows, spectra[0].edges)
        canvas.name_rows(rows, [layer.name for layer in layers])
        for row, (layer, histogram) in enumerate(zip(layers, spectra, strict=True)):
            _draw_bins(rows, row, histogram, _colour(layer))
            _draw_spread(rows, row, layer.saliency)
        rows.set_xlabel("saliency of a weight, log scale: a ranking, not a loss change")
        rows.grid(axis="x")
        width = _arrange(figure, rows, layers, tall)
        label_sizes(rows, spectra[0].edges, width)
        canvas.note(figure, _notes(result, layers))
    return figure


def _title(layers: list[LayerSensitivity]) -> str:
    first = layers[0]
    if first.rank > 1 or first.above_next is None:
        return "Saliency of weights, by layer"
    name = words.shorten_all([layer.name for layer in layers], 32)[0]
    sure = words.probability(first.above_next)
    return f"Saliency of weights: {name} ranks highest   (probability {sure})"


def _draw_bins(axes: Axes, row: int, histogram: Histogram, colour: str) -> None:
    base, full = row + _BASE, math.log(max((1, *histogram.counts)) / _LEAST)
    logarithms = [math.log(max(count, _LEAST) / _LEAST) for count in histogram.counts]
    tops = [base - _TALL * logarithm / full for logarithm in logarithms]
    axes.axhline(base, color=canvas.LINE, linewidth=0.8)
    if tops:
        axes.stairs(tops, histogram.edges, baseline=base, fill=True, color=colour)


def _draw_spread(axes: Axes, row: int, saliency: SaliencyReport) -> None:
    """The 5% to the 95% quantile with the median, and the mean."""
    inner = [q.value for q in saliency.quantiles if 0.05 <= q.level <= 0.95 and q.value > 0]
    if inner:
        canvas.whisker(axes, row + _MARK, (min(inner), max(inner)))
    for quantile in saliency.quantiles:
        if quantile.level == 0.5 and quantile.value > 0:
            axes.plot(quantile.value, row + _MARK, "o", markersize=3.5, color=canvas.INK, zorder=3)
    if saliency.mean > 0:
        axes.plot(
            saliency.mean,
            row + _MARK,
            "D",
            markersize=4.5,
            markerfacecolor="white",
            markeredgecolor=canvas.INK,
            zorder=3,
        )


def _arrange(figure: Figure, rows: Axes, layers: list[LayerSensitivity], tall: float) -> float:
    """Give names and numbers the room they need, and the spectra what is left.

    Returns:
        The width of the spectra in inches.
    """
    numbers = canvas.columns(
        rows,
        _GAP,
        {
            "mean": [words.with_error(x.saliency.mean, x.saliency.stderr) for x in layers],
            "above next": [_above(layer) for layer in layers],
            "leverage": [words.probability(layer.leverage) for layer in layers],
            "this ranking is": [perturbations.ranked_by(layer) for layer in layers],
        },
    )
    left = canvas.SIDE + canvas.names_width(rows) + 0.1
    width = canvas.WIDTH - canvas.SIDE - left - numbers
    canvas.place(figure, rows, left, _BOTTOM, width, tall)
    return width


def _colour(layer: LayerSensitivity) -> str:
    return canvas.PALE if perturbations.ranks_by_magnitude(layer) else canvas.ACCENT


def _above(layer: LayerSensitivity) -> str:
    return "-" if layer.above_next is None else words.probability(layer.above_next)


def _notes(result: IhvpResult, layers: list[LayerSensitivity]) -> list[str]:
    notes = [
        "Heights are logarithms of counts, in each layer up to its own highest.",
        "Lines run from the 5% to the 95% quantile; dots are medians, diamonds means.",
        "Above next: probability of a higher mean; ± is one standard error.",
    ]
    if any(map(perturbations.ranks_by_magnitude, layers)):
        limit = words.percent(LOW_LEVERAGE)
        notes.append(
            f"Pale: median leverage below {limit}, damping and not data decides: "
            "this ranking is magnitude |w|."
        )
    zeros = sum(x.num_parameters - sum(x.saliency.histogram.counts) for x in layers)
    if zeros > 0:
        notes.append(f"{words.count(zeros, 'weight')} of zero saliency not drawn.")
    hidden = len(result.layers) - len(layers)
    if hidden:
        notes.append(f"{words.count(hidden, 'lower layer')} not drawn.")
    return notes
