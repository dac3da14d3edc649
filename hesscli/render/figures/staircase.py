"""The largest eigenvalues in their order, as a staircase."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.render.tables.spectrum import compared_with_classes, standing_apart
from hesscli.results import SpectrumResult

_TALL, _BOTTOM, _LEFT = 3.6, 1.05, 0.75


def staircase_figure(result: SpectrumResult) -> Figure:
    """Draw the largest eigenvalues in descending order, with their bars, on a log scale.

    Steps are drawn where eigenvalues stand alone, so that their order is known. A line marks the
    widest step, another the number of classes.

    Args:
        result: the answer of ``hesscli spectrum``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    steps = _steps(result)
    with canvas.style():
        height = canvas.TOP + _TALL + _BOTTOM
        figure = canvas.page(height, _title(result), canvas.provenance(result))
        axes = figure.add_axes((0.1, 0.1, 0.8, 0.6))
        width = canvas.WIDTH - 2 * canvas.SIDE - _LEFT
        canvas.place(figure, axes, canvas.SIDE + _LEFT, _BOTTOM, width, _TALL)
        _draw(axes, steps, result)
        canvas.note(figure, _notes(result))
    return figure


def _steps(result: SpectrumResult) -> list[float]:
    """The positive eigenvalues that stand alone, each as often as it was found, descending."""
    density, size = result.density, result.problem.num_parameters
    found: list[float] = []
    for node, weight, alone in zip(density.nodes, density.weights, density.isolated, strict=True):
        if alone and node > 0:
            found += [node] * max(round(weight * size), 1)
    pairs = zip(density.nodes, density.isolated, strict=True)
    below = max((node for node, alone in pairs if not alone), default=0.0)
    return sorted((value for value in found if value > below), reverse=True)


def _title(result: SpectrumResult) -> str:
    matrix = words.matrix_name(result.problem)
    return f"Staircase of the {matrix}: {standing_apart(result.outliers)}"


def _draw(axes: Axes, steps: list[float], result: SpectrumResult) -> None:
    ranks = range(1, len(steps) + 1)
    outliers = result.outliers
    axes.set_yscale("log")
    if steps:
        low, high = steps[-1] / 1.6, steps[0] * 1.6
        axes.set_ylim(low, high)
        axes.stairs(
            steps,
            [rank - 0.5 for rank in range(1, len(steps) + 2)],
            baseline=None,
            color=canvas.PALE,
            linewidth=1.2,
        )
        colours = [canvas.ACCENT if rank <= outliers.count else canvas.INK for rank in ranks]
        axes.scatter(ranks, steps, s=22, c=colours, zorder=3)
        _label_sizes(axes, low, high)
    axes.set_xlim(0.3, max(len(steps), 2) + 0.7)
    _mark(axes, outliers.count, "widest step" if outliers.count else "")
    others = (outliers.classes or 1) - 1
    if 0 < others <= len(steps) and others != outliers.count:
        _mark(axes, others, f"{outliers.classes} classes less one")
    axes.set_xlabel("rank from the top")
    axes.set_ylabel("eigenvalue, log scale")
    axes.tick_params(axis="x", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.grid(axis="y")


def _mark(axes: Axes, after: int, text: str) -> None:
    """A line between one rank and the next."""
    if not text:
        return
    axes.axvline(after + 0.5, color=canvas.QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        text,
        (after + 0.5, 1),
        (4, -10),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=canvas.QUIET,
        fontsize=9,
    )


def _label_sizes(axes: Axes, low: float, high: float) -> None:
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades < 3 else (1, 3) if decades < 5 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [d * 10.0**p for p in range(first, last + 1) for d in digits]
    kept = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(kept, [f"{tick:g}" for tick in kept], color=canvas.QUIET, fontsize=9)
    axes.yaxis.set_minor_locator(NullLocator())


def _notes(result: SpectrumResult) -> list[str]:
    notes = ["Eigenvalues that stand alone: bars of at most a quarter of the distance to the next."]
    compared = compared_with_classes(result.outliers)
    return notes + [f"{compared[0][0].upper()}{compared[0][1:]}." for _ in compared[:1]]
