"""Sensitivities as pictures: what changes do to the loss, and how saliencies spread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hesscli.render import bins, words
from hesscli.render.figures import canvas
from hesscli.render.figures.canvas import label_sizes, scale_by_size
from hesscli.render.figures.ihvp_checks import calibration_figure, sweep_figure
from hesscli.render.figures.rows import SHAPES, Rows, draw_shape, draw_spread, mark_mean
from hesscli.results import (
    HOLDS_WITHIN,
    LOW_LEVERAGE,
    IhvpResult,
    Interval,
    LayerSensitivity,
    Perturbation,
    SaliencyReport,
)

# -- What rounding or pruning a layer does to the loss ---------------------------------------------


_MOST_LAYERS = 30
_LANES_HIGH = ((1, 0.92), (_MOST_LAYERS, 0.46))
# In inches: what the legend takes above the panels, and the gap between the two; rounding gets
# this share of their width.
_LEGEND, _BETWEEN, _ROUNDING = 0.85, 0.3, 0.6
# In rows: how far the lanes of the two grids lie from the middle, and measured marks below.
_LANES = {"channel": -0.24, "tensor": 0.24, "weight": 0.0}
_BELOW = 0.23
# In points: the disc that bears the bits or the percentage, what is written on it, and a digit.
_DISC, _FONT, _DIGIT = 10.5, 6.5, 4.6


@canvas.styled
def sensitivity_figure(result: IhvpResult) -> Figure:
    """Draw the predicted loss changes of each layer on logarithmic axes.

    A disc bears the bits of a rounding or the percentage of a pruning and lies at the predicted
    change; those that would touch are one long disc with all their numbers, from left to right. A
    line to it starts at the quadratic term alone. Layers run in model order; with many, those of
    the largest changes are drawn.

    Args:
        result: an answer of ``hesscli ihvp`` with perturbations.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    layers = words.largest(result.layers, _MOST_LAYERS, _largest_change)
    rows = Rows(
        _changes_title(result),
        canvas.provenance(result),
        [layer.name for layer in layers],
        _LANES_HIGH,
        above=_LEGEND,
    )
    pruning = rows.panel()
    left, room = rows.room(_BETWEEN)
    rows.put(rows.axes, left, _ROUNDING * room)
    rows.put(pruning, left + _ROUNDING * room + _BETWEEN, (1 - _ROUNDING) * room)
    for axes, kind, heading in (
        (rows.axes, "round", "one layer rounded to so many bits"),
        (pruning, "prune", "least salient % set to zero"),
    ):
        _draw_changes(axes, layers, kind)
        canvas.write(axes, heading, (0, 1), (0, 22), color=canvas.QUIET)
        low, high = axes.get_xlim()
        if low < (loss := result.problem.loss) < high:
            canvas.mark(axes, loss, f"the loss, {words.number(loss)}")
    measured = [x.measured for layer in layers for x in layer.perturbations]
    _draw_legend(rows.figure, any(loss is not None for loss in measured))
    notes = [
        "Discs lie at linear + quadratic term; those that would touch are one, numbered from left "
        "to right. The amber line starts at the quadratic term alone.",
        "Black lines, where wider than a disc, are 95% intervals.",
        *canvas.not_drawn(len(result.layers) - len(layers), "layer", " of smaller changes"),
    ]
    canvas.note(rows.figure, notes)
    return rows.figure


def _largest_change(layer: LayerSensitivity) -> float:
    return max((change.size() for change in layer.perturbations), default=0.0)


def _changes_title(result: IhvpResult) -> str:
    title = "Predicted loss change where one layer is rounded or pruned"
    held = [change.holds for layer in result.layers for change in layer.perturbations]
    known = [holds for holds in held if holds is not None]
    if known:
        title += f"   ({words.count(sum(known))} of {words.count(len(known))} hold)"
    return title


