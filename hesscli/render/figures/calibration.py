"""Predicted loss changes against measured ones, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from hesscli.render import perturbations, words
from hesscli.render.figures import canvas
from hesscli.render.figures.canvas import label_sizes, scale_by_size
from hesscli.results import (
    HOLDS_WITHIN,
    IhvpResult,
    Interval,
    LayerSensitivity,
    Perturbation,
    ScaledChange,
)

# In inches: the panels, the gap between them, the room left of each for its labels, what the
# legend takes above and the axes below, and a line of text.
_SIDE, _GAP, _LABELS, _LEGEND, _BELOW, _LEADING = 4.25, 0.2, 0.75, 0.5, 0.6, 0.21
_BOTTOM = 0.45
_MOST_LISTED = 6
_LEAST_MISS = 1e-5
"""Smaller errors are drawn here: below, losses are rounded."""
_SCALES = {
    1.0: ("full size", "o", canvas.ACCENT),
    0.5: ("half", "^", canvas.AMBER),
    0.25: ("a quarter", "s", "#98a3ae"),
}


@dataclass(frozen=True)
class _Point:
    layer: str
    change: Perturbation
    scaled: ScaledChange

    @property
    def size(self) -> float:
        """|linear| + |quadratic|."""
        return perturbations.size(self.change, self.scaled.scale)

    @property
    def miss(self) -> float:
        """The error as a share of the size."""
        return perturbations.miss(self.change, self.scaled) or 0.0

    @property
    def holds(self) -> bool:
        """Whether that is small."""
        return self.miss <= HOLDS_WITHIN


def calibration_figure(result: IhvpResult) -> Figure:
    """Draw how well predicted loss changes agree with measured ones.

    On the left one against the other, on the right the error as a share of |linear| +
    |quadratic|; below, the largest errors at full size by name.

    Args:
        result: an answer of ``hesscli ihvp --verify``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    points = list(_points(result.layers))
    full = [point for point in points if point.scaled.scale == 1]
    failed = sorted((p for p in full if not p.holds), key=lambda point: -point.miss)
    listed = failed[:_MOST_LISTED]
    foot = _LEADING * (len(listed) + 1.6) if listed else 0.0
    with canvas.style():
        height = canvas.TOP + _LEGEND + _SIDE + _BELOW + foot + _BOTTOM
        figure = canvas.page(height, _title(full, failed), canvas.provenance(result))
        both, misses = figure.add_axes((0.1, 0.3, 0.4, 0.5)), figure.add_axes((0.6, 0.3, 0.3, 0.5))
        bottom = _BOTTOM + foot + _BELOW
        canvas.place(figure, both, canvas.SIDE + _LABELS, bottom, _SIDE, _SIDE)
        left = canvas.SIDE + 2 * _LABELS + _SIDE + _GAP
        canvas.place(figure, misses, left, bottom, canvas.WIDTH - canvas.SIDE - left, _SIDE)
        _draw_both(both, points)
        _draw_misses(misses, points)
        _draw_legend(figure, points)
        _list_misses(figure, listed, len(failed), foot)
        canvas.note(figure, _notes(full))
    return figure


def _points(layers: Iterable[LayerSensitivity]) -> Iterable[_Point]:
    for layer in layers:
        for change in layer.perturbations:
            yield from (_Point(layer.name, change, scaled) for scaled in change.changes)


def _title(full: list[_Point], failed: list[_Point]) -> str:
    held = words.count(len(full) - len(failed))
    limit = words.percent(HOLDS_WITHIN)
    return f"{held} of {words.count(len(full))} predicted loss changes hold to {limit}"


def _draw_both(axes: Axes, points: list[_Point]) -> None:
    """Measured against predicted, with the diagonal and the band within which they agree."""
    values = [value for p in points for value in (p.scaled.predicted, p.scaled.measured)]
    edges = perturbations.axis_edges(values)
    line = _scale_alike(axes, edges)
    within = HOLDS_WITHIN * np.abs(line)
    axes.fill_between(line, line - within, line + within, color=canvas.LINE, linewidth=0)
    axes.plot(line, line, color=canvas.QUIET, linewidth=0.8)
    _draw_points(axes, points, lambda point: (point.scaled.predicted, point.scaled.measured))
    axes.set_xlabel("predicted loss change, log scale")
    axes.set_ylabel("measured loss change, log scale")
    axes.grid()
    label_sizes(axes, edges, _SIDE)
    axes.tick_params(axis="x", pad=8)  # apart from the first label of the other axis
    ticks = axes.get_xticks()
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], color=canvas.QUIET, fontsize=9)
    axes.yaxis.set_minor_locator(NullLocator())


