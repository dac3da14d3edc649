"""The entries of one tensor as an image, laid out as the tensor is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from hesscli.render import words
from hesscli.render.figures import canvas

# -- A tensor as the cells of an image: kernels side by side, large ones averaged ------------------


Array = npt.NDArray[np.float64]

_MOST_CELLS = 512
_TALL = 1.2
"""How many times as high as wide a matrix must be to be turned."""
_WIDER = 2.0
"""How many times as wide as its square a list of kernels is wrapped to be, about."""


@dataclass(frozen=True)
class Sheet:
    """The cells of an image and what they stand for.

    Args:
        cells: from the top left; NaN where nothing is to be drawn.
        down: the entries, or kernels, from top to bottom.
        across: those from left to right.
        tiles: whether each of them is a kernel of several cells.
        ordered: whether down and across are dimensions of the tensor.
        turned: whether the first of these runs across.
        averaged: what a cell is the mean of; empty where it is a single entry.
    """

    cells: Array
    down: int
    across: int
    tiles: bool = False
    ordered: bool = True
    turned: bool = False
    averaged: str = ""


def spread(values: Array) -> Sheet:
    """Lay a tensor out: a vector as a row, a matrix as it is, kernels as a grid of tiles.

    A page is wide: a matrix or grid that is clearly taller is turned, kernels themselves are not.
    """
    if values.ndim <= 1:
        return _matrix(np.atleast_2d(values), "entries")
    outputs, inputs, *kernel = values.shape if values.ndim > 2 else (*values.shape, 1)
    kernels = values.reshape(outputs, inputs, -1, kernel[-1])
    rows, columns = kernels.shape[2:]
    ordered = inputs > 1 or rows * columns == 1
    turned = ordered and outputs * rows > _TALL * inputs * columns
    if turned:
        kernels = kernels.swapaxes(0, 1)
    elif not ordered:
        kernels = _wrapped(kernels[:, 0])
    if rows * columns == 1:
        return _matrix(kernels[:, :, 0, 0], "entries", turned=turned)
    down, across = kernels.shape[:2]
    if max(down * rows, across * columns) > _MOST_CELLS:
        return _matrix(kernels.mean(axis=(2, 3)), "kernels", ordered, turned)
    cells = kernels.transpose(0, 2, 1, 3).reshape(down * rows, across * columns)
    return Sheet(cells, down, across, tiles=True, ordered=ordered, turned=turned)


def _matrix(values: Array, units: str, ordered: bool = True, turned: bool = False) -> Sheet:
    """At most so many cells a side, each the mean of a block of units."""
    down, across = values.shape
    steps = [math.ceil(length / _MOST_CELLS) for length in (down, across)]
    cells = values
    for axis, step in enumerate(steps):
        starts = np.arange(0, cells.shape[axis], step)
        sizes = np.diff(np.append(starts, cells.shape[axis]))
        sums = np.add.reduceat(cells, starts, axis=axis)
        cells = sums / (sizes[:, None] if axis == 0 else sizes)
    first, second = reversed(steps) if turned else steps
    averaged = f"{first} × {second} {units}" if max(steps) > 1 or units != "entries" else ""
    return Sheet(cells, down, across, ordered=ordered, turned=turned, averaged=averaged)


def _wrapped(kernels: Array) -> Array:
    """A list of kernels as a grid that is wider than high, with few places empty."""
    count = len(kernels)
    root = math.sqrt(count)
    widths = range(math.ceil(root), max(math.ceil(root), math.floor(2.5 * root)) + 1)
    across = min(widths, key=lambda width: (-count % width, abs(width - _WIDER * root)))
    empty = np.full((-count % across, *kernels.shape[1:]), np.nan)
    return np.concatenate([kernels, empty]).reshape(-1, across, *kernels.shape[1:])


# -- The diagonal entries of one tensor as an image, laid out as the tensor is ---------------------


# In inches: the largest image and cell, the side below which cells are stretched, what lies
# below the image, the colour bar, and the room for a label.
_WIDE, _HIGH, _CELL, _THIN = 8.7, 6.5, 0.6, 2.0
_BOTTOM, _BAR, _GAP, _BAR_HIGH = 1.15, 0.2, 0.25, 1.8
_LABEL_WIDE, _LABEL_HIGH, _NAME = 0.6, 0.2, 0.3
_DECADES = 4
"""How far below the largest size the colours tell sizes apart."""

_ZERO = "#e9edf1"
_RISE = (_ZERO, canvas.PALE, canvas.ACCENT, canvas.DEEP)
_FALL = ("#6e2008", canvas.NEGATIVE, "#f0bba9")
_POSITIVE = LinearSegmentedColormap.from_list("hesscli-positive", _RISE)
_SIGNED = LinearSegmentedColormap.from_list("hesscli-signed", (*_FALL, *_RISE))


@canvas.styled
def heat_map(name: str, values: npt.ArrayLike, facts: Iterable[str] = ()) -> Figure:
    """Draw one tensor of diagonal entries as an image.

    A matrix is drawn as it is; kernels stand in a grid, the first dimension down and the second
    across; a vector is one row. What is clearly taller than wide is turned, what is too large
    averaged in blocks, and the page says so.

    Args:
        name: of the tensor.
        values: its entries, at least one and all finite.
        facts: more about them, for the subtitle.

    Returns:
        The figure, for ``save_figure`` or for one's own canvas.
    """
    entries = np.asarray(values, dtype=np.float64)
    sheet = spread(entries)
    shape = " × ".join(map(words.count, entries.shape)) or "1"
    wide, high = _size(*sheet.cells.shape)
    tall = max(high, _BAR_HIGH)
    title = f"Diagonal entries of {words.shorten(name, 64)}"
    if sheet.averaged:
        title += f": means of {sheet.averaged}"
    figure = canvas.page(canvas.TOP + tall + _BOTTOM, title, (shape, *facts))
    axes, bar = figure.add_axes((0.1, 0.1, 0.5, 0.5)), figure.add_axes((0.8, 0.1, 0.1, 0.5))
    image, norm = _draw_cells(axes, sheet)
    _draw_gaps(axes, sheet, wide)
    ticks = _sizes(norm, tall)
    canvas.colour_scale(figure, image, bar, ticks, [f"{tick:.2g}" for tick in ticks])
    if sheet.ordered:
        _number(axes, sheet, wide, high)
        _name(axes, sheet, entries.ndim)
    left = canvas.SIDE + canvas.names_width(figure, axes) + 0.05 + _NAME * bool(axes.get_ylabel())
    canvas.place(figure, axes, left, _BOTTOM + tall - high, wide, high)
    canvas.place(figure, bar, left + wide + _GAP, _BOTTOM, _BAR, tall)
    bar.set_visible(bool(entries.any()))
    canvas.note(figure, _notes(entries, sheet, norm.linthresh))
    return figure


def _size(rows: int, columns: int) -> tuple[float, float]:
    """Inches of the image: square cells, unless it would be too thin to see."""
    cell = min(_WIDE / columns, _HIGH / rows, _CELL)
    wide, high = (max(cell * n, min(_CELL * n, _THIN)) for n in (columns, rows))
    return wide, high


def _draw_cells(axes: Axes, sheet: Sheet) -> tuple[AxesImage, SymLogNorm]:
    least, threshold, largest = _range(sheet.cells)
    norm = SymLogNorm(threshold, linscale=0.4, vmin=least, vmax=largest, base=10)
    image = axes.imshow(
        sheet.cells,
        cmap=_SIGNED if least < 0 else _POSITIVE,
        norm=norm,
        extent=(-0.5, sheet.across - 0.5, sheet.down - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    return image, norm


def _range(cells: Array) -> tuple[float, float, float]:
    """The least value to be coloured, the size from which colours are logarithmic, the largest."""
    sizes = np.abs(cells[np.isfinite(cells) & (cells != 0)])
    largest = float(sizes.max(initial=0.0)) or 1.0
    smallest = min(float(sizes.min(initial=largest)), largest / 10)
    least = -largest if np.nanmin(cells) < 0 else 0.0
    return least, max(smallest, largest / 10**_DECADES), largest


def _draw_gaps(axes: Axes, sheet: Sheet, wide: float) -> None:
    """Thin white lines between kernels."""
    if not sheet.tiles:
        return
    right, bottom = sheet.across - 0.5, sheet.down - 0.5
    upright = [[(x - 0.5, -0.5), (x - 0.5, bottom)] for x in range(1, sheet.across)]
    level = [[(-0.5, y - 0.5), (right, y - 0.5)] for y in range(1, sheet.down)]
    cell = 72 * wide / sheet.cells.shape[1]
    axes.add_collection(
        LineCollection(upright + level, colors="white", linewidths=min(2.5, 0.4 * cell))
    )


def _sizes(norm: SymLogNorm, tall: float) -> list[float]:
    """Zero, the largest size and the powers of ten below it, as they have room."""
    least, largest = float(norm.vmin or 0.0), float(norm.vmax or 1.0)
    top, low = math.floor(math.log10(largest)), math.ceil(math.log10(norm.linthresh))
    sizes = (largest, *(10.0**power for power in range(top, low - 1, -1)))
    kept: dict[float, float] = {}
    for tick in (0.0, *(sign * size for size in sizes for sign in (1, -1))):
        height = float(norm(tick)) * tall
        if least <= tick and all(abs(height - other) > _LABEL_HIGH for other in kept.values()):
            kept[tick] = height
    return list(kept)


def _number(axes: Axes, sheet: Sheet, wide: float, high: float) -> None:
    """Number rows and columns, or kernels, as there is room."""
    axes.set_xticks(_numbers(sheet.across, wide / _LABEL_WIDE))
    axes.set_yticks(_numbers(sheet.down, high / _LABEL_HIGH / 2))
    axes.tick_params(length=0, labelsize=9, labelcolor=canvas.QUIET)


def _name(axes: Axes, sheet: Sheet, dimensions: int) -> None:
    """Say which dimension of the tensor runs along an axis."""
    names = ["first dimension", "second dimension"] if dimensions > 1 else ["", "place"]
    down, across = reversed(names) if sheet.turned else names
    axes.set_ylabel(down if sheet.down > 1 else "")
    axes.set_xlabel(across if sheet.across > 1 else "")


def _numbers(count: int, room: float) -> range:
    """Round numbers below a count, at most so many; none where there is but one."""
    steps = (digit * 10**power for power in range(10) for digit in (1, 2, 5))
    step = next(step for step in steps if count <= step * min(room, 8) or step >= count)
    return range(0, count if count > 1 else 0, step)


def _notes(values: Array, sheet: Sheet, threshold: float) -> list[str]:
    beyond = f"Colours are on a {canvas.log_scale_beyond(threshold)}."
    notes = [beyond if values.any() else "All entries are zero."]
    if sheet.tiles:
        kernel = " × ".join(map(str, values.shape[2:]))
        order = "" if sheet.ordered else ", in reading order"
        notes.append(f"Each tile is a kernel of {kernel}{order}.")
    return notes