def _draw_changes(axes: Axes, layers: list[LayerSensitivity], kind: str) -> None:
    changes = [
        (row, change)
        for row, layer in enumerate(layers)
        for change in layer.perturbations
        if change.kind == kind
    ]
    edges = canvas.axis_edges(value for _, change in changes for value in _positions(change))
    scale_by_size(axes, edges)
    for row in range(len(layers) - 1):
        axes.axhline(row + 0.5, color=canvas.LINE, linewidth=0.6)
    lanes: dict[float, list[Perturbation]] = {}
    for row, change in changes:
        lane = row + _LANES[change.granularity]
        _draw_terms(axes, lane, change)
        lanes.setdefault(lane, []).append(change)
    for lane, alike in lanes.items():
        for group in _grouped(axes, alike):
            _draw_discs(axes, lane, group)
    if edges and edges[0] <= 0:
        axes.axvline(0, color=canvas.QUIET, linewidth=0.8)
    axes.set_xlabel(f"predicted loss change, {canvas.log_scale(axes.xaxis)}")
    axes.grid(axis="x")
    label_sizes(axes, edges)


def _positions(change: Perturbation) -> Iterator[float]:
    yield change.predicted
    yield change.quadratic
    if change.measured is not None:
        yield change.measured


def _draw_terms(axes: Axes, lane: float, change: Perturbation) -> None:
    """What the linear term adds, the interval, and what was measured."""
    total = change.predicted
    axes.plot((change.quadratic, total), (lane, lane), color=canvas.AMBER, linewidth=1.8, zorder=2)
    bar = words.bar(change.stderr)
    canvas.whisker(axes, lane, (total - bar, total + bar))
    if change.measured is not None:
        colour = canvas.NEGATIVE if change.holds is False else canvas.INK
        axes.plot(change.measured, lane + _BELOW, "^", markersize=4.5, color=colour, zorder=5)


@dataclass(frozen=True)
class _Group:
    """Changes of one lane whose discs touch, from left to right.

    ``ends`` are in points: from the first disc's middle to the last one's, or as far as the
    text needs.
    """

    changes: tuple[Perturbation, ...]
    ends: Interval

    @property
    def text(self) -> str:
        """The bits or percentages that a disc bears."""
        change = self.changes[0]
        factor = 100 if change.kind == "prune" else 1
        return " ".join(f"{factor * change.level:.0f}" for change in self.changes)


def _grouped(axes: Axes, changes: list[Perturbation]) -> list[_Group]:
    """Make one of discs that would touch, until none do."""
    groups: list[_Group] = []
    for change in sorted(changes, key=lambda change: change.predicted):
        groups.append(_group(axes, (change,)))
        while len(groups) > 1 and groups[-1].ends[0] - groups[-2].ends[1] < _DISC:
            right, left = groups.pop(), groups.pop()
            groups.append(_group(axes, left.changes + right.changes))
    return groups


def _group(axes: Axes, changes: tuple[Perturbation, ...]) -> _Group:
    places = [(change.predicted, 0.0) for change in changes]
    across = axes.transData.transform(places)[:, 0] * 72 / axes.figure.dpi
    low, high = float(across[0]), float(across[-1])
    wanted = _DIGIT * (len(_Group(changes, (low, high)).text) - 2)
    more = max(wanted - (high - low), 0.0) / 2
    return _Group(changes, (low - more, high + more))


def _draw_discs(axes: Axes, lane: float, group: _Group) -> None:
    """A disc at each change, one long one where they touch, and on it their levels."""
    coarse = group.changes[0].granularity == "tensor"
    fill, ink = (canvas.PALE, canvas.INK) if coarse else (canvas.ACCENT, "white")
    pixels = [(end * axes.figure.dpi / 72, 0.0) for end in group.ends]
    low, high = axes.transData.inverted().transform(pixels)[:, 0]
    axes.plot((low, high), (lane, lane), color=fill, lw=_DISC, solid_capstyle="round", zorder=3)
    places = [change.predicted for change in group.changes]
    axes.plot(places, [lane] * len(places), "o", markersize=_DISC, color=fill, zorder=3)
    axes.annotate(
        group.text,
        (low, lane),
        ((group.ends[1] - group.ends[0]) / 2, 0),
        textcoords="offset points",
        color=ink,
        fontsize=_FONT,
        weight="bold",
        ha="center",
        va="center_baseline",
        zorder=4,
        annotation_clip=True,
    )


