"""A diagonal as pictures: how its entries spread, and what AdaHessian's blocks keep of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hesscli.render import bins, words
from hesscli.render.figures import canvas
from hesscli.render.figures.canvas import label_sizes, scale_by_size
from hesscli.render.figures.heat_map import heat_map
from hesscli.render.figures.rows import (
    LEAST,
    SHAPES,
    Rows,
    draw_bins,
    draw_shape,
    draw_spread,
    mark_spread,
)
from hesscli.results import BlockReport, DiagResult, Histogram, Interval, LayerDiagonal, Quantile

# -- All entries, and below them layer by layer ----------------------------------------------------


# In inches: the panel of all entries, what lies below it, and the labels of its heights.
_PANEL, _BETWEEN, _HEIGHTS = 1.7, 0.85, 0.7
_COLOURS = {-1: canvas.NEGATIVE, 0: canvas.GREY, 1: canvas.ACCENT}


@canvas.styled
def diag_figure(result: DiagResult) -> Figure:
    """Draw how the diagonal's entries spread, for the network and for each layer.

    All share one axis of sizes, logarithmic on either side of zero. Layers run in model order
    from top to bottom; with many, those of largest trace are drawn and a note says so.

    Args:
        result: the answer of ``hesscli diag``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    layers = words.largest(result.layers, canvas.MOST_LAYERS, words.trace_size)
    histograms = [result.diagonal.histogram, *(layer.histogram for layer in layers)]
    histogram, *spectra = bins.trimmed(histograms)
    rows = Rows(
        _diag_title(result),
        canvas.provenance(result),
        [layer.name for layer in layers],
        SHAPES,
        above=_PANEL + _BETWEEN,
        below=1.0,
    )
    whole = rows.figure.add_axes((0.3, 0.7, 0.5, 0.2), sharex=rows.axes)
    scale_by_size(whole, histogram.edges)
    _draw_whole(whole, histogram)
    canvas.describe(whole, _whole_in_words(result))
    _draw_layers(rows, layers, spectra)
    left, width = rows.room(names=_HEIGHTS)
    rows.put(rows.axes, left, width)
    canvas.place(rows.figure, whole, left, rows.below + rows.tall + _BETWEEN, width, _PANEL)
    for axes in (whole, rows.axes):
        label_sizes(axes, histogram.edges)
    canvas.note(rows.figure, _diag_notes(result, layers, histogram))
    return rows.figure


def _diag_title(result: DiagResult) -> str:
    report = result.diagonal
    title = f"Diagonal of the {words.matrix_name(result.problem)}: norm {words.number(report.norm)}"
    if report.relative_error != 0:
        title += f"   (relative error {words.percent(report.relative_error)})"
    return title


def _draw_whole(axes: Axes, histogram: Histogram) -> None:
    most = max((1, *histogram.counts))
    span = 1.4 * most / LEAST
    axes.set_yscale("log")
    axes.set_ylim(LEAST * span**-0.12, LEAST * span)
    heights = [max(count, LEAST) for count in histogram.counts]
    draw_bins(axes, histogram.edges, heights, LEAST, _COLOURS)
    low, middle, high = (bins.quantile(histogram, level) for level in (0.05, 0.5, 0.95))
    mark_spread(axes, LEAST * span**-0.06, (low, high), middle)
    canvas.label_counts(axes, most)
    axes.set_ylabel("entries")
    axes.grid()


def _whole_in_words(result: DiagResult) -> tuple[str, ...]:
    """How many entries there are, and their sum."""
    return (
        "all layers",
        f"{words.count(sum(result.diagonal.histogram.counts))} entries",
        f"{words.percent(result.diagonal.negative_fraction)} negative",
        "trace " + words.with_error(result.trace.estimate, words.half_width(result.trace.interval)),
    )


def _draw_layers(rows: Rows, layers: list[LayerDiagonal], spectra: list[Histogram]) -> None:
    for row, (layer, histogram) in enumerate(zip(layers, spectra, strict=True)):
        draw_shape(rows.axes, row, histogram, _COLOURS)
        if layer.quantiles:
            draw_spread(rows.axes, row, *_spread(layer.quantiles))
    rows.columns(
        {
            "mean": [
                words.with_error(layer.mean, words.bar(layer.mean_stderr)) for layer in layers
            ],
            "negative": [words.percent(layer.negative_fraction) for layer in layers],
        }
    )
    rows.axes.set_xlabel(f"size of an entry, {canvas.log_scale(rows.axes.xaxis)}")
    rows.axes.grid(axis="x")


