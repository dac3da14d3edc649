"""A block with more columns than the window has rows, inverted by way of n×n matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
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
from hesscli.engines.mfac.gram import PANEL, Gram, panels
from hesscli.engines.mfac.system import ENOUGH, Solved, System, is_enough
from hesscli.engines.mfac.window import TILE, GradientWindow
from hesscli.meter import OnStep, go_on
from hesscli.sums import rounding_of_sum, unit_roundoff


class DualBlock:
    """(F̂_b + λI)⁻¹ = (I − VᵀV) / λ with V = L⁻¹G_b and A = LLᵀ.

    Args:
        window: the rows.
        columns: which of their columns.
        damping: λ.
        precise: make products with the window in float64 or in float32; None is in float32
            wherever the bound of the error says that this leaves enough digits.
        grams: GGᵀ by whether its products are in float64, as far as known; shared and added to.
        on_step: called as GGᵀ is made; may end it.
    """

    def __init__(
        self,
        window: GradientWindow,
        columns: slice,
        damping: float,
        precise: bool | None,
        grams: dict[bool, Gram] | None = None,
        on_step: OnStep = go_on,
    ) -> None:
        self.window, self.columns, self.damping = window, columns, damping
        self.size = int(columns.stop - columns.start)
        self.precise = True if window.dtype == torch.float64 else precise
        self.dtype = torch.float64 if self.precise else torch.float32
        self._grams, self._on_step = {} if grams is None else grams, on_step
        self.gram, self.factor = self._factorised()
        self.system = System(self.gram, self.factor, damping, self.dtype)

    def factorise(self) -> None:
        """It is done."""

    @property
    def table_nbytes(self) -> int:
        """Memory for the table from which elements are read."""
        return self.size * self.gram.count * self.dtype.itemsize

    def damped(self, damping: float) -> DualBlock:
        """The same block with another λ."""
        return DualBlock(
            self.window, self.columns, damping, self.precise, self._grams, self._on_step
        )

    def without(self, gone: Tensor) -> DualBlock:
        """The same as if rows were zero in some of the window's columns, of which λ is left."""
        window, on_step = self.window.without(gone), self._on_step
        return DualBlock(window, self.columns, self.damping, self.precise, on_step=on_step)

    def select(self, slots: Tensor) -> DualBlock:
        """The same block from some of the rows."""
        window, grams = self.window.select(slots), self._grams
        selected = {exact: gram.select(slots) for exact, gram in grams.items()}
        return DualBlock(window, self.columns, self.damping, self.precise, selected, self._on_step)

    def solve(self, rights: Tensor) -> Solved:
        """Y for rows X ``(k, size)``, and bounds ``(k,)`` of their errors."""
        return self._with_digits(lambda system: system.solve(rights))

    def combination(self, amounts: Tensor) -> Solved:
        """Y for X = Gᵀa, of amounts ``(k, n)``, and bounds ``(k,)`` of their errors."""
        return self._with_digits(lambda system: system.combination(amounts))

    def multiply(self, vectors: Tensor) -> Tensor:
        """(F̂ + λI) x for rows ``(k, size)``, all in float64."""
        inner = self.window.added_up(self.window.project(vectors, self.columns))
        images = self.window.combine(inner, self.columns)
        return images / self.gram.count + self.damping * vectors

    def plain(self, rights: Tensor) -> tuple[Tensor, Tensor]:
        """Y for rows X and the diagonal of the inverse, without bounds of their errors."""
        return self.solve(rights)[0], self.diagonal[0]

    @cached_property
    def diagonal(self) -> tuple[Tensor, Tensor]:
        """The diagonal of the inverse, and bounds of its errors, each ``(size,)``.

        The leverage ‖V_q‖² lies within F_qq / (F_qq + λ), as it would if the inverse were
        diagonal, and is not let beyond: what is left of 1 is positive whatever rounding does.
        """
        leverage, most = torch.empty(2, self.size, dtype=torch.float64, device=self.window.device)
        for place, rows in self._tiles():
            squares = [part.square().sum(0).double() for _, part in self._roots(rows)]
            leverage[place] = torch.stack(squares).sum(0)
            most[place] = rows.square().sum(0).double()
        most /= self.gram.count
        least = self.damping / (self.damping + most * (1 + 1e-6))
        remaining = torch.maximum(1 - leverage, least)
        return remaining / self.damping, leverage * (self._relative / self.damping)

    def element(self, row: int, column: int) -> float:
        """An element of the inverse."""
        table: Tensor = self._table
        product = torch.dot(table[row], table[column]).item()
        return (float(row == column) - product) / self.damping

    def submatrix(self, indices: Tensor) -> Tensor:
        """A submatrix of the inverse ``(k, k)``, from these columns alone, in float64."""
        right = self.window.gather(indices + self.columns.start).double()
        V: Tensor = torch.linalg.solve_triangular(self.factor.lower, right, upper=False)
        identity = torch.eye(len(indices), dtype=torch.float64, device=V.device)
        return (identity - V.T @ V) / self.damping

    def groups(self, size: int) -> Tensor:
        """The inverse's blocks of so many consecutive columns each ``(r, size, size)``, float64."""
        found, width = [], size * max(1, TILE // size)
        identity = torch.eye(size, dtype=torch.float64, device=self.window.device)
        for _, tile in self.window.tiles(self.columns, width):
            V: Tensor = torch.linalg.solve_triangular(self.factor.lower, tile.double(), upper=False)
            parts = V.view(len(V), -1, size).permute(1, 2, 0)
            found.append((identity - parts @ parts.mT) / self.damping)
        return torch.cat(found)

    @cached_property
    def _table(self) -> Tensor:
        """The table Vᵀ ``(size, n)``, of which products with the inverse are made."""
        table = torch.empty(self.size, self.gram.count, dtype=self.dtype, device=self.window.device)
        for place, rows in self._tiles():
            for panel, part in self._roots(rows):
                table[place, panel] = part.T
        return table

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for place, tile in self.window.tiles(self.columns):
            yield place, tile.to(self.dtype)

    def _roots(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """V for a tile of G, a few rows at a time."""
        for panel in panels(len(rows)):
            yield panel, self._inverse_lower[panel, : panel.stop] @ rows[: panel.stop]

    @cached_property
    def _inverse_lower(self) -> Tensor:
        return inverse_lower(self.factor.lower).to(self.dtype)

    @cached_property
    def _relative(self) -> float:
        """Bound of a leverage's relative error.

        With ρ and σ the largest eigenvalues of D A⁻¹ D and D⁻¹ A D⁻¹: an error of u D_i D_j in A
        changes g ᵀA⁻¹g by u ‖DA⁻¹g‖² ≤ u ρ ‖v‖², and one of u |L⁻¹||g| in v by
        2u √ρ ‖D⁻¹g‖ ‖v‖ ≤ 2u √(ρσ) ‖v‖². Squares are summed over a panel of rows.
        """
        scaled = self.factor.lower / self.factor.scales[:, None]
        values = torch.linalg.eigvalsh(scaled @ scaled.T)
        least, most = values[[0, -1]].clamp_min(unit_roundoff(torch.float64)).tolist()
        u_matrix = self.gram.rounding + self.factor.rounding
        u_sum, u_square = (rounding_of_sum(n + 1, self.dtype) for n in (self.gram.count, PANEL))
        return float(u_matrix / least + 2 * u_sum * math.sqrt(most / least) + u_square)

    def _with_digits(self, attempt: Callable[[System], Solved]) -> Solved:
        """What an attempt finds; in float64 where that is needed, and may be done."""
        vectors, errors = attempt(self.system)
        if self.precise is not None or is_enough(self.window.lengths(vectors), errors):
            return vectors, errors
        return attempt(self._sharp)

    @cached_property
    def _sharp(self) -> System:
        """The same in float64."""
        return DualBlock(
            self.window, self.columns, self.damping, True, self._grams, self._on_step
        ).system

    def _factorised(self) -> tuple[Gram, CholeskyFactor]:
        """GGᵀ and the factor of A; in float64 where rounding in float32 is more than a hundredth
        of what some row has of its own, which is all that tells it from the others.

        Raises:
            UnsoundError: λ is too small for either.
        """
        if self.precise is None and True not in self._grams:
            with suppress(NotPositiveError):
                gram, factor = self._attempt(exact=False)
                own = float((factor.lower.diagonal() / factor.scales).square().min())
                if gram.rounding <= ENOUGH * own:
                    return gram, factor
        try:
            return self._attempt(exact=self.precise is not False)
        except NotPositiveError as error:
            raise too_little(self.damping, error.missing / self.window.count) from error

    def _attempt(self, exact: bool) -> tuple[Gram, CholeskyFactor]:
        if exact not in self._grams:
            columns, on_step = self.columns, self._on_step
            self._grams[exact] = Gram(self.window, columns, exact=exact, on_step=on_step)
        gram = self._grams[exact]
        A = gram.matrix.clone()
        A.diagonal().add_(gram.count * self.damping)
        return gram, factorised(A)