def _scale_alike(axes: Axes, edges: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Scale both axes for some sizes.

    Returns:
        Values from one end to the other, evenly spread as they are drawn.
    """
    scale_by_size(axes, edges)
    forward = axes.xaxis.get_transform()
    backward = forward.inverted()
    axes.set_yscale("function", functions=(forward.transform, backward.transform))
    axes.set_ylim(axes.get_xlim())
    left, right = forward.transform(np.array(axes.get_xlim()))
    return np.asarray(backward.transform(np.linspace(float(left), float(right), 400)))


def _draw_misses(axes: Axes, points: list[_Point]) -> None:
    """The error as a share of the size, against the size."""
    drawn = [point for point in points if point.size > 0]
    axes.set_xscale("log")
    axes.set_yscale("log")
    limit = HOLDS_WITHIN
    shares = [max(point.miss, _LEAST_MISS) for point in drawn]
    low, high = min((limit / 2, *shares)) / 1.5, max((2 * limit, *shares)) * 1.5
    axes.set_ylim(low, high)
    axes.axhspan(low, limit, color=canvas.LINE, alpha=0.45, linewidth=0)
    axes.axhline(limit, color=canvas.QUIET, linewidth=0.8)
    _draw_points(axes, drawn, lambda point: (point.size, max(point.miss, _LEAST_MISS)))
    edges = perturbations.axis_edges(point.size for point in drawn)
    scale_by_size(axes, edges)
    label_sizes(axes, edges, axes.get_position().width * canvas.WIDTH)
    ticks = [t for t in (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0) if low <= t <= high]
    axes.set_yticks(ticks, [f"{100 * t:g}%" for t in ticks], color=canvas.QUIET, fontsize=9)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("|linear| + |quadratic|, log scale")
    axes.set_ylabel("error as a share of it")
    axes.grid()


def _draw_points(axes: Axes, points: list[_Point], where: Callable[[_Point], Interval]) -> None:
    """A mark for each point in its scale's shape and colour; red where full size does not hold."""
    for scale, (_, marker, colour) in _SCALES.items():
        for holds in (True, False):
            drawn = [p for p in points if p.scaled.scale == scale and p.holds == holds]
            if drawn:
                axes.plot(
                    *zip(*map(where, drawn), strict=True),
                    marker,
                    color=colour if holds or scale < 1 else canvas.NEGATIVE,
                    markersize=6 if scale == 1 else 4.5,
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                    zorder=3 + scale,
                )


def _draw_legend(figure: Figure, points: list[_Point]) -> None:
    """How many predictions hold at each scale."""
    limit, handles = words.percent(HOLDS_WITHIN), []
    for scale, (name, marker, colour) in _SCALES.items():
        drawn = [point for point in points if point.scaled.scale == scale]
        held = words.count(sum(point.holds for point in drawn))
        label = f"{name}: {held} of {words.count(len(drawn))} within {limit}"
        handles.append(_mark(marker, colour, label))
    if any(point.scaled.scale == 1 and not point.holds for point in points):
        handles.append(_mark("o", canvas.NEGATIVE, "full size, does not hold"))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(canvas.SIDE / canvas.WIDTH, 1 - canvas.TOP / figure.get_figheight()),
        ncols=len(handles),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1,
        fontsize=9,
    )


def _mark(marker: str, colour: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, markersize=6, color=colour, label=label)


def _list_misses(figure: Figure, listed: list[_Point], failed: int, foot: float) -> None:
    """The largest errors at full size, by name."""
    if not listed:
        return
    which = f"the largest {len(listed)} of " if failed > len(listed) else ""
    heading = f"do not hold at full size: {which}{words.count(failed)}"
    names = words.shorten_all([point.layer for point in listed], 44)
    lines = [
        f"{name}, {perturbations.label(point.change)}: "
        f"predicted {words.number(point.scaled.predicted, 2)}, "
        f"measured {words.number(point.scaled.measured, 2)}, off by {words.percent(point.miss)}"
        for name, point in zip(names, listed, strict=True)
    ]
    tall, top = figure.get_figheight(), _BOTTOM + foot - 0.2
    for index, line in enumerate((heading, *lines)):
        figure.text(
            (canvas.SIDE + (0.15 if index else 0.0)) / canvas.WIDTH,
            (top - _LEADING * index) / tall,
            line,
            color=canvas.INK if index else canvas.QUIET,
            fontsize=9,
        )


def _notes(full: list[_Point]) -> list[str]:
    limit = words.percent(HOLDS_WITHIN)
    notes = [f"Grey: within {limit} of the diagonal, or of |linear| + |quadratic|."]
    orders = [point.change.order for point in full if point.change.order is not None]
    if orders:
        notes.append(
            f"Errors fall with the scale to the power {median(orders):.1f} (median); "
            "3 where the loss is smooth."
        )
    return notes
