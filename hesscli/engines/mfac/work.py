"""What is done with a window's rows: numbers that are made, read and multiplied, by formulas.

They are of the window's rows and of sizes of blocks alone, so that no machine matters, nor how many
ranks share the work. Their coefficients are fitted to CPU time, at the prices of a pass, of twelve
windows of 16 to 512 rows in blocks of 4 to 512 columns, and of eight in one block. A single stage
takes from half to twice what they say, all of a study within a fifth in blocks of 9 columns and
of 128, the usual ones of a large network and of a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hesscli.engines.mfac.gram import panels
from hesscli.meter import Algebra

_EIGEN = 6
"""Times as long as a product of two matrices it takes to find the eigenvalues of one as large."""
_SIGNS = 8
"""Vectors by which the size of rounding is measured."""
_WIDE = 2
"""Multiplications in float32 that one in float64 takes."""
_CALLED = 40
"""Entries that are made in the time in which a routine of linear algebra begins with a matrix."""
_VALUES = np.dtype(np.float64).itemsize


class _Column(Protocol):
    """What parts of an inverse take, shared out among a block's columns."""

    begun: Algebra
    matrix: Algebra
    factor: Algebra
    bound: Algebra
    solve: Algebra
    image: Algebra
    diagonal: Algebra
    masked: Algebra

    def subsets(self, rows: Sequence[int], groups: int) -> Algebra:
        """Diagonals from so many rows each, which are some of so many groups."""


class _InOwnMatrix:
    """In a block of b columns, no more than there are rows n: its own b×b matrix is inverted."""

    def __init__(self, block: int, rows: int) -> None:
        self._block = block
        self.matrix = Algebra(made=1.25 * rows, read=rows, multiplied=_WIDE * rows * block)
        self.begun = self.matrix
        self.factor = Algebra(made=block + _CALLED / block, multiplied=_WIDE * 0.75 * block**2)
        self.bound = self._solved(_SIGNS)
        self.solve = self._solved(1)
        self.image = Algebra(made=2, read=block, multiplied=_WIDE * block)
        self.diagonal = Algebra(
            made=1.25 * block + _CALLED / block, multiplied=_WIDE * 1.25 * block**2
        )
        self.masked = Algebra(made=2 * block)

    def subsets(self, rows: Sequence[int], groups: int) -> Algebra:
        """Each group's matrix is made once, and added up for each choice of some."""
        added = Algebra(
            made=groups * self._block, multiplied=_WIDE * len(rows) * groups * self._block
        )
        return self.matrix + added + (self.factor + self.diagonal).times(len(rows))

    def _solved(self, count: int) -> Algebra:
        """So many right sides at once."""
        multiplied = _WIDE * count * self._block
        return Algebra(made=2 * count, read=2 * self._block, multiplied=multiplied)


class _ByGram:
    """In a block of more columns than there are rows n: an n×n matrix of them all is inverted."""

    def __init__(self, block: int, rows: int, dtype: torch.dtype) -> None:
        self._block = block
        self._wide = _WIDE if dtype == torch.float64 or block < 2 * rows else 1
        own, share = _InOwnMatrix(rows, rows), rows / block
        self.matrix = _gram(rows, self._wide)
        self.factor = (own.factor + own.bound).times(share)
        self.begun = self.matrix + self.factor
        self.bound = Algebra()
        self.solve = self.image = Algebra(read=2 * rows)
        self.diagonal = self._diagonal(rows)
        self.masked = Algebra(made=rows) + self.matrix

    def subsets(self, rows: Sequence[int], groups: int) -> Algebra:
        """Each choice of rows has its part of their matrix, and is copied."""
        found = self.matrix
        for count in rows:
            own = _InOwnMatrix(count, count)
            found += (own.factor + own.bound).times(count / self._block)
            found += self._diagonal(count) + Algebra(read=2 * count)
        return found

    def _diagonal(self, rows: int) -> Algebra:
        """By the inverse of a factor, whose product with the rows takes as much as theirs."""
        inverse = _InOwnMatrix(rows, rows).diagonal + _small(1 + _EIGEN, rows**2)
        product = _gram(rows, self._wide) + Algebra(read=rows)
        return product + inverse.times(rows / self._block)