def _draw_legend(figure: Figure, verified: bool) -> None:
    handles = [
        canvas.symbol("o", canvas.ACCENT, "one grid a channel, or pruned", _DISC - 2),
        canvas.symbol("o", canvas.PALE, "one grid a tensor", _DISC - 2),
        Line2D([], [], color=canvas.AMBER, linewidth=1.8, label="what the linear term adds"),
    ]
    if verified:
        limit = words.percent(HOLDS_WITHIN)
        handles += [
            canvas.symbol("^", canvas.INK, "measured", 5),
            canvas.symbol("^", canvas.NEGATIVE, f"measured, off by over {limit}", 5),
        ]
    canvas.legend(figure, handles, handlelength=1.2, columnspacing=1.6)


# -- The saliencies of weights, layer by layer from the highest mean down --------------------------


@canvas.styled
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
    spectra = bins.trimmed([layer.saliency.histogram for layer in layers])
    rows = Rows(
        _saliency_title(layers),
        canvas.provenance(result),
        [layer.name for layer in layers],
        SHAPES,
        above=0.2,
        below=1.0,
    )
    scale_by_size(rows.axes, spectra[0].edges)
    for row, (layer, histogram) in enumerate(zip(layers, spectra, strict=True)):
        pale = layer.ranked_by == "magnitude"
        draw_shape(rows.axes, row, histogram, {1: canvas.PALE if pale else canvas.ACCENT})
        _draw_saliency(rows.axes, row, layer.saliency)
    rows.columns(
        {
            "mean": [
                words.with_error(x.saliency.mean, words.bar(x.saliency.stderr)) for x in layers
            ],
            "above next": [words.probability(layer.above_next) for layer in layers],
            "leverage": [words.probability(layer.leverage) for layer in layers],
            "this ranking is": [layer.ranked_by for layer in layers],
        }
    )
    scale = canvas.log_scale(rows.axes.xaxis)
    rows.axes.set_xlabel(f"saliency of a weight, {scale}: a ranking, not a loss change")
    rows.axes.grid(axis="x")
    rows.put(rows.axes, *rows.room())
    label_sizes(rows.axes, spectra[0].edges)
    canvas.note(rows.figure, _saliency_notes(result, layers))
    return rows.figure


def _saliency_title(layers: list[LayerSensitivity]) -> str:
    first = layers[0]
    if first.rank > 1 or first.above_next is None:
        return "Saliency of weights, by layer"
    name = words.shorten_all([layer.name for layer in layers], 32)[0]
    sure = words.probability(first.above_next)
    return f"Saliency of weights: {name} ranks highest   (probability {sure})"


def _draw_saliency(axes: Axes, row: int, saliency: SaliencyReport) -> None:
    """The 5% to the 95% quantile with the median, and the mean; zero has no place."""
    above_zero = [quantile for quantile in saliency.quantiles if quantile.value > 0]
    inner = [quantile.value for quantile in above_zero if 0.05 <= quantile.level <= 0.95]
    median = next((quantile.value for quantile in above_zero if quantile.level == 0.5), None)
    if inner:
        draw_spread(axes, row, (min(inner), max(inner)), median)
    if saliency.mean > 0:
        mark_mean(axes, row, saliency.mean)


def _saliency_notes(result: IhvpResult, layers: list[LayerSensitivity]) -> list[str]:
    notes = [
        "Heights are logarithms of counts, in each layer up to its own highest.",
        "Lines run from the 5% to the 95% quantile; dots are medians, diamonds means.",
        "Above next: probability of a higher mean; ± is 95%.",
    ]
    if any(layer.ranked_by == "magnitude" for layer in layers):
        limit = words.percent(LOW_LEVERAGE)
        notes.append(
            f"Pale: median leverage below {limit}, damping and not data decides: "
            "this ranking is magnitude |w|."
        )
    zeros = sum(x.num_parameters - sum(x.saliency.histogram.counts) for x in layers)
    notes += canvas.not_drawn(zeros, "weight", " of zero saliency")
    return notes + canvas.not_drawn(len(result.layers) - len(layers), "lower layer")


# -- Which pictures an answer has, by the names of their files -------------------------------------


def figures(result: IhvpResult, _asked: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """What changes cost, which weights matter, and how both were checked."""
    changes = [change for layer in result.layers for change in layer.perturbations]
    if changes:
        yield "ihvp", sensitivity_figure(result)
    if result.layers:
        yield "ihvp_saliency", saliency_figure(result)
    if any(change.measured is not None for change in changes):
        yield "ihvp_calibration", calibration_figure(result)
    if result.sweep:
        yield "ihvp_damping", sweep_figure(result)
