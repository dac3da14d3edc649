"""Stochastic Lanczos quadrature: where the eigenvalues lie, their density, and sums over them.

Ubaru, Chen & Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"; Ghorbani,
Krishnan & Xiao 2019, arXiv 1901.10159. A start vector's share of a single eigenvector is a random
number with mean 1/d and standard deviation √2/d, which is all the noise that a spectrum with
outliers has. Eigenvalues that stand alone are counted instead: 1/d each, and what is left over is
shared among the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincc

from hesscli.engines.ritz import Array, Counted, KrylovRun, as_counted, standing_alone

_IMPLAUSIBLE = 1e-3
"""A start vector's share of an eigenspace that is less likely means that it is larger."""


@dataclass(frozen=True)
class Measure:
    """Eigenvalues with weights that sum to 1; ``isolated`` ones were counted, not estimated."""

    values: Array
    weights: Array
    isolated: NDArray[np.bool_]


def measure(runs: Sequence[KrylovRun], known: Sequence[Counted], dimension: int) -> Measure:
    """The mean over some runs, with the known eigenvalues counted.

    Args:
        runs: from independent start vectors.
        known: the eigenvalues that stand alone, with all their copies.
        dimension: of the matrix.
    """
    if runs[0].complete:
        values = runs[0].ritz.values
        weights = np.full(len(values), 1 / dimension)
        return Measure(values, weights, np.ones(len(values), dtype=bool))
    rest = 1 - sum(one.copies for one in known) / dimension
    bulks = [_bulk(run, known) for run in runs]
    values = np.concatenate([[one.value for one in known], *(run.ritz.values for run in runs)])
    weights = np.concatenate(
        [[one.copies / dimension for one in known], *(rest * bulk / len(runs) for bulk in bulks)]
    )
    isolated = np.arange(len(values)) < len(known)
    kept = weights > 0
    order = np.argsort(values[kept], kind="stable")
    return Measure(values[kept][order], weights[kept][order], isolated[kept][order])


def _bulk(run: KrylovRun, known: Sequence[Counted]) -> Array:
    """The shares of a run's Ritz values in what is not counted; they sum to 1.

    An eigenvalue that is counted has none, unless the start vector's share of it is implausible
    for so many copies: then there are more of it, and the rest of the share stands for them.
    """
    amounts = run.dimension * run.ritz.weights
    for group in standing_alone(run.ritz):
        one = as_counted(run.ritz, group)
        copies = sum(k.copies for k in known if k.is_at(one.value, one.bar))
        copies -= sum(k.copies for k in run.deflated if k.is_at(one.value, one.bar))
        if copies > 0:
            amounts[group.part] *= _excess(float(amounts[group.part].sum()), copies)
    amounts = amounts if amounts.sum() > 0 else run.ritz.weights
    return np.asarray(amounts / amounts.sum())


def _excess(amount: float, copies: int) -> float:
    """The part of an amount that these copies do not explain: it is χ² with as many degrees."""
    plausible = gammaincc(copies / 2, amount / 2) > _IMPLAUSIBLE
    return 0.0 if plausible else 1 - copies / amount


# -- Densities of eigenvalues: kernels as wide as eigenvalues are large, and spikes ----------------


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
    density = _smooth_bulk(grid, places, weights, width, scale)
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
    """Where the spikes of isolated eigenvalues stand, half of their width, and their weight."""
    values, weights = (part[measure.isolated] for part in (measure.values, measure.weights))
    halves = _SPIKE * np.sqrt(values**2 + scale**2)
    first = np.flatnonzero(np.diff(values, prepend=-np.inf) > 3 * halves)
    if not len(first):
        return values, halves, weights
    masses = np.add.reduceat(weights, first)
    middles = np.add.reduceat(weights * values, first) / masses
    return middles, halves[first], masses


def _smooth_bulk(grid: Array, places: Array, weights: Array, width: float, scale: float) -> Array:
    """Per unit of λ, with the trapezoidal rule's integral equal to the sum of the weights."""
    density = np.zeros_like(grid)
    if not weights.sum() > 0:
        return density
    here = np.arcsinh(grid / scale)
    for place, weight in zip(places, weights, strict=True):
        density += weight * np.exp(-0.5 * ((here - place) / width) ** 2)
    density /= np.sqrt(grid**2 + scale**2)
    return np.asarray(density * (weights.sum() / np.trapezoid(density, grid)))


# -- Numbers that depend on all eigenvalues, read off a measure of them ----------------------------


Function = Callable[[Array, Array], float | None]
"""Of eigenvalues and how many there are of each; None where it has no meaning."""


def trace(values: Array, counts: Array) -> float | None:
    """The trace Σλ."""
    return float(counts @ values)


def squared_norm(values: Array, counts: Array) -> float | None:
    """Σλ², the squared Frobenius norm."""
    return float(counts @ values**2)


def negative_mass(values: Array, counts: Array) -> float | None:
    """The negative mass Σ_{λ<0} |λ| / Σ|λ|."""
    shares = _shares(values, counts)
    return None if shares is None else float(shares[values < 0].sum())


def stable_rank(values: Array, counts: Array) -> float | None:
    """The stable rank Σλ² / max λ²."""
    largest = float(np.abs(values).max(initial=0.0))
    return float(counts @ (values / largest) ** 2) if largest else None


def effective_rank(values: Array, counts: Array) -> float | None:
    """The exponential of the entropy of |λ| / Σ|λ| (Roy & Vetterli 2007, EUSIPCO, section 2)."""
    shares = _shares(values, counts)
    if shares is None:
        return None
    taken = shares > 0
    return float(np.exp(-shares[taken] @ np.log(shares[taken] / counts[taken])))


FUNCTIONS: dict[str, Function] = {
    function.__name__: function
    for function in (trace, squared_norm, negative_mass, stable_rank, effective_rank)
}


def evaluate(function: Function, measure: Measure, dimension: int) -> float | None:
    """A function of a matrix of so many rows."""
    return function(measure.values, dimension * measure.weights)


def _shares(values: Array, counts: Array) -> Array | None:
    """Each value's share of Σ|λ|, with huge and tiny ones brought near 1 first."""
    largest = float(np.abs(values).max(initial=0.0))
    if not largest:
        return None
    sizes = counts * np.abs(values / largest)
    return np.asarray(sizes / sizes.sum())
