"""What other dampings would make of a window, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.results import DampingPoint, IhvpResult

# In inches: the panels, what lies between and below them, the room for the lines' names, and
# the least distance from one name to the next.
_SHARES, _RESIDUAL, _BETWEEN, _BOTTOM = 3.0, 1.5, 0.35, 1.05
_LEFT, _NAMES, _LEADING = 0.75, 2.7, 0.2
_MOST_TICKS = 6


def sweep_figure(result: IhvpResult) -> Figure:
    """Draw span, leverage, agreement and residual against the damping.

    Args:
        result: an answer of ``hesscli ihvp`` with a sweep.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    points = sorted(result.sweep, key=lambda point: point.relative)
    with canvas.style():
        height = canvas.TOP + 0.25 + _SHARES + _BETWEEN + _RESIDUAL + _BOTTOM
        figure = canvas.page(height, _title(result), canvas.provenance(result))
        shares = figure.add_axes((0.1, 0.5, 0.6, 0.4))
        residual = figure.add_axes((0.1, 0.1, 0.6, 0.2))
        width = canvas.WIDTH - 2 * canvas.SIDE - _LEFT - _NAMES
        left = canvas.SIDE + _LEFT
        canvas.place(figure, residual, left, _BOTTOM, width, _RESIDUAL)
        canvas.place(figure, shares, left, _BOTTOM + _RESIDUAL + _BETWEEN, width, _SHARES)
        for axes in (shares, residual):
            _scale(axes, points, result.window.relative_damping)
        shares.set_xticks(shares.get_xticks(), [""] * len(points))
        _draw_shares(shares, points)
        _draw_residual(residual, points, words.matrix_name(result.problem))
        _mark_own(shares, residual, result)
        canvas.note(
            figure,
            (
                "The larger the damping, the more a ranking is magnitude |w|.",
                "Cosine: of y to y at the next smaller damping.",
                "Rank correlation: of saliencies with this run's.",
            ),
        )
    return figure


def _title(result: IhvpResult) -> str:
    return f"What damping makes of {words.seen_by(result)}"


def _scale(axes: Axes, points: list[DampingPoint], own: float) -> None:
    ends = [own, *(point.relative for point in points)]
    axes.set_xscale("log")
    axes.set_xlim(min(ends) / 2, max(ends) * 2)
    ticks = [point.relative for point in points]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_shares(axes: Axes, points: list[DampingPoint]) -> None:
    lines: dict[str, tuple[str, str, list[float | None]]] = {
        "median leverage": (canvas.ACCENT, "o", [p.leverage for p in points]),
        "share of ‖y‖ in the rows' span": (canvas.NEGATIVE, "s", [p.span_share for p in points]),
        "cosine of y to the next": (canvas.AMBER, "^", [p.cosine for p in points]),
        "rank correlation": (canvas.INK, "D", [p.rank_correlation for p in points]),
    }
    known = [value for _, _, values in lines.values() for value in values if value is not None]
    axes.set_ylim(min(0.0, *known) - 0.03, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.tick_params(axis="y", labelcolor=canvas.QUIET, labelsize=9)
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
    axes.annotate(
        name,
        (1.025, height),
        (9, 0),
        xycoords="axes fraction",
        textcoords="offset points",
        va="center_baseline",
        fontsize=9,
    )


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
        axes.plot(*zip(*drawn, strict=True), "o-", markersize=5, color=canvas.ACCENT)
        _scale_sizes(axes, [value for _, value in drawn])
        _name_line(axes, f"residual: {matrix} + damping", 0.5, canvas.ACCENT, "o")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("‖Ay − x‖ / ‖x‖")
    axes.set_xlabel("damping, relative to the mean of the window's diagonal, log scale")
    axes.grid()


def _scale_sizes(axes: Axes, values: list[float]) -> None:
    """A logarithmic y axis about some sizes, with at most a few round ticks."""
    low, high = min(values) / 2, max(values) * 2
    axes.set_ylim(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    inside = [tick for tick in ticks if low <= tick <= high]
    kept = inside[:: 1 + len(inside) // _MOST_TICKS]
    axes.set_yticks(kept, [f"{tick:g}" for tick in kept], color=canvas.QUIET, fontsize=9)


def _mark_own(shares: Axes, residual: Axes, result: IhvpResult) -> None:
    own = result.window.relative_damping
    for axes in (shares, residual):
        axes.axvline(own, color=canvas.QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    shares.annotate(
        f"this run: {own:.3g}",
        (own, 1),
        (0, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        color=canvas.QUIET,
    )
