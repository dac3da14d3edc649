"""Whether sensitivities can be believed, as pictures: against measurements, at other dampings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.render.figures.canvas import label_heights, label_sizes, scale_by_size
from hesscli.results import (
    HOLDS_WITHIN,
    DampingPoint,
    IhvpResult,
    Interval,
    LayerSensitivity,
    Perturbation,
    ScaledChange,
)

# -- Predicted loss changes against measured ones --------------------------------------------------


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
    0.25: ("a quarter", "s", canvas.GREY),
}


@dataclass(frozen=True)
class _Point:
    layer: str
    change: Perturbation
    scaled: ScaledChange

    @property
    def size(self) -> float:
        """|linear| + |quadratic| of the change at its scale."""
        return self.change.size(self.scaled.scale)

    @property
    def miss(self) -> float:
        """The error as a share of the size."""
        return abs(self.scaled.measured - self.scaled.predicted) / self.size if self.size else 0.0

    @property
    def holds(self) -> bool:
        """Whether the miss is small."""
        return self.miss <= HOLDS_WITHIN


@canvas.styled
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
    bottom = _BOTTOM + foot + _BELOW
    held, limit = words.count(len(full) - len(failed)), words.percent(HOLDS_WITHIN)
    title = f"{held} of {words.count(len(full))} predicted loss changes hold to {limit}"
    height = canvas.TOP + _LEGEND + _SIDE + bottom
    figure = canvas.page(height, title, canvas.provenance(result))
    both, misses = figure.add_axes((0.1, 0.3, 0.4, 0.5)), figure.add_axes((0.6, 0.3, 0.3, 0.5))
    canvas.place(figure, both, canvas.SIDE + _LABELS, bottom, _SIDE, _SIDE)
    left = canvas.SIDE + 2 * _LABELS + _SIDE + _GAP
    canvas.place(figure, misses, left, bottom, canvas.WIDTH - canvas.SIDE - left, _SIDE)
    _draw_both(both, points)
    _draw_misses(misses, points)
    _draw_legend(figure, points)
    _list_misses(figure, listed, len(failed), foot)
    canvas.note(figure, _calibration_notes(full))
    return figure


def _points(layers: Iterable[LayerSensitivity]) -> Iterable[_Point]:
    for layer in layers:
        for change in layer.perturbations:
            yield from (_Point(layer.name, change, scaled) for scaled in change.changes)


def _draw_both(axes: Axes, points: list[_Point]) -> None:
    """Measured against predicted, with the diagonal and the band within which they agree."""
    values = [value for p in points for value in (p.scaled.predicted, p.scaled.measured)]
    edges = canvas.axis_edges(values)
    line = _scale_alike(axes, edges)
    within = HOLDS_WITHIN * np.abs(line)
    axes.fill_between(line, line - within, line + within, color=canvas.LINE, linewidth=0)
    axes.plot(line, line, color=canvas.QUIET, linewidth=0.8)
    _draw_points(axes, points, lambda point: (point.scaled.predicted, point.scaled.measured))
    scale = canvas.log_scale(axes.xaxis)
    axes.set_xlabel(f"predicted loss change, {scale}")
    axes.set_ylabel(f"measured loss change, {scale}")
    axes.grid()
    label_sizes(axes, edges)
    axes.tick_params(axis="x", pad=8)  # apart from the first label of the other axis
    label_heights(axes, list(axes.get_xticks()))


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
    edges = canvas.axis_edges(point.size for point in drawn)
    scale_by_size(axes, edges)
    label_sizes(axes, edges)
    ticks = [t for t in (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0) if low <= t <= high]
    label_heights(axes, ticks, [f"{100 * tick:g}%" for tick in ticks])
    axes.set_xlabel(f"|linear| + |quadratic|, {canvas.log_scale(axes.xaxis)}")
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
        handles.append(canvas.symbol(marker, colour, label))
    if any(point.scaled.scale == 1 and not point.holds for point in points):
        handles.append(canvas.symbol("o", canvas.NEGATIVE, "full size, does not hold"))
    canvas.legend(figure, handles)


def _list_misses(figure: Figure, listed: list[_Point], failed: int, foot: float) -> None:
    """The largest errors at full size, by name."""
    if not listed:
        return
    which = f"the largest {len(listed)} of " if failed > len(listed) else ""
    heading = f"do not hold at full size: {which}{words.count(failed)}"
    names = words.shorten_all([point.layer for point in listed], 44)
    lines = [
        f"{name}, {words.change_name(point.change)}: "
        f"predicted {words.number(point.scaled.predicted, 2)}, "
        f"measured {words.number(point.scaled.measured, 2)}, off by {words.percent(point.miss)}"
        for name, point in zip(names, listed, strict=True)
    ]
    tall, top = figure.get_figheight(), _BOTTOM + foot - 0.2
    for index, line in enumerate((heading, *lines)):
        left = canvas.SIDE + (0.15 if index else 0.0)
        colour = canvas.INK if index else canvas.QUIET
        place = left / canvas.WIDTH, (top - _LEADING * index) / tall
        figure.text(*place, line, color=colour, **canvas.SMALL)


def _calibration_notes(full: list[_Point]) -> list[str]:
    limit = words.percent(HOLDS_WITHIN)
    notes = [f"Grey: within {limit} of the diagonal, or of |linear| + |quadratic|."]
    orders = [point.change.order for point in full if point.change.order is not None]
    if orders:
        notes.append(
            f"Errors fall with the scale to the power {median(orders):.1f} (median); "
            "3 where the loss is smooth."
        )
    return notes


# -- What other dampings would make of a window ----------------------------------------------------


# In inches: the two panels, and the room for the lines' names.
_SHARES, _RESIDUAL, _NAMES = 3.0, 1.5, 2.7
_MOST_TICKS = 6


@canvas.styled
def sweep_figure(result: IhvpResult) -> Figure:
    """Draw span, leverage, agreement and residual against the damping.

    Args:
        result: an answer of ``hesscli ihvp`` with a sweep.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    points = sorted(result.sweep, key=lambda point: point.relative)
    figure, (shares, residual) = canvas.panels(
        f"What damping makes of {words.seen_by(result)}",
        canvas.provenance(result),
        (_SHARES, _RESIDUAL),
        right=_NAMES,
        between=0.35,
        above=0.25,
    )
    _scale_dampings(residual, points, result.window.relative_damping)
    shares.tick_params(labelbottom=False)
    _draw_shares(shares, points)
    _draw_residual(residual, points, words.matrix_name(result.problem))
    own = result.window.relative_damping
    canvas.mark(shares, own, f"this run: {own:.3g}")
    canvas.mark(residual, own)
    canvas.note(
        figure,
        (
            "The larger the damping, the more a ranking is magnitude |w|.",
            "Cosine: of y to y at the next smaller damping.",
            "Rank correlation: of saliencies with this run's.",
        ),
    )
    return figure


