"""Which layers the listed eigenvectors lie in, as a heat map."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from hesscli.render import words
from hesscli.render.figures import canvas
from hesscli.render.tables.spectrum import has_vector
from hesscli.results import Eigenvalue, SpectrumResult

# In inches: a cell's width, the legend's bar, what lies below the cells, and the gap to the bar.
_CELL, _BAR, _BOTTOM, _GAP = 0.72, 0.16, 1.2, 0.3
_COLOURS = LinearSegmentedColormap.from_list(
    "hesscli-share", ("#f3f5f7", canvas.PALE, canvas.ACCENT, "#0b2f55")
)


def participation_figure(result: SpectrumResult) -> Figure:
    """Draw each layer's share of the squared length of each top eigenvector.

    Layers run in model order from top to bottom. Only eigenvectors that are known are drawn.

    Args:
        result: the answer of ``hesscli spectrum``.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    columns = [i for i, one in enumerate(result.eigenvalues) if has_vector(one)]
    layers = result.layers[: canvas.MOST_LAYERS]
    row = 0.34 if len(layers) <= 30 else 0.22
    tall = row * max(len(layers), 2)
    with canvas.style():
        height = canvas.TOP + tall + _BOTTOM
        figure = canvas.page(height, _title(result), canvas.provenance(result))
        axes, bar = figure.add_axes((0.2, 0.1, 0.5, 0.5)), figure.add_axes((0.8, 0.1, 0.1, 0.5))
        shares = np.array([[layer.participation[i] for i in columns] for layer in layers])
        image = axes.imshow(
            shares if columns else np.zeros((len(layers), 1)),
            cmap=_COLOURS,
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
        )
        canvas.name_rows(axes, [layer.name for layer in layers])
        axes.set_ylim(len(layers) - 0.5, -0.5)
        _name_columns(axes, [result.eigenvalues[i] for i in columns])
        _write_shares(axes, shares, columns)
        scale = figure.colorbar(image, cax=bar)
        scale.set_ticks([0, 0.5, 1], labels=["0", "50%", "100%"])
        scale.outline.set_visible(False)
        scale.ax.tick_params(length=0, labelsize=9, labelcolor=canvas.QUIET)
        left = canvas.SIDE + canvas.names_width(axes) + 0.1
        room = canvas.WIDTH - canvas.SIDE - left - _GAP - _BAR - 0.45
        wide = min(room, _CELL * max(len(columns), 2))
        canvas.place(figure, axes, left, _BOTTOM, wide, tall)
        canvas.place(figure, bar, left + wide + _GAP, _BOTTOM, _BAR, tall)
        canvas.note(figure, _notes(result, len(columns), len(layers)))
    return figure


def _title(result: SpectrumResult) -> str:
    return f"Layers in the top eigenvectors of the {words.matrix_name(result.problem)}"


def _name_columns(axes: Axes, eigenvalues: list[Eigenvalue]) -> None:
    labels = [words.number(one.value, 3) for one in eigenvalues]
    axes.set_xticks(range(len(labels)), labels, rotation=40 if len(labels) > 10 else 0)
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("eigenvalue")


def _write_shares(axes: Axes, shares: np.ndarray, columns: list[int]) -> None:
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


def _notes(result: SpectrumResult, drawn: int, layers: int) -> list[str]:
    notes = ["Shares of an eigenvector's squared length; columns sum to 100%."]
    errors = [one.vector_error or 0.0 for one in result.eigenvalues if has_vector(one)]
    if errors:
        notes.append(f"Shares are within {words.percent(2 * max(errors))}.")
    if drawn < len(result.eigenvalues):
        hidden = words.count(len(result.eigenvalues) - drawn, "listed vector")
        notes.append(f"{hidden} not drawn: not known well enough.")
    if layers < len(result.layers):
        notes.append(f"{len(result.layers) - layers} more layers: see the JSON.")
    return notes
