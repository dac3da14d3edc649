"""A spectrum as pictures: its density, its staircase, where its vectors lie, how it settled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.render.figures.canvas import label_sizes, scale_by_size
from hesscli.render.figures.rows import Rows
from hesscli.results import (
    DenseSpectrum,
    Eigenvalue,
    SpectralDensity,
    SpectralFunctions,
    SpectrumResult,
)

Array = npt.NDArray[np.float64]

# -- The density of eigenvalues, of the whole matrix and of layers' blocks -------------------------


# In inches: the whole matrix's panel and a layer's, the gap below each, the labels of heights,
# and the words beside.
_WHOLE, _LAYER, _BETWEEN, _HEIGHTS, _BESIDE = 3.0, 1.15, 0.42, 0.5, 2.35
_MOST_PANELS = 15
_POINTS = 900
_LEAST = 0.3
"""Where logarithmic heights begin, so that a single eigenvalue is seen."""
_MOST_DECADES = 7


@dataclass(frozen=True)
class _Panel:
    """One matrix's spectrum."""

    name: str
    size: int
    density: SpectralDensity
    functions: SpectralFunctions
    exact: DenseSpectrum | None


@canvas.styled
def density_figure(result: SpectrumResult) -> Figure:
    """Draw how many eigenvalues lie about each size, with single ones as spikes.

    Heights are the expected number of eigenvalues within a kernel's width, so that one that was
    counted is a spike of height 1, and both are on one scale.

    Args:
        result: the answer of ``hesscli spectrum``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    spectra = _panels(result)
    edges = _edges([panel.density for panel in spectra])
    top = result.eigenvalues[0]
    largest = words.with_error(top.value, top.residual)
    figure, drawn = canvas.panels(
        f"Spectrum of the {words.matrix_name(result.problem)}: largest eigenvalue {largest}",
        canvas.provenance(result),
        [_WHOLE, *[_LAYER] * (len(spectra) - 1)],
        left=_HEIGHTS,
        right=_BESIDE,
        between=_BETWEEN,
    )
    scale_by_size(drawn[0], edges)
    every = [layer.name for layer in result.layers]
    short = dict(zip(every, words.shorten_all(every, 24), strict=True))
    for axes, panel in zip(drawn, spectra, strict=True):
        _draw_density(axes, panel)
        more = _sums(result) if axes is drawn[0] else ()
        name, size = short.get(panel.name, panel.name), words.count(panel.size, "eigenvalue")
        trace = f"trace {words.spectral_sum(panel.functions.trace)}"
        canvas.describe(axes, (name, size, trace, *more))
        label_sizes(axes, edges)
    drawn[0].set_ylabel("eigenvalues")
    drawn[-1].set_xlabel(f"eigenvalue, {canvas.log_scale(drawn[-1].xaxis)}")
    canvas.note(figure, _density_notes(result, len(spectra)))
    return figure


def _panels(result: SpectrumResult) -> list[_Panel]:
    size = result.problem.num_parameters
    panels = [_Panel("all layers", size, result.density, result.functions, result.exact)]
    for layer in result.layers:
        if layer.density is not None and layer.functions is not None:
            size = layer.num_parameters
            panels.append(_Panel(layer.name, size, layer.density, layer.functions, layer.exact))
    return panels[:_MOST_PANELS]


def _edges(densities: list[SpectralDensity]) -> tuple[float, ...]:
    """Ends of an axis of eigenvalues, and the size below which it tells nothing apart."""
    nodes = np.concatenate([density.nodes for density in densities])
    largest = float(np.abs(nodes).max(initial=0.0)) or 1.0
    least = max(min(density.scale for density in densities), largest * 10.0**-_MOST_DECADES)
    low = float(nodes.min(initial=0.0))
    return tuple(sorted({min(low, -least), -least, least, max(float(nodes.max()), 2 * least)}))


def _draw_density(axes: Axes, panel: _Panel) -> None:
    density = panel.density
    places = _places(density, *axes.get_xlim())
    nodes, isolated = np.array(density.nodes), np.array(density.isolated, dtype=bool)
    counts = panel.size * np.array(density.weights)
    bulk = _heights(places, nodes[~isolated], counts[~isolated], density)
    single = np.maximum(counts[isolated], 1)
    tallest = max(1.0, float(bulk.max(initial=1.0)), float(single.max(initial=1.0)))
    if panel.exact is not None:
        eigenvalues = np.array(panel.exact.eigenvalues)
        known = _heights(places, eigenvalues, np.ones(len(eigenvalues)), density)
        axes.fill_between(places, _LEAST / 10, known, color="#d3d9df", linewidth=0)
        tallest = max(tallest, float(known.max()))
    axes.plot(places, bulk, color=canvas.ACCENT, linewidth=1.6)
    signs = [canvas.NEGATIVE if node < 0 else canvas.INK for node in nodes[isolated]]
    axes.vlines(nodes[isolated], _LEAST / 10, single, signs, linewidth=1.1)
    axes.plot(nodes[isolated], single, "o", markersize=3, color=canvas.INK)
    axes.set_yscale("log")
    axes.set_ylim(_LEAST, 2 * tallest)
    canvas.label_counts(axes, 2 * tallest)
    axes.grid()


def _places(density: SpectralDensity, low: float, high: float) -> Array:
    """Points over the axis, as dense as the kernels are narrow."""
    left, right = (math.asinh(end / density.scale) for end in (low, high))
    return np.asarray(density.scale * np.sinh(np.linspace(left, right, _POINTS)))


def _heights(places: Array, nodes: Array, counts: Array, density: SpectralDensity) -> Array:
    """Eigenvalues within a kernel's width of each place."""
    here, there = (np.arcsinh(points / density.scale) for points in (places, nodes))
    heights = np.zeros(len(places))
    for place, count in zip(there, counts, strict=True):
        heights += count * np.exp(-0.5 * ((here - place) / density.bandwidth) ** 2)
    return heights


