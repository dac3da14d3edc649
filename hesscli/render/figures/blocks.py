"""What AdaHessian's block averages keep of a diagonal, as a picture."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.results import BlockReport, DiagResult, LayerDiagonal

# In inches: what the legend takes above the bars, what lies below them, the gap between columns.
_LEGEND, _BOTTOM, _GAP = 0.55, 0.85, 0.22
_PARTS = {
    "between blocks: kept": canvas.ACCENT,
    "within blocks: averaged away": canvas.PALE,
    "noise left in a block's mean": canvas.NEGATIVE,
}


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
    layers = words.largest(averaged, canvas.MOST_LAYERS)
    tall = (0.34 if len(layers) <= 30 else 0.24) * max(len(layers), 2)
    with canvas.style():
        height = canvas.TOP + _LEGEND + tall + _BOTTOM
        figure = canvas.page(height, _title(result), canvas.provenance(result))
        bars = figure.add_axes((0.3, 0.1, 0.3, 0.7))
        _draw_shares(bars, layers)
        _arrange(figure, bars, layers, tall)
        canvas.note(figure, _notes(result, averaged, layers))
    return figure


def _title(result: DiagResult) -> str:
    return f"What block averages keep of the {words.matrix_name(result.problem)}'s diagonal"


def _draw_shares(axes: Axes, layers: list[LayerDiagonal]) -> None:
    for row, layer in enumerate(layers):
        parts, start = _variances(layer.block), 0.0
        total = sum(parts)
        for part, colour in zip(parts, _PARTS.values(), strict=True):
            share = part / total if total else 0.0
            axes.barh(row, share, left=start, height=0.62, color=colour)
            start += share
    canvas.name_rows(axes, [layer.name for layer in layers])
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("share of the variance")
    axes.grid(axis="x")


def _arrange(figure: Figure, bars: Axes, layers: list[LayerDiagonal], tall: float) -> None:
    """Give names and numbers the room they need, and the bars what is left."""
    blocks = [layer.block for layer in layers]
    numbers = canvas.columns(
        bars,
        _GAP,
        {
            "kept": [words.share_within(b.explained, b.explained_interval) for b in blocks],
            "total variance": [words.number(sum(_variances(block)), 2) for block in blocks],
            "blocks": [words.count(block.count) for block in blocks],
            "rule": [block.rule for block in blocks],
        },
    )
    left = canvas.SIDE + canvas.names_width(bars) + 0.1
    width = canvas.WIDTH - canvas.SIDE - left - numbers
    canvas.place(figure, bars, left, _BOTTOM, width, tall)
    figure.legend(
        handles=[Patch(color=colour, label=part) for part, colour in _PARTS.items()],
        loc="upper left",
        bbox_to_anchor=(canvas.SIDE / canvas.WIDTH, 1 - canvas.TOP / figure.get_figheight()),
        ncols=len(_PARTS),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1,
        handleheight=1,
        fontsize=9,
    )


def _variances(block: BlockReport) -> tuple[float, float, float]:
    """Between, within and noise; an estimate below zero counts as none."""
    parts = (block.between_variance, block.within_variance, block.noise_variance or 0.0)
    between, within, noise = (max(part, 0.0) for part in parts)
    return between, within, noise


def _notes(
    result: DiagResult, averaged: list[LayerDiagonal], layers: list[LayerDiagonal]
) -> list[str]:
    confidence = words.percent(result.trace.confidence)
    notes = [f"Kept: of the first two, the share between blocks, with its {confidence} interval."]
    without = len(result.layers) - len(averaged)
    if without:
        notes.append(f"{words.count(without, 'layer')} without blocks not drawn.")
    hidden = len(averaged) - len(layers)
    if hidden:
        notes.append(f"{words.count(hidden, 'layer')} of smaller trace not drawn.")
    return notes