def _scale_dampings(axes: Axes, points: list[DampingPoint], own: float) -> None:
    ends = [own, *(point.relative for point in points)]
    axes.set_xscale("log")
    axes.set_xlim(min(ends) / 2, max(ends) * 2)
    ticks = [point.relative for point in points]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("damping, relative to the mean of the window's diagonal, log scale")


def _draw_shares(axes: Axes, points: list[DampingPoint]) -> None:
    lines: dict[str, tuple[str, str, list[float | None]]] = {
        "median leverage": (canvas.ACCENT, "o", [p.leverage for p in points]),
        "share of ‖y‖ in the rows' span": (canvas.NEGATIVE, "s", [p.span_share for p in points]),
        "cosine of y to the next": (canvas.AMBER, "^", [p.cosine for p in points]),
        "rank correlation": (canvas.INK, "D", [p.rank_correlation for p in points]),
    }
    known = [value for _, _, values in lines.values() for value in values if value is not None]
    axes.set_ylim(min(0.0, *known) - 0.03, 1.05)
    label_heights(axes, [0, 0.25, 0.5, 0.75, 1])
    axes.grid()
    ends: dict[str, float] = {}
    for name, (colour, marker, values) in lines.items():
        drawn = [(p.relative, v) for p, v in zip(points, values, strict=True) if v is not None]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), marker=marker, markersize=5, color=colour)
            ends[name] = drawn[-1][1]
    low, high = axes.get_ylim()
    heights = _apart([(end - low) / (high - low) * _SHARES for end in ends.values()])
    for name, height in zip(ends, heights, strict=True):
        _name_line(axes, name, height / _SHARES, lines[name][0], lines[name][1])


def _name_line(axes: Axes, name: str, height: float, colour: str, marker: str) -> None:
    """The line's name to the right of the frame, behind its mark."""
    axes.plot(
        1.025, height, marker, markersize=5, color=colour, transform=axes.transAxes, clip_on=False
    )
    canvas.write(axes, name, (1.025, height), (9, 0), va="center_baseline")


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights in inches moved down where they are closer than one line is to the next."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=lambda index: -moved[index])
    for above, below in pairwise(order):
        moved[below] = min(moved[below], moved[above] - _LEADING)
    return moved


def _draw_residual(axes: Axes, points: list[DampingPoint], matrix: str) -> None:
    drawn = [
        (point.relative, point.operator_residual)
        for point in points
        if point.operator_residual is not None and point.operator_residual > 0
    ]
    axes.set_yscale("log")
    if drawn:
        residuals = [residual for _, residual in drawn]
        axes.plot(*zip(*drawn, strict=True), "o-", markersize=5, color=canvas.ACCENT)
        axes.set_ylim(min(residuals) / 2, max(residuals) * 2)
        canvas.label_round(axes, _MOST_TICKS)
        _name_line(axes, f"residual: {matrix} + damping", 0.5, canvas.ACCENT, "o")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("‖Ay − x‖ / ‖x‖")
    axes.grid()
