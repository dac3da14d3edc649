"""Blocks with no more columns than the window has rows: their own matrices, inverted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from hesscli.engines.mfac.cholesky import (
    CholeskyFactor,
    NotPositiveError,
    factorised,
    inverse_lower,
    too_little,
)
from hesscli.engines.mfac.system import Solved
from hesscli.engines.mfac.window import TILE, GradientWindow
from hesscli.meter import OnStep, go_on
from hesscli.sums import rounding_of_sum

_CHUNK = 2**22
"""Numbers in a chunk of matrices on which work is done at once."""


class PrimalRun:
    """Consecutive blocks of one size b, each F̂_b + λI in float64 with its Cholesky factor.

    Nothing cancels here: A⁻¹ = L⁻ᵀL⁻¹ where the dual form has (I − VᵀV) / λ.

    Args:
        window: the rows.
        columns: which of their columns, all blocks together.
        block: b.
        damping: λ.
        matrices: F̂_b ``(r, b, b)`` where they are known already.
        on_step: called after each tile of columns; may end it.
    """

    def __init__(
        self,
        window: GradientWindow,
        columns: slice,
        block: int,
        damping: float,
        matrices: Tensor | None = None,
        on_step: OnStep = go_on,
    ) -> None:
        self.window, self.columns, self.block, self.damping = window, columns, block, damping
        self.size: int = columns.stop - columns.start
        self.blocks = self.size // block
        self.matrices = self._squares(on_step) if matrices is None else matrices

    def factorise(self) -> None:
        """Make the factor now, where a damping that is lost in rounding is to be seen at once.

        Raises:
            UnsoundError: it is.
        """
        _ = self.factor

    @cached_property
    def factor(self) -> CholeskyFactor:
        """Of the damped matrices."""
        A = self.matrices.clone()
        A.diagonal(dim1=1, dim2=2).add_(self.damping)
        try:
            return factorised(A)
        except NotPositiveError as error:
            raise too_little(self.damping, error.missing) from error

    @cached_property
    def _u(self) -> float:
        return rounding_of_sum(self.window.count + 1, torch.float64) + self.factor.rounding

    @property
    def table_nbytes(self) -> int:
        """Memory for the table from which elements are read."""
        return self.size * self.block * torch.float64.itemsize

    def damped(self, damping: float) -> PrimalRun:
        """The same blocks with another λ."""
        return PrimalRun(self.window, self.columns, self.block, damping, self.matrices)

    def without(self, gone: Tensor) -> PrimalRun:
        """The same as if rows were zero in some of the window's columns, of which λ is left."""
        window = self.window.without(gone)
        stays = (~gone[self.columns]).view(self.blocks, self.block).to(self.matrices)
        matrices = self.matrices * (stays[:, :, None] * stays[:, None])
        return PrimalRun(window, self.columns, self.block, self.damping, matrices)

    def solve(self, rights: Tensor) -> Solved:
        """Y for rows X ``(k, size)``, and bounds ``(k,)`` of their errors.

        An error of u D_i D_j in A, with D² its diagonal, changes y by u ‖A⁻¹D‖ ‖Dy‖.
        """
        found = self.factor.solve(self._columns(rights))
        weights = (found * self.factor.scales[..., None]).square().sum(1)
        off = self._u * (self._spreads[:, None] * weights).sum(0).sqrt()
        return self._rows(found), off

    def plain(self, rights: Tensor) -> tuple[Tensor, Tensor]:
        """Y for rows X and the diagonal of the inverse, without bounds of their errors."""
        root = inverse_lower(self.factor.lower)
        found = self._rows(root.mT @ (root @ self._columns(rights)))
        return found, root.square_().sum(1).flatten()

    def combination(self, amounts: Tensor) -> Solved:
        """Y for X = Gᵀa, of amounts ``(k, n)``, and bounds ``(k,)`` of their errors."""
        return self.solve(self.window.combine(amounts, self.columns))

    def multiply(self, vectors: Tensor) -> Tensor:
        """(F̂ + λI) x for rows ``(k, size)``."""
        return self._rows(self.matrices @ self._columns(vectors)) + self.damping * vectors

    @cached_property
    def diagonal(self) -> tuple[Tensor, Tensor]:
        """The diagonal of the inverse, and bounds of its errors, each ``(size,)``.

        An error of u D_i D_j in A changes (A⁻¹)_qq by u ‖D A⁻¹ e_q‖².
        """
        entries, errors = [], []
        for part in self._chunks():
            inverse = torch.cholesky_inverse(self.factor.lower[part])
            scaled = inverse * self.factor.scales[part, :, None]
            entries.append(inverse.diagonal(dim1=1, dim2=2))
            errors.append(self._u * scaled.square().sum(1))
        return torch.cat(entries).flatten(), torch.cat(errors).flatten()

    def element(self, row: int, column: int) -> float:
        """An element of the inverse; zero across blocks."""
        if row // self.block != column // self.block:
            return 0.0
        return float(torch.dot(self._table[row], self._table[column]))

    def submatrix(self, indices: Tensor) -> Tensor:
        """A submatrix of the inverse ``(k, k)``, zero across blocks."""
        blocks, places = indices // self.block, indices % self.block
        found = self.matrices.new_zeros(len(indices), len(indices))
        for block in sorted(set(blocks.tolist())):
            here = (blocks == block).nonzero()[:, 0]
            ends = self.matrices.new_zeros(self.block, len(here))
            ends[places[here], torch.arange(len(here), device=ends.device)] = 1
            roots = torch.linalg.solve_triangular(self.factor.lower[block], ends, upper=False)
            found[here[:, None], here] = roots.T @ roots
        return found

    def groups(self, size: int) -> Tensor:
        """The inverse's blocks of so many consecutive columns each ``(r, size, size)``."""
        found = []
        for part in self._chunks():
            inverse = torch.cholesky_inverse(self.factor.lower[part])
            cut = inverse.view(len(inverse), -1, size, self.block // size, size)
            found.append(cut.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1))
        return torch.cat(found)

    @cached_property
    def _table(self) -> Tensor:
        """L⁻¹ e_q in row q, ``(size, b)``."""
        return torch.cat(
            [inverse_lower(self.factor.lower[part]).mT for part in self._chunks()]
        ).reshape(self.size, self.block)

    @cached_property
    def _spreads(self) -> Tensor:
        """‖A⁻¹D‖² of each block, by vectors of signs."""
        parts = (
            CholeskyFactor(self.factor.lower[part], self.factor.scales[part])
            for part in self._chunks()
        )
        return torch.cat([part.solved_errors().square().sum(1).amax(1) for part in parts])

    def _chunks(self) -> Iterator[slice]:
        """Blocks, a bounded number at a time."""
        step = max(1, _CHUNK // self.block**2)
        return (slice(i, i + step) for i in range(0, self.blocks, step))

    def _columns(self, rows: Tensor) -> Tensor:
        """Rows ``(k, size)`` as columns ``(r, b, k)``."""
        return rows.reshape(len(rows), self.blocks, self.block).permute(1, 2, 0).contiguous()

    def _rows(self, columns: Tensor) -> Tensor:
        """The way back."""
        return columns.permute(2, 0, 1).reshape(columns.shape[2], self.size)

    def _squares(self, on_step: OnStep) -> Tensor:
        """F̂_b ``(r, b, b)``, all in float64."""
        found, count = [], self.window.count
        for _, tile in self.window.tiles(self.columns, self.block * max(1, TILE // self.block)):
            rows = tile.double().view(count, -1, self.block).transpose(0, 1)
            found.append(rows.mT @ rows / count)
            on_step()
        return torch.cat(found)
