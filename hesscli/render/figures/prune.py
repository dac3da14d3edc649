"""A pruned network as pictures: what is left of each layer, and the loss as the weights went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import Figure

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.render.figures.rows import Rows
from hesscli.render.tables.prune import NAMES
from hesscli.results import LayerPruned, PruneResult

_COLOURS = {
    "mfac": canvas.ACCENT,
    "diagonal-fisher": canvas.AMBER,
    "magnitude": canvas.GREY,
}
_TALL = 3.6
_NEAR = 0.06
"""Of the height: methods whose losses end nearer than that are named one below the other."""


@canvas.styled
def layer_figure(result: PruneResult) -> Figure:
    """Draw the sparsity of each layer.

    Args:
        result: the answer of ``hesscli prune``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    layers = words.largest(result.layers, canvas.MOST_LAYERS, _size)
    names = [layer.name for layer in layers]
    rows = Rows(_title(result), canvas.provenance(result), names)
    for row, layer in enumerate(layers):
        share = layer.num_zeros / layer.num_weights
        rows.axes.barh(row, share, height=0.62, color=canvas.ACCENT)
        rows.axes.barh(row, 1 - share, left=share, height=0.62, color=canvas.PALE)
    rows.axes.set_xlim(0, 1)
    rows.axes.axvline(result.sparsity.reached, color=canvas.INK, linewidth=1)
    rows.axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    rows.axes.set_xlabel("sparsity; the line is that of all weights")
    counts = [f"{words.count(x.num_zeros)} of {words.count(x.num_weights)}" for x in layers]
    leverages = ["" if x.leverage is None else words.percent(x.leverage) for x in layers]
    rows.columns({"zeros": counts, "leverage": leverages})
    rows.put(rows.axes, *rows.room())
    hidden = canvas.not_drawn(len(result.layers) - len(layers), "layer", " of fewer weights")
    canvas.note(rows.figure, ["Leverage: how much the window says of a layer's weights.", *hidden])
    return rows.figure


@canvas.styled
def loss_figure(result: PruneResult) -> Figure:
    """Draw the loss over the sparsity, for each method.

    Args:
        result: the answer of ``hesscli prune``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    figure, (axes,) = canvas.panels(
        _title(result), canvas.provenance(result), [_TALL], left=0.9, right=2.0
    )
    ends = list[tuple[float, str]]()
    for method in result.methods:
        points = [(0.0, result.before.loss), *((x.sparsity, x.loss) for x in method.steps)]
        known = [(share, loss) for share, loss in points if loss is not None and loss > 0]
        if not known:
            continue
        colour = _COLOURS[method.name]
        axes.plot(*zip(*known, strict=True), "o-", color=colour, markersize=4, linewidth=1.6)
        ends.append((known[-1][1], method.name))
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("sparsity")
    axes.set_ylabel("loss, log scale")
    axes.grid()
    canvas.label_round(axes, 6)
    _name_lines(axes, ends)
    canvas.note(figure, ["Loss of the kept examples, after each step."])
    return figure


def _name_lines(axes: Any, ends: list[tuple[float, str]]) -> None:
    """Beside the frame, at the heights where lines end as far as there is room."""
    free = 1.0
    for loss, name in sorted(ends, reverse=True):
        height = (axes.transScale + axes.transLimits).transform((0.0, loss))[1]
        free = min(height, free)
        text = f"{NAMES[name]}: {words.number(loss)}"
        canvas.write(axes, text, (1, free), (10, -4), color=_COLOURS[name])
        free -= _NEAR


def _title(result: PruneResult) -> str:
    found = result.methods[0]
    before, after = (
        "not finite" if one.loss is None else words.number(one.loss)
        for one in (result.before, found)
    )
    share = words.percent(result.sparsity.reached)
    return f"Pruned to {share}: loss {before} before, {after} after"


def _size(layer: LayerPruned) -> float:
    return layer.num_weights


# -- Which pictures an answer has, by the names of their files -------------------------------------


def figures(result: PruneResult, _asked: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The layers, and the loss."""
    yield "prune", layer_figure(result)
    yield "prune_loss", loss_figure(result)
