"""A tensor as the cells of an image: kernels side by side, large ones averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_MOST_CELLS = 512


@dataclass(frozen=True)
class Sheet:
    """The cells of an image and what they stand for.

    Args:
        cells: from the top left; NaN where nothing is to be drawn.
        down: the entries, or kernels, from top to bottom.
        across: those from left to right.
        tiles: whether each of them is a kernel of several cells.
        ordered: whether down and across are dimensions of the tensor.
        averaged: what a cell is the mean of; empty where it is a single entry.
    """

    cells: Array
    down: int
    across: int
    tiles: bool = False
    ordered: bool = True
    averaged: str = ""


def spread(values: Array) -> Sheet:
    """Lay a tensor out: a vector as a row, a matrix as it is, kernels as a grid of tiles."""
    if values.ndim <= 2:
        return _matrix(np.atleast_2d(values), "entries")
    outputs, inputs, *kernel = values.shape
    kernels = values.reshape(outputs, inputs, -1, kernel[-1])
    rows, columns = kernels.shape[2:]
    if rows * columns == 1:
        return _matrix(kernels[:, :, 0, 0], "entries")
    if inputs == 1:
        kernels = _wrapped(kernels[:, 0])
    down, across = kernels.shape[:2]
    if max(down * rows, across * columns) > _MOST_CELLS:
        return _matrix(kernels.mean(axis=(2, 3)), "kernels", ordered=inputs > 1)
    cells = kernels.transpose(0, 2, 1, 3).reshape(down * rows, across * columns)
    return Sheet(cells, down, across, tiles=True, ordered=inputs > 1)


def _matrix(values: Array, units: str, *, ordered: bool = True) -> Sheet:
    """At most so many cells a side, each the mean of a block of units."""
    down, across = values.shape
    steps = [math.ceil(length / _MOST_CELLS) for length in (down, across)]
    cells = values
    for axis, step in enumerate(steps):
        starts = np.arange(0, cells.shape[axis], step)
        sizes = np.diff(np.append(starts, cells.shape[axis]))
        sums = np.add.reduceat(cells, starts, axis=axis)
        cells = sums / (sizes[:, None] if axis == 0 else sizes)
    averaged = f"{steps[0]} × {steps[1]} {units}" if max(steps) > 1 or units != "entries" else ""
    return Sheet(cells, down, across, ordered=ordered, averaged=averaged)


def _wrapped(kernels: Array) -> Array:
    """A list of kernels as a grid that is somewhat wider than high, with few places empty."""
    count = len(kernels)
    root = math.sqrt(count)
    widths = range(math.ceil(root), max(math.ceil(root), math.floor(2.5 * root)) + 1)
    across = min(widths, key=lambda width: (-count % width, abs(width - 1.25 * root)))
    empty = np.full((-count % across, *kernels.shape[1:]), np.nan)
    return np.concatenate([kernels, empty]).reshape(-1, across, *kernels.shape[1:])
