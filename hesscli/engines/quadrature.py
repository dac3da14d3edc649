"""Stochastic Lanczos quadrature: where the eigenvalues of a matrix lie, from a few start vectors.

Ubaru, Chen & Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"; Ghorbani,
Krishnan & Xiao 2019, arXiv 1901.10159. A start vector's share of a single eigenvector is a random
number with mean 1/d and standard deviation √2/d, which is all the noise that a spectrum with
outliers has. Eigenvalues that stand alone are counted instead: 1/d each, and what is left over is
shared among the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaincc
from torch import Tensor

from hesscli.engines.lanczos import Ritz

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
class Run:
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


def measure(runs: Sequence[Run], known: Sequence[Counted], dimension: int) -> Measure:
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


def _bulk(run: Run, known: Sequence[Counted]) -> Array:
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