def _spread(quantiles: tuple[Quantile, ...]) -> tuple[Interval, float]:
    """Where a layer's entries lie: the 5% and 95% quantiles, and the one nearest to the median."""
    inner = [quantile.value for quantile in quantiles if 0.05 <= quantile.level <= 0.95]
    median = min(quantiles, key=lambda quantile: abs(quantile.level - 0.5)).value
    return (min(inner, default=median), max(inner, default=median)), median


def _diag_notes(result: DiagResult, layers: list[LayerDiagonal], histogram: Histogram) -> list[str]:
    notes = [
        "Heights are logarithms of counts, in each layer up to its own highest.",
        "Lines run from the 5% to the 95% quantile, dots are medians; ± is 95%.",
    ]
    around = bins.side(histogram.edges, 0)
    if any(histogram.counts[bin] for bin in around):
        notes.append(f"Grey: within ± {words.number(histogram.edges[around.stop], 2)}.")
    hidden = len(result.layers) - len(layers)
    return notes + canvas.not_drawn(hidden, "layer", " of smaller trace")


# -- What AdaHessian's block averages keep ---------------------------------------------------------


_LEGEND = 0.55
"""Inches that the legend takes above the bars."""
_PARTS = {
    "between blocks: kept": canvas.ACCENT,
    "within blocks: averaged away": canvas.PALE,
    "noise left in a block's mean": canvas.NEGATIVE,
}


@canvas.styled
def block_figure(result: DiagResult) -> Figure:
    """Draw where each layer's variance lies: between blocks, within them, or in noise.

    Bars are shares of each layer's own total, since layers differ by orders of magnitude; the
    totals stand beside them. Layers without blocks are left out; with many, those of largest
    trace are drawn.

    Args:
        result: the answer of ``hesscli diag``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    averaged = [layer for layer in result.layers if words.is_averaged(layer.block)]
    layers = words.largest(averaged, canvas.MOST_LAYERS, words.trace_size)
    blocks = [layer.block for layer in layers]
    rows = Rows(
        f"What block averages keep of the {words.matrix_name(result.problem)}'s diagonal",
        canvas.provenance(result),
        [layer.name for layer in layers],
        above=_LEGEND,
    )
    _draw_shares(rows.axes, blocks)
    rows.columns(
        {
            "kept": [words.share_within(b.explained, b.explained_interval) for b in blocks],
            "total variance": [words.number(sum(_variances(block)), 2) for block in blocks],
            "blocks": [words.count(block.count) for block in blocks],
            "rule": [block.rule for block in blocks],
        }
    )
    rows.put(rows.axes, *rows.room())
    handles = [Patch(color=colour, label=part) for part, colour in _PARTS.items()]
    canvas.legend(rows.figure, handles, handleheight=1)
    confidence = words.percent(result.trace.confidence)
    notes = [
        f"Kept: of the first two, the share between blocks, with its {confidence} interval.",
        *canvas.not_drawn(len(result.layers) - len(averaged), "layer", " without blocks"),
        *canvas.not_drawn(len(averaged) - len(layers), "layer", " of smaller trace"),
    ]
    canvas.note(rows.figure, notes)
    return rows.figure


def _draw_shares(axes: Axes, blocks: list[BlockReport]) -> None:
    for row, block in enumerate(blocks):
        parts, start = _variances(block), 0.0
        total = sum(parts)
        for part, colour in zip(parts, _PARTS.values(), strict=True):
            share = part / total if total else 0.0
            axes.barh(row, share, left=start, height=0.62, color=colour)
            start += share
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("share of the variance")
    axes.grid(axis="x")


def _variances(block: BlockReport) -> tuple[float, float, float]:
    """Between, within and noise; an estimate below zero counts as none."""
    parts = (block.between_variance, block.within_variance, block.noise_variance or 0.0)
    between, within, noise = (max(part, 0.0) for part in parts)
    return between, within, noise


# -- Which pictures an answer has, by the names of their files -------------------------------------


def figures(result: DiagResult, asked: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The diagonal, its blocks where there are any, and the map of one tensor."""
    yield "diag", diag_figure(result)
    if any(layer.block.rule != "none" for layer in result.layers):
        yield "diag_blocks", block_figure(result)
    mapped = asked.get("heatmap") or _most_curved(result)
    if mapped is not None:
        yield "diag_heatmap", heat_map(mapped, result.entries[mapped], canvas.provenance(result))


def _most_curved(result: DiagResult) -> str | None:
    """The layers' matrix or kernel tensor with the largest entry, if there is any."""
    names = [parameter.name for layer in result.layers for parameter in layer.parameters]
    mapped = {name: result.entries[name] for name in names if result.entries[name].ndim >= 2}
    return max(mapped, key=lambda name: abs(mapped[name]).max(), default=None)
