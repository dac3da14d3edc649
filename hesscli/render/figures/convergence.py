"""How the largest eigenvalues settled, step by step."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.results import SpectrumResult

_TALL, _BETWEEN, _BOTTOM, _LEFT = 2.6, 0.5, 0.95, 0.75


_LEAST, _MOST = 1e-17, 10.0  # bars beside sizes, as far as they are drawn


def convergence_figure(result: SpectrumResult) -> Figure:
    """Draw the largest Ritz values after each step, and below them their bars.

    Args:
        result: the answer of ``hesscli spectrum``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    with canvas.style():
        height = canvas.TOP + 2 * _TALL + _BETWEEN + _BOTTOM
        figure = canvas.page(height, _title(result), canvas.provenance(result))
        values = figure.add_axes((0.1, 0.5, 0.8, 0.4))
        bars = figure.add_axes((0.1, 0.1, 0.8, 0.4), sharex=values)
        width = canvas.WIDTH - 2 * canvas.SIDE - _LEFT
        left = canvas.SIDE + _LEFT
        canvas.place(figure, bars, left, _BOTTOM, width, _TALL)
        canvas.place(figure, values, left, _BOTTOM + _TALL + _BETWEEN, width, _TALL)
        _draw(values, bars, result)
        canvas.note(figure, ["Each line is one eigenvalue, the largest darkest."])
    return figure


def _title(result: SpectrumResult) -> str:
    return f"How the largest eigenvalues of the {words.matrix_name(result.problem)} settled"


def _draw(values: Axes, bars: Axes, result: SpectrumResult) -> None:
    points = result.convergence
    most = max((len(point.values) for point in points), default=0)
    for rank in range(most):
        seen = [point for point in points if len(point.values) > rank]
        steps = [point.steps for point in seen]
        colour = canvas.ACCENT if rank == 0 else canvas.QUIET
        strength = 1 - 0.6 * rank / max(most - 1, 1)
        relative = [_relative(point.values[rank], point.residuals[rank]) for point in seen]
        for axes, heights in ((values, [point.values[rank] for point in seen]), (bars, relative)):
            axes.plot(steps, heights, color=colour, alpha=strength, linewidth=1.3)
    values.set_ylabel("eigenvalue")
    values.set_ylim(bottom=min(0.0, *(v for point in points for v in point.values)))
    values.tick_params(length=0, labelcolor=canvas.QUIET, labelsize=9)
    values.grid(axis="y")
    _log_axis(bars)
    bars.set_ylabel("bar beside its size")
    bars.set_xlabel("steps")
    bars.tick_params(length=0)
    bars.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    bars.grid(axis="y")


def _relative(value: float, residual: float) -> float:
    return min(max(residual / abs(value), _LEAST), _MOST) if value else _MOST


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    first, last = math.floor(math.log10(low)), min(math.ceil(math.log10(high)), 1)
    every = 1 + (last - first) // 6
    powers = range(last, first - 1, -every)
    axes.set_ylim(10.0**first, 10.0**last)
    axes.set_yticks(
        [10.0**p for p in powers],
        [f"{10.0**p:g}" for p in powers],
        color=canvas.QUIET,
        fontsize=9,
    )
    axes.yaxis.set_minor_locator(NullLocator())
