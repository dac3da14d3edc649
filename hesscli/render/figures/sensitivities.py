"""What rounding or pruning a layer does to the loss, as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hesscli.render import perturbations, words
from hesscli.render.figures import canvas
from hesscli.render.figures.canvas import label_sizes, scale_by_size
from hesscli.results import HOLDS_WITHIN, IhvpResult, LayerSensitivity, Perturbation

_MOST_LAYERS = 30
# In inches: a row, what the legend takes above the panels, what lies below them, and the gap
# between the two; rounding gets this share of their width.
_ROW, _LEGEND, _BOTTOM, _GAP, _ROUNDING = 0.46, 0.85, 0.95, 0.3, 0.6
# In rows: how far the lanes of the two grids lie from the middle, and measured marks below.
_LANES = {"channel": -0.24, "tensor": 0.24, "weight": 0.0}
_BELOW = 0.23
# In points: the disc that bears the bits or the percentage, and what is written on it.
_DISC, _FONT = 10.5, 6.5


def sensitivity_figure(result: IhvpResult) -> Figure:
    """Draw the predicted loss changes of each layer on logarithmic axes.

    A disc bears the bits of a rounding or the percentage of a pruning and lies at the predicted
    change; a line to it starts at the quadratic term alone. Layers run in model order; with
    many, those of the largest changes are drawn.

    Args:
        result: an answer of ``hesscli ihvp`` with perturbations.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    layers = _most_sensitive(result.layers)
    verified = perturbations.verified(layers)
    tall = _ROW * max(len(layers), 2)
    with canvas.style():
        height = canvas.TOP + _LEGEND + tall + _BOTTOM
        figure = canvas.page(height, _title(result), canvas.provenance(result))
        rounding = figure.add_axes((0.3, 0.1, 0.3, 0.7))
        pruning = figure.add_axes((0.7, 0.1, 0.2, 0.7), sharey=rounding)
        canvas.name_rows(rounding, [layer.name for layer in layers])
        pruning.tick_params(labelleft=False)
        left = canvas.SIDE + canvas.names_width(rounding) + 0.1
        room = canvas.WIDTH - canvas.SIDE - left - _GAP
        panels = (
            (rounding, "round", left, _ROUNDING * room, "one layer rounded to so many bits"),
            (
                pruning,
                "prune",
                left + _ROUNDING * room + _GAP,
                (1 - _ROUNDING) * room,
                "least salient % set to zero",
            ),
        )
        for axes, kind, start, width, heading in panels:
            canvas.place(figure, axes, start, _BOTTOM, width, tall)
            _draw_panel(axes, layers, kind, width)
            _mark_loss(axes, result.problem.loss, heading)
        _draw_legend(figure, verified)
        canvas.note(figure, _notes(result, layers))
    return figure


def _most_sensitive(layers: Sequence[LayerSensitivity]) -> list[LayerSensitivity]:
    """Those of the largest change, at most so many, in their own order."""

    def worst(layer: LayerSensitivity) -> float:
        return max(map(perturbations.size, layer.perturbations), default=0.0)

    kept = sorted(layers, key=worst, reverse=True)[:_MOST_LAYERS]
    return [layer for layer in layers if layer in kept]


def _title(result: IhvpResult) -> str:
    title = "Predicted loss change where one layer is rounded or pruned"
    held = [change.holds for layer in result.layers for change in layer.perturbations]
    known = [holds for holds in held if holds is not None]
    if known:
        title += f"   ({words.count(sum(known))} of {words.count(len(known))} hold)"
    return title