def _sums(result: SpectrumResult) -> list[str]:
    functions, mass = result.functions, result.functions.negative_mass.value
    return [
        f"Σλ² {words.spectral_sum(functions.squared_norm)}",
        f"effective rank {words.spectral_sum(functions.effective_rank)}",
        f"negative mass {'none' if mass is None else words.percent(mass)}",
        *words.standing_apart(result.outliers).replace(": ", ":\n").split("\n"),
    ]


def _density_notes(result: SpectrumResult, drawn: int) -> list[str]:
    width = words.percent(result.density.bandwidth)
    notes = [
        f"Heights: eigenvalues within a kernel's width, {width} of an eigenvalue's size.",
        "Spikes: eigenvalues that stand alone, counted.",
    ]
    if result.exact is not None:
        notes.append("Grey: the dense matrix.")
    hidden = sum(layer.density is not None for layer in result.layers) + 1 - drawn
    return notes + canvas.not_drawn(hidden, "layer")


# -- The largest eigenvalues in their order --------------------------------------------------------


_STAIRCASE = 3.6
_MOST_SIZES = 10


@canvas.styled
def staircase_figure(result: SpectrumResult) -> Figure:
    """Draw the largest eigenvalues in descending order, with their bars, on a log scale.

    Steps are drawn where eigenvalues stand alone, so that their order is known. A line marks the
    widest step, another the number of classes.

    Args:
        result: the answer of ``hesscli spectrum``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    matrix, apart = words.matrix_name(result.problem), words.standing_apart(result.outliers)
    figure, (axes,) = canvas.panels(
        f"Staircase of the {matrix}: {apart}",
        canvas.provenance(result),
        (_STAIRCASE,),
    )
    _draw_staircase(axes, _steps(result), result)
    notes = ["Eigenvalues that stand alone: bars of at most a quarter of the distance to the next."]
    compared = words.compared_with_classes(result.outliers)
    canvas.note(figure, notes + [f"{said[0].upper()}{said[1:]}." for said in compared])
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


def _draw_staircase(axes: Axes, steps: list[float], result: SpectrumResult) -> None:
    ranks = range(1, len(steps) + 1)
    outliers = result.outliers
    axes.set_yscale("log")
    if steps:
        axes.set_ylim(steps[-1] / 1.6, steps[0] * 1.6)
        edges = [rank - 0.5 for rank in range(1, len(steps) + 2)]
        axes.stairs(steps, edges, baseline=None, color=canvas.PALE, linewidth=1.2)
        colours = [canvas.ACCENT if rank <= outliers.count else canvas.INK for rank in ranks]
        axes.scatter(ranks, steps, s=22, c=colours, zorder=3)
        canvas.label_round(axes, _MOST_SIZES)
    axes.set_xlim(0.3, max(len(steps), 2) + 0.7)
    marks = [(outliers.count + 0.5, "widest step")] if outliers.count else []
    others = (outliers.classes or 1) - 1
    if 0 < others <= len(steps) and others != outliers.count:
        marks.append((others + 0.5, f"{outliers.classes} classes less one"))
    canvas.mark_inside(axes, marks)
    axes.set_xlabel("rank from the top")
    axes.set_ylabel("eigenvalue, log scale")
    axes.tick_params(axis="x", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.grid(axis="y")


# -- Which layers the listed eigenvectors lie in ---------------------------------------------------


# In inches: a cell's width, the legend's bar, the gap to it, and the labels beside it.
_CELL, _BAR, _BAR_GAP, _BAR_LABELS = 1.4, 0.16, 0.3, 0.45
_SHARES = LinearSegmentedColormap.from_list(
    "hesscli-share", ("#f3f5f7", canvas.PALE, canvas.ACCENT, canvas.DEEP)
)


@canvas.styled
def participation_figure(result: SpectrumResult) -> Figure:
    """Draw each layer's share of the squared length of each top eigenvector.

    Layers run in model order from top to bottom. Only eigenvectors that are known are drawn.

    Args:
        result: the answer of ``hesscli spectrum``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    columns = [i for i, one in enumerate(result.eigenvalues) if one.has_vector]
    layers = result.layers[: canvas.MOST_LAYERS]
    rows = Rows(
        f"Layers in the top eigenvectors of the {words.matrix_name(result.problem)}",
        canvas.provenance(result),
        [layer.name for layer in layers],
        below=1.2,
    )
    shares = np.array([[layer.participation[i] for i in columns] for layer in layers])
    image = rows.axes.imshow(
        shares if columns else np.zeros((len(layers), 1)),
        cmap=_SHARES,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    rows.axes.set_ylim(len(layers) - 0.5, -0.5)
    _name_columns(rows.axes, [result.eigenvalues[i] for i in columns])
    _write_shares(rows.axes, shares, columns)
    bar = rows.figure.add_axes((0.8, 0.1, 0.1, 0.5))
    canvas.colour_scale(rows.figure, image, bar, [0, 0.5, 1], ["0", "50%", "100%"])
    left, room = rows.room(_BAR_GAP + _BAR + _BAR_LABELS)
    wide = min(room, _CELL * max(len(columns), 2))
    rows.put(rows.axes, left, wide)
    rows.put(bar, left + wide + _BAR_GAP, _BAR)
    canvas.note(rows.figure, _participation_notes(result, len(columns), len(layers)))
    return rows.figure


def _name_columns(axes: Axes, eigenvalues: Sequence[Eigenvalue]) -> None:
    labels = [words.number(one.value, 3) for one in eigenvalues]
    axes.set_xticks(range(len(labels)), labels, rotation=40 if len(labels) > 10 else 0)
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("eigenvalue")


def _write_shares(axes: Axes, shares: Array, columns: list[int]) -> None:
    if not columns or len(columns) > 12 or len(shares) > 30:
        return
    for row, column in np.argwhere(shares >= 0.005):
        share = float(shares[row, column])
        axes.text(
            column,
            row,
            f"{100 * share:.0f}%",
            ha="center",
            va="center_baseline",
            fontsize=8,
            color="white" if share > 0.55 else canvas.INK,
        )


def _participation_notes(result: SpectrumResult, drawn: int, layers: int) -> list[str]:
    of_all = " over all layers" if result.num_hidden else ""
    notes = [f"Shares of an eigenvector's squared length; columns sum to 100%{of_all}."]
    errors = [one.vector_error or 0.0 for one in result.eigenvalues if one.has_vector]
    if errors:
        notes.append(f"Shares are within {words.percent(2 * max(errors))}.")
    if drawn < len(result.eigenvalues):
        hidden = words.count(len(result.eigenvalues) - drawn, "listed vector")
        notes.append(f"{hidden} not drawn: not known well enough.")
    if layers < len(result.layers):
        notes.append(f"{len(result.layers) - layers} more layers: see the JSON.")
    return notes


# -- How the largest eigenvalues settled, step by step ---------------------------------------------


_SETTLING = 2.6
_LEAST_BAR, _MOST_BAR = 1e-17, 10.0  # beside sizes, as far as they are drawn
_MOST_POWERS = 6


@canvas.styled
def convergence_figure(result: SpectrumResult) -> Figure:
    """Draw the largest Ritz values after each step, and below them their bars.

    Args:
        result: the answer of ``hesscli spectrum``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    figure, (values, bars) = canvas.panels(
        f"How the largest eigenvalues of the {words.matrix_name(result.problem)} settled",
        canvas.provenance(result),
        (_SETTLING, _SETTLING),
    )
    _draw_settling(values, bars, result)
    canvas.note(figure, ["Each line is one eigenvalue, the largest darkest."])
    return figure


def _draw_settling(values: Axes, bars: Axes, result: SpectrumResult) -> None:
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
    _label_powers(bars)
    bars.set_ylabel("bar beside its size")
    bars.set_xlabel("steps")
    bars.tick_params(length=0)
    bars.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    bars.grid(axis="y")


def _relative(value: float, residual: float) -> float:
    return min(max(residual / abs(value), _LEAST_BAR), _MOST_BAR) if value else _MOST_BAR


def _label_powers(axes: Axes) -> None:
    """A logarithmic y axis from one power of ten to another."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    first, last = math.floor(math.log10(low)), min(math.ceil(math.log10(high)), 1)
    axes.set_ylim(10.0**first, 10.0**last)
    powers = range(last, first - 1, -(1 + (last - first) // _MOST_POWERS))
    canvas.label_heights(axes, [10.0**power for power in powers])


# -- Which pictures an answer has, by the names of their files -------------------------------------


def figures(result: SpectrumResult, asked: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The density, the largest eigenvalues and where their vectors lie; how they settled."""
    yield "spectrum", density_figure(result)
    yield "spectrum_staircase", staircase_figure(result)
    yield "spectrum_participation", participation_figure(result)
    if asked.get("verbose"):
        yield "spectrum_convergence", convergence_figure(result)
