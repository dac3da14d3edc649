"""Ritz values: which of them stand alone, and how many copies of each eigenvalue were found."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

APART = 4.0
"""An eigenvalue stands alone if the next Ritz value is this many error bars away."""
_SHARP = 16.0
"""And a copy of it is one only if both bars together are so many times smaller than that."""
_EXACT = 4.0
"""A Ritz pair is as good as it gets once its bar is this many times rounding."""


@dataclass(frozen=True)
class Ritz:
    """What k steps tell of the eigenvalues, in ascending order.

    An eigenvalue lies within ``residuals[i]`` of ``values[i]``; ``rounding`` is the part of each
    residual that more steps do not shrink. ``weights`` sum to 1: Σ weights · f(values) is the
    Gauss quadrature of vᵀ f(A) v for the start vector v, in which what was found after a
    breakdown has no part. Columns of ``coordinates`` are the Ritz vectors in the basis.
    """

    values: Array
    residuals: Array
    weights: Array
    coordinates: Array
    rounding: float


@dataclass(frozen=True)
class Group:
    """Neighbouring Ritz values that cannot be told apart: indices ``first`` to ``last``."""

    first: int
    last: int

    @property
    def copies(self) -> int:
        """How many Ritz values they are."""
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
    return tuple(as_counted(ritz, group) for group in standing_alone(ritz))


def copies(known: Sequence[Counted], ritz: Ritz) -> list[Group]:
    """What a run in the complement of known eigenvectors has found of the same eigenvalues."""
    groups = [(group, as_counted(ritz, group)) for group in standing_alone(ritz)]
    return [group for group, one in groups if any(k.is_at(one.value, one.bar) for k in known)]


def with_copies(known: Sequence[Counted], ritz: Ritz) -> tuple[Counted, ...]:
    """Known eigenvalues, with the copies of them that a run in their complement has found."""
    total = list(known)
    for group in copies(known, ritz):
        one = as_counted(ritz, group)
        nearest = min(range(len(known)), key=lambda i: abs(known[i].value - one.value))
        total[nearest] = replace(total[nearest], copies=total[nearest].copies + one.copies)
    return tuple(total)


def _groups(ritz: Ritz) -> list[Group]:
    """Runs of Ritz values that are equal to rounding; most are of one."""
    exact = ritz.residuals <= _EXACT * ritz.rounding
    near = np.diff(ritz.values) <= _EXACT * ritz.rounding
    ends = [i for i in range(len(exact) - 1) if not (near[i] and exact[i] and exact[i + 1])]
    stops = [*ends, len(exact) - 1]
    return [Group(a + 1, b) for a, b in itertools.pairwise([-1, *stops])]


def _is_alone(ritz: Ritz, group: Group) -> bool:
    one = as_counted(ritz, group)
    return APART * one.bar <= one.room


def as_counted(ritz: Ritz, group: Group) -> Counted:
    """A group as an eigenvalue."""
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
