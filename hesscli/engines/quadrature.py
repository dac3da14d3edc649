"""Stochastic Lanczos quadrature: where the eigenvalues lie, their density, and sums over them.

Ubaru, Chen & Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"; Ghorbani,
Krishnan & Xiao 2019, arXiv 1901.10159. A start vector's share of a single eigenvector is a random
number with mean 1/d and standard deviation √2/d, which is all the noise that a spectrum with
outliers has. Eigenvalues that stand alone are counted instead: 1/d each, and what is left over is
shared among the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaincc
from torch import Tensor

from hesscli.engines.lanczos import Ritz

# -- Stochastic Lanczos quadrature: where the eigenvalues of a matrix lie, from a few start vectors


Array = NDArray[np.float64]

APART = 4.0
"""An eigenvalue stands alone if the next Ritz value is this many error bars away."""
_SHARP = 16.0
"""And a copy of it is one only if both bars together are so many times smaller than that."""
_EXACT = 4.0
"""A Ritz pair is as good as it gets once its bar is this many times rounding."""
_IMPLAUSIBLE = 1e-3
"""A start vector's share of an eigenspace that is less likely means that it is larger."""


@dataclass(frozen=True)
class Counted:
    """An eigenvalue that stands alone, and as many copies of it as were found.

    ``room`` is the distance to where the next one may be.
    """

    value: float
    bar: float
    room: float
    copies: int

    def is_at(self, value: float, bar: float) -> bool:
        """Whether it is the same eigenvalue, and known so well that it can be no other."""
        error = self.bar + bar
        return abs(value - self.value) <= error and _SHARP * error <= self.room


@dataclass(frozen=True)
class Group:
    """Neighbouring Ritz values that cannot be told apart: indices ``first`` to ``last``."""

    first: int
    last: int

    @property
    def copies(self) -> int:
        """How many they are."""
        return self.last - self.first + 1

    @property
    def indices(self) -> range:
        """Their places among the Ritz values."""
        return range(self.first, self.last + 1)

    @property
    def part(self) -> slice:
        """The same as a slice."""
        return slice(self.first, self.last + 1)


@dataclass(frozen=True)
class KrylovRun:
    """What one start vector tells, in the complement of the eigenvectors found before.

    ``dimension`` is that of the complement, and ``deflated`` are the eigenvalues left out of it.
    """

    ritz: Ritz
    dimension: int
    deflated: tuple[Counted, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether its Ritz values are all the eigenvalues there are."""
        return len(self.ritz.values) == self.dimension


@dataclass(frozen=True)
class Measure:
    """Eigenvalues with weights that sum to 1; ``isolated`` ones were counted, not estimated."""

    values: Array
    weights: Array
    isolated: NDArray[np.bool_]


def standing_alone(ritz: Ritz) -> list[Group]:
    """The groups at either end of the spectrum that are far apart, beside their error bars.

    From an end inwards up to the first that is not: what is missing between them would show.
    """
    groups = _groups(ritz)
    alone = [_is_alone(ritz, group) for group in groups]
    below = list(itertools.takewhile(lambda index: alone[index], range(len(groups))))
    above = list(itertools.takewhile(lambda index: alone[index], reversed(range(len(groups)))))
    return [groups[index] for index in sorted({*below, *above})]


def counted(ritz: Ritz) -> tuple[Counted, ...]:
    """The eigenvalues that stand alone."""
    return tuple(_counted(ritz, group) for group in standing_alone(ritz))


def copies(known: Sequence[Counted], ritz: Ritz) -> list[Group]:
    """What a run in the complement of known eigenvectors has found of the same eigenvalues."""
    groups = [(group, _counted(ritz, group)) for group in standing_alone(ritz)]
    return [group for group, one in groups if any(k.is_at(one.value, one.bar) for k in known)]


def with_copies(known: Sequence[Counted], ritz: Ritz) -> tuple[Counted, ...]:
    """Known eigenvalues, with the copies of them that a run in their complement has found."""
    total = list(known)
    for group in copies(known, ritz):
        one = _counted(ritz, group)
        nearest = min(range(len(known)), key=lambda i: abs(known[i].value - one.value))
        total[nearest] = replace(total[nearest], copies=total[nearest].copies + one.copies)
    return tuple(total)


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


class Complement:
    """Coordinates of the vectors orthogonal to some orthonormal rows ``(s, d)``.

    The last d − s columns of the product of s Householder reflections, which is never formed.
    """

    def __init__(self, rows: Tensor) -> None:
        self._count, self._length = rows.shape
        self._reflectors, self._scales = torch.geqrf(rows.T)

    @property
    def size(self) -> int:
        """D − s."""
        return self._length - self._count

    def embed(self, coordinates: Tensor) -> Tensor:
        """From coordinates ``(d − s,)`` to the vector ``(d,)``."""
        padded = coordinates.new_zeros(self._length, 1)
        padded[self._count :, 0] = coordinates
        return torch.ormqr(self._reflectors, self._scales, padded)[:, 0]

    def restrict(self, vector: Tensor) -> Tensor:
        """From a vector ``(d,)`` to the coordinates of its part in the complement."""
        turned = torch.ormqr(self._reflectors, self._scales, vector[:, None], transpose=True)
        return turned[self._count :, 0].contiguous()


def _groups(ritz: Ritz) -> list[Group]:
    """Runs of Ritz values that are equal to rounding; most are of one."""
    exact = ritz.residuals <= _EXACT * ritz.rounding
    near = np.diff(ritz.values) <= _EXACT * ritz.rounding
    ends = [i for i in range(len(exact) - 1) if not (near[i] and exact[i] and exact[i + 1])]
    stops = [*ends, len(exact) - 1]
    return [Group(a + 1, b) for a, b in itertools.pairwise([-1, *stops])]


def _is_alone(ritz: Ritz, group: Group) -> bool:
    one = _counted(ritz, group)
    return APART * one.bar <= one.room


def _counted(ritz: Ritz, group: Group) -> Counted:
    values, bars = ritz.values, ritz.residuals
    first, last = group.first, group.last
    below = values[first] - values[first - 1] - bars[first - 1] if first else np.inf
    end = last == len(values) - 1
    above = np.inf if end else values[last + 1] - values[last] - bars[last + 1]
    return Counted(
        value=float(values[group.part].mean()),
        bar=float(ritz.residuals[group.part].max()),
        room=float(min(below, above)),
        copies=group.copies,
    )


def _bulk(run: KrylovRun, known: Sequence[Counted]) -> Array:
    """The shares of a run's Ritz values in what is not counted; they sum to 1.

    An eigenvalue that is counted has none, unless the start vector's share of it is implausible
    for so many copies: then there are more of it, and the rest of the share stands for them.
    """
    amounts = run.dimension * run.ritz.weights
    for group in standing_alone(run.ritz):
        one = _counted(run.ritz, group)
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
    """Where they stand, half of their width, and their weight; what would overlap is one."""
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
    """Σλ."""
    return float(counts @ values)


def squared_norm(values: Array, counts: Array) -> float | None:
    """Σλ², the squared Frobenius norm."""
    return float(counts @ values**2)


def negative_mass(values: Array, counts: Array) -> float | None:
    """Σ_{λ<0} |λ| / Σ|λ|."""
    shares = _shares(values, counts)
    return None if shares is None else float(shares[values < 0].sum())


def stable_rank(values: Array, counts: Array) -> float | None:
    """Σλ² / max λ²."""
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
