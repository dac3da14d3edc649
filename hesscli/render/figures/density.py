"""The density of eigenvalues as a picture, of the whole matrix and of layers' blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.render.figures.canvas import label_sizes, scale_by_size
from hesscli.render.tables.spectrum import estimate, standing_apart
from hesscli.results import (
    DenseSpectrum,
    SpectralDensity,
    SpectralFunctions,
    SpectrumResult,
)

Array = npt.NDArray[np.float64]

# In inches: the whole matrix's panel and a layer's, the gap below each, the foot, the words beside.
_WHOLE, _LAYER, _BETWEEN, _BOTTOM, _BESIDE = 3.0, 1.15, 0.42, 1.05, 2.35
_GAP = 0.2
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


def density_figure(result: SpectrumResult) -> Figure:
    """Draw how many eigenvalues lie about each size, with single ones as spikes.

    Heights are the expected number of eigenvalues within a kernel's width, so that one that was
    counted is a spike of height 1, and both are on one scale.

    Args:
        result: the answer of ``hesscli spectrum``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    panels = _panels(result)
    edges = _edges([panel.density for panel in panels])
    tall = _WHOLE + (len(panels) - 1) * (_LAYER + _BETWEEN)
    with canvas.style():
        height = canvas.TOP + tall + _BOTTOM
        figure = canvas.page(height, _title(result), canvas.provenance(result))
        width = canvas.WIDTH - 2 * canvas.SIDE - 0.5 - _BESIDE
        top = height - canvas.TOP
        first: Axes | None = None
        for panel in panels:
            inches = _WHOLE if first is None else _LAYER
            axes = figure.add_axes((0.1, 0.1, 0.5, 0.5), sharex=first)
            canvas.place(figure, axes, canvas.SIDE + 0.5, top - inches, width, inches)
            top -= inches + _BETWEEN
            first = first or axes
            if axes is first:
                scale_by_size(axes, edges)
            _draw(axes, panel)
            _describe(axes, panel, result)
            label_sizes(axes, edges, width)
        axes.set_xlabel("eigenvalue, log scale")
        canvas.note(figure, _notes(result, panels))
    return figure


def _panels(result: SpectrumResult) -> list[_Panel]:
    size = result.problem.num_parameters
    panels = [_Panel("all layers", size, result.density, result.functions, result.exact)]
    for layer in result.layers:
        if layer.density is not None and layer.functions is not None:
            panels.append(
                _Panel(
                    layer.name, layer.num_parameters, layer.density, layer.functions, layer.exact
                )
            )
    return panels[: canvas.MOST_LAYERS // 4]


def _title(result: SpectrumResult) -> str:
    top = result.eigenvalues[0]
    value = words.with_error(top.value, top.residual)
    name = words.matrix_name(result.problem)
    return f"Spectrum of the {name}: largest eigenvalue {value}"


def _edges(densities: list[SpectralDensity]) -> tuple[float, ...]:
    """From where to where, and around zero the size below which an axis tells nothing apart."""
    nodes = np.concatenate([density.nodes for density in densities])
    largest = float(np.abs(nodes).max(initial=0.0)) or 1.0
    least = max(min(density.scale for density in densities), largest * 10.0**-_MOST_DECADES)
    low = float(nodes.min(initial=0.0))
    return tuple(sorted({min(low, -least), -least, least, max(float(nodes.max()), 2 * least)}))


def _draw(axes: Axes, panel: _Panel) -> None:
    density = panel.density
    low, high = axes.get_xlim()
    places = _places(density, low, high)
    nodes, isolated = np.array(density.nodes), np.array(density.isolated, dtype=bool)
    counts = panel.size * np.array(density.weights)
    bulk = _heights(places, nodes[~isolated], counts[~isolated], density)
    known = None
    if panel.exact is not None:
        eigenvalues = np.array(panel.exact.eigenvalues)
        known = _heights(places, eigenvalues, np.ones(len(eigenvalues)), density)
        axes.fill_between(places, _LEAST / 10, known, color="#d3d9df", linewidth=0)
    axes.plot(places, bulk, color=canvas.ACCENT, linewidth=1.6)
    signs = [canvas.NEGATIVE if node < 0 else canvas.INK for node in nodes[isolated]]
    axes.vlines(nodes[isolated], _LEAST / 10, np.maximum(counts[isolated], 1), signs, linewidth=1.1)
    axes.plot(nodes[isolated], np.maximum(counts[isolated], 1), "o", markersize=3, color=canvas.INK)
    tallest = max(float(bulk.max(initial=1.0)), float(counts[isolated].max(initial=1.0)), 1.0)
    tallest = max(tallest, 0.0 if known is None else float(known.max()))
    axes.set_yscale("log")
    axes.set_ylim(_LEAST, 2 * tallest)
    powers = range(math.floor(math.log10(2 * tallest)) + 1)
    ticks = [10**power for power in powers[:: 1 + len(powers) // 4]]
    axes.set_yticks(ticks, [words.count(tick) for tick in ticks], color=canvas.QUIET, fontsize=9)
    axes.yaxis.set_minor_locator(NullLocator())
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


def _describe(axes: Axes, panel: _Panel, result: SpectrumResult) -> None:
    """In words beside the panel."""
    functions, mass = panel.functions, panel.functions.negative_mass.value
    whole = panel.density is result.density
    names = [panel.name, *(layer.name for layer in result.layers)]
    lines = [
        words.shorten_all(names, 24)[0],
        words.count(panel.size, "eigenvalue"),
        f"trace {estimate(functions.trace)}",
    ]
    if whole:
        lines += [
            f"Σλ² {estimate(functions.squared_norm)}",
            f"effective rank {estimate(functions.effective_rank)}",
            f"negative mass {'none' if mass is None else words.percent(mass)}",
            *standing_apart(result.outliers).replace(": ", ":\n").split("\n"),
        ]
    for index, line in enumerate(lines):
        axes.annotate(
            line,
            (1, 1),
            (_GAP * 72, -9 - 15 * index),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=9,
            weight="bold" if index == 0 else "normal",
        )
    if whole:
        axes.set_ylabel("eigenvalues")


def _notes(result: SpectrumResult, panels: list[_Panel]) -> list[str]:
    width = words.percent(result.density.bandwidth)
    notes = [
        f"Heights: eigenvalues within a kernel's width, {width} of an eigenvalue's size.",
        "Spikes: eigenvalues that stand alone, counted.",
    ]
    if result.exact is not None:
        notes.append("Grey: the dense matrix.")
    hidden = sum(layer.density is not None for layer in result.layers) + 1 - len(panels)
    if hidden:
        notes.append(f"{words.count(hidden, 'layer')} not drawn.")
    return notes