def _draw_panel(axes: Axes, layers: list[LayerSensitivity], kind: str, width: float) -> None:
    changes = [
        (row, change)
        for row, layer in enumerate(layers)
        for change in layer.perturbations
        if change.kind == kind
    ]
    edges = perturbations.axis_edges(value for _, change in changes for value in _positions(change))
    scale_by_size(axes, edges)
    for row in range(len(layers) - 1):
        axes.axhline(row + 0.5, color=canvas.LINE, linewidth=0.6)
    # The finest first, so that what is coarser lies on top.
    for order, (row, change) in enumerate(sorted(changes, key=lambda pair: _coarseness(pair[1]))):
        _draw_change(axes, row + _LANES[change.granularity], change, 3 + order / 1000)
    if edges and edges[0] <= 0:
        axes.axvline(0, color=canvas.QUIET, linewidth=0.8)
    axes.set_xlabel("predicted loss change, log scale")
    axes.grid(axis="x")
    label_sizes(axes, edges, width)


def _positions(change: Perturbation) -> Iterator[float]:
    yield perturbations.predicted(change)
    yield change.quadratic
    if change.measured is not None:
        yield change.measured


def _coarseness(change: Perturbation) -> float:
    return change.level if change.kind == "prune" else -change.level


def _draw_change(axes: Axes, lane: float, change: Perturbation, order: float) -> None:
    total = perturbations.predicted(change)
    coarse = change.granularity == "tensor"
    fill, ink = (canvas.PALE, canvas.INK) if coarse else (canvas.ACCENT, "white")
    axes.plot((change.quadratic, total), (lane, lane), color=canvas.AMBER, linewidth=1.8, zorder=2)
    canvas.whisker(axes, lane, (total - change.stderr, total + change.stderr))
    axes.plot(total, lane, "o", markersize=_DISC, color=fill, zorder=order)
    axes.text(
        total,
        lane,
        f"{100 * change.level:.0f}" if change.kind == "prune" else f"{change.level:g}",
        color=ink,
        fontsize=_FONT,
        weight="bold",
        ha="center",
        va="center_baseline",
        zorder=order,
        clip_on=True,
    )
    if change.measured is not None:
        colour = canvas.NEGATIVE if change.holds is False else canvas.INK
        axes.plot(change.measured, lane + _BELOW, "^", markersize=4.5, color=colour, zorder=5)


def _mark_loss(axes: Axes, loss: float, heading: str) -> None:
    """The panel's heading, and a line where the change is as large as the loss."""
    axes.annotate(
        heading,
        (0, 1),
        (0, 22),
        xycoords="axes fraction",
        textcoords="offset points",
        color=canvas.QUIET,
        fontsize=9,
    )
    if axes.get_xlim()[0] < loss < axes.get_xlim()[1]:
        axes.axvline(loss, color=canvas.QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"the loss, {words.number(loss)}",
            (loss, 1),
            (0, 5),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=canvas.QUIET,
            fontsize=9,
            ha="center",
        )


def _draw_legend(figure: Figure, verified: bool) -> None:
    handles = [
        _disc(canvas.ACCENT, "one grid a channel, or pruned"),
        _disc(canvas.PALE, "one grid a tensor"),
        Line2D([], [], color=canvas.AMBER, linewidth=1.8, label="what the linear term adds"),
    ]
    if verified:
        limit = words.percent(HOLDS_WITHIN)
        handles += [
            _triangle(canvas.INK, "measured"),
            _triangle(canvas.NEGATIVE, f"measured, off by over {limit}"),
        ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(canvas.SIDE / canvas.WIDTH, 1 - canvas.TOP / figure.get_figheight()),
        ncols=len(handles),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
        columnspacing=1.6,
        fontsize=9,
    )


def _disc(colour: str, label: str) -> Line2D:
    size = _DISC - 2
    return Line2D([], [], linestyle="", marker="o", markersize=size, color=colour, label=label)


def _triangle(colour: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="", marker="^", markersize=5, color=colour, label=label)


def _notes(result: IhvpResult, layers: list[LayerSensitivity]) -> list[str]:
    notes = [
        "Discs lie at linear + quadratic term; the amber line starts at the quadratic one alone.",
        "Black lines, where wider than a disc, are ± one standard error.",
    ]
    hidden = len(result.layers) - len(layers)
    if hidden:
        notes.append(f"{words.count(hidden, 'layer')} of smaller changes not drawn.")
    return notes