def _small(products: float, pairs: float) -> Algebra:
    """So many products of two small matrices in float64."""
    return Algebra(multiplied=_WIDE * products * pairs)


def _gram(rows: int, wide: float) -> Algebra:
    """A column's part of GGᵀ, up to the diagonal only."""
    pairs = sum((place.stop - place.start) * place.stop for place in panels(rows))
    return Algebra(read=rows, multiplied=wide * pairs)


@dataclass(frozen=True)
class InverseWork:
    """Of an inverse, and of what is asked of it.

    Args:
        sizes: of its blocks.
        rows: of the window.
        dtype: that these are kept in.
        kept: whether its matrices and factors are; or whoever needs them makes them anew.
    """

    sizes: NDArray[np.int64]
    rows: int
    dtype: torch.dtype
    kept: bool

    @property
    def built(self) -> Algebra:
        """Once, for all that is kept."""
        return self._sum(lambda of: of.matrix + of.factor) if self.kept else Algebra()

    @property
    def first_solved(self) -> Algebra:
        """(F̂ + λI)⁻¹ x, and bounds of its rounding."""
        bounds = self._sum(lambda of: of.bound) if self.kept else Algebra()
        return bounds + self.solved_again

    @property
    def solved_again(self) -> Algebra:
        """For another x."""
        if self.kept:
            return self._sum(lambda of: of.solve)
        return self._sum(lambda of: of.matrix + of.factor + of.bound + of.solve)

    @property
    def multiplied(self) -> Algebra:
        """(F̂ + λI) x."""
        return self._matrices + self._sum(lambda of: of.image)

    @property
    def diagonal(self) -> Algebra:
        """Of the inverse."""
        found = self._sum(lambda of: of.diagonal)
        return found if self.kept else found + self._sum(lambda of: of.matrix + of.factor)

    def damped(self, count: int) -> Algebra:
        """A solution and the diagonal at each of so many dampings."""
        each = self._sum(lambda of: of.factor + of.solve + of.diagonal)
        return self._matrices + each.times(count)

    @property
    def compensated(self) -> Algebra:
        """What stays makes up for weights that go."""
        masked = self._sum(lambda of: of.masked + of.factor + of.bound + of.solve + of.image)
        return self._matrices + masked

    def subsets(self, sets: torch.Tensor) -> Algebra:
        """Diagonals from some groups of rows each, as ``inverse_diagonals`` is told of them."""
        groups = sets.shape[1]
        members = [len(range(group, self.rows, groups)) for group in range(groups)]
        rows = [sum(n for n, is_in in zip(members, each, strict=True) if is_in) for each in sets]
        return self._sum(lambda of: of.subsets(rows, groups))

    @property
    def _matrices(self) -> Algebra:
        """Made anew where they are not kept, and factorised where that is done at once."""
        return Algebra() if self.kept else self._sum(lambda of: of.begun)

    def _sum(self, part: Callable[[_Column], Algebra]) -> Algebra:
        """Over all columns."""
        found = Algebra()
        for size, count in zip(*np.unique(self.sizes, return_counts=True), strict=True):
            block = int(size)
            column: _Column = (
                _InOwnMatrix(block, self.rows)
                if block <= self.rows
                else _ByGram(block, self.rows, self.dtype)
            )
            found += part(column).times(block * int(count))
        return found


def stored(rows: int, columns: int, dtype: torch.dtype) -> Algebra:
    """Rows that are put into a window, seen to be finite, and squared."""
    return Algebra(made=dtype.itemsize / _VALUES, read=2).times(rows * columns)


def spanned(rows: int, columns: int, dtype: torch.dtype, vectors: int) -> Algebra:
    """Lengths of some vectors' projections to the rows of a window, by the whole of GGᵀ."""
    whole = _gram(rows, _WIDE if dtype == torch.float64 else 1)
    products = Algebra(read=2 * rows, multiplied=_WIDE * vectors * rows)
    return (whole + products).times(columns) + _small(_EIGEN, rows**3)
