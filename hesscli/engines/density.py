"""Densities of eigenvalues: kernels as wide as eigenvalues are large, and spikes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hesscli.engines.quadrature import Array, Measure

_REACH = 5.0  # kernel widths to either side
_STEPS = 6  # grid points a kernel width
_MOST_POINTS = 2000
_SPIKE = 1e-4  # half a spike's width, beside its eigenvalue
_NARROWEST, _WIDEST = 0.02, 0.6
_LEAST_SCALE = 1e-9  # of the largest eigenvalue


@dataclass(frozen=True)
class Smoothed:
    """A probability density at some points; what is between them is linear.

    An eigenvalue λ that was not counted has a Gaussian kernel in arcsinh(λ / scale), about
    ``bandwidth`` · √(λ² + scale²) wide; one that was, a triangle far narrower.
    """

    grid: Array
    values: Array
    bandwidth: float
    scale: float


def smoothed(measure: Measure, runs: int, bandwidth: float | None = None) -> Smoothed:
    """The density of a measure.

    Args:
        measure: eigenvalues and weights.
        runs: how many start vectors the eigenvalues come from.
        bandwidth: relative width of the kernels; None takes the distance of the eigenvalues
            that one start vector sees, which is what it can resolve.
    """
    values, weights = (part[~measure.isolated] for part in (measure.values, measure.weights))
    scale = _scale(measure)
    places = np.arcsinh(values / scale)
    width = _automatic(places, runs) if bandwidth is None else bandwidth
    grid = _grid(places, width, scale)
    spikes, halves, masses = _spikes(measure, scale)
    grid = np.unique(np.concatenate([grid, spikes - halves, spikes, spikes + halves]))
    density = _bulk(grid, places, weights, width, scale)
    for spike, half, weight in zip(spikes, halves, masses, strict=True):
        near = np.abs(grid - spike) < half
        density[near] += weight / half * (1 - np.abs(grid[near] - spike) / half)
    return Smoothed(grid, density, width, scale)


def _scale(measure: Measure) -> float:
    """The size up to which kernels are equally wide: that of a typical eigenvalue in the bulk."""
    sizes, bulk = np.abs(measure.values), ~measure.isolated
    largest = float(sizes.max(initial=0.0)) or 1.0
    if not bulk.any():
        return largest
    order = np.argsort(sizes[bulk])
    shares = np.cumsum(measure.weights[bulk][order])
    middle = np.searchsorted(shares, shares[-1] / 2)
    return float(max(sizes[bulk][order][middle], _LEAST_SCALE * largest))


def _automatic(places: Array, runs: int) -> float:
    nodes = max(len(places) / runs, 1.0)
    spread = float(np.ptp(places)) if len(places) else 0.0
    return float(np.clip(0.75 * spread / nodes, _NARROWEST, _WIDEST))


def _grid(places: Array, width: float, scale: float) -> Array:
    """Points around the kernels' middles, as dense as the kernels are narrow."""
    if not len(places):
        return np.empty(0)
    low, high = places.min() - _REACH * width, places.max() + _REACH * width
    count = min(int(_STEPS * (high - low) / width) + 2, _MOST_POINTS)
    return np.asarray(scale * np.sinh(np.linspace(low, high, count)))


def _spikes(measure: Measure, scale: float) -> tuple[Array, Array, Array]:
    """Where they stand, half of their width, and their weight; what would overlap is one."""
    values, weights = (part[measure.isolated] for part in (measure.values, measure.weights))
    halves = _SPIKE * np.sqrt(values**2 + scale**2)
    first = np.flatnonzero(np.diff(values, prepend=-np.inf) > 3 * halves)
    if not len(first):
        return values, halves, weights
    masses = np.add.reduceat(weights, first)
    middles = np.add.reduceat(weights * values, first) / masses
    return middles, halves[first], masses


def _bulk(grid: Array, places: Array, weights: Array, width: float, scale: float) -> Array:
    """Per unit of λ, with the trapezoidal rule's integral equal to the sum of the weights."""
    density = np.zeros_like(grid)
    if not weights.sum() > 0:
        return density
    here = np.arcsinh(grid / scale)
    for place, weight in zip(places, weights, strict=True):
        density += weight * np.exp(-0.5 * ((here - place) / width) ** 2)
    density /= np.sqrt(grid**2 + scale**2)
    return np.asarray(density * (weights.sum() / np.trapezoid(density, grid)))
