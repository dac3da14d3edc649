"""(F̂ + λI) y = x by small matrices, whole or by blocks, each with bounds of its rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from hesscli.engines.mfac.gram import PANEL, Gram, panels
from hesscli.engines.mfac.window import TILE, GradientWindow
from hesscli.errors import UnsoundError
from hesscli.meter import OnStep, go_on
from hesscli.sums import rounding_of_sum, unit_roundoff

# -- Cholesky factors, and how far rounding can push what is solved with them ----------------------


_PROBES = 8


@dataclass(frozen=True)
class CholeskyFactor:
    """A = LLᵀ, for one symmetric positive matrix or a batch of them.

    Rounding in A and in its factor has the size u √(A_ii A_jj) in entry (i, j) (Demmel 1989, "On
    floating point errors in Cholesky"), whatever the condition: it is measured in D = √diag A.
    Of the factor and two triangular solves it is as of sums of 3k + 1 terms (Higham 2002,
    "Accuracy and stability of numerical algorithms", theorem 10.4).

    Attributes:
        lower: L ``(..., k, k)``, of A in the order ``order``.
        scales: D ``(..., k)`` of A itself.
        order: which row of A comes where in L; None is as it stands.
    """

    lower: Tensor
    scales: Tensor
    order: Tensor | None = None

    @property
    def rounding(self) -> float:
        """Bound of what solving adds to the error in A, beside D_i D_j."""
        return rounding_of_sum(3 * self.scales.shape[-1] + 1, self.lower.dtype)

    def solve(self, right: Tensor) -> Tensor:
        """A⁻¹ B for columns B ``(..., k, j)``."""
        if self.order is None:
            return torch.cholesky_solve(right, self.lower)
        found = torch.empty_like(right)
        found[self.order] = torch.cholesky_solve(right[self.order], self.lower)
        return found

    def solved_errors(self) -> Tensor:
        """A⁻¹ D Z ``(..., k, p)`` for signs Z: what errors of one unit, to A's scale, become."""
        signs = _signs(self.scales.shape[-1], self.scales.dtype, self.scales.device)
        return self.solve(self.scales[..., None] * signs)


@lru_cache(maxsize=16)
def _signs(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random signs ``(count, p)``, and all alike, as errors are where rows are; not to be changed.

    Kept for a window that is inverted after every step.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    shape = count, _PROBES
    signs = torch.randint(2, shape, generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
    signs[:, 0] = 1
    return signs.to(device, dtype)


def inverse_lower(lower: Tensor) -> Tensor:
    """L⁻¹, of one or a batch: products with it are several times as fast as solving with L."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse


def factorised(matrix: Tensor) -> CholeskyFactor:
    """The factor of one matrix or a batch.

    Raises:
        NotPositiveError: rounding has made one of them indefinite.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    scales = matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    if bool((info != 0).any()):
        raise NotPositiveError(matrix.reshape(-1, *matrix.shape[-2:])[info.flatten() != 0][0])
    return CholeskyFactor(lower, scales)


class NotPositiveError(ArithmeticError):
    """A matrix that has no factor; ``missing`` is what its diagonal lacks."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__("the matrix is not positive definite")
        values = torch.linalg.eigvalsh(matrix) if bool(matrix.isfinite().all()) else matrix[:1, 0]
        rounding = len(matrix) * 2 * unit_roundoff(torch.float64) * float(values[-1])
        self.missing = 2 * (rounding - float(values[0]))


def too_little(damping: float, missing: float) -> UnsoundError:
    """What to say of a damping that rounding swallows; ``missing`` is what it lacks."""
    return UnsoundError(
        "the damping is lost in rounding: the damped Fisher matrix cannot be inverted",
        f"--damping abs:{damping:.3g}",
        f"--damping abs:{damping + missing:.2g} or more",
    )


# -- (F̂ + λI) y = x by way of A = nλI + GGᵀ, which is as small as the window has rows -------------


Solved = tuple[Tensor, Tensor]
"""Y ``(k, size)`` in float64, and bounds ``(k,)`` of the lengths of its rows' errors."""

ENOUGH = 1e-2
"""Bound of a relative error that is left as it is; what was seen is a tenth of the bound."""
_TINY = torch.finfo(torch.float64).tiny


def is_enough(lengths: Tensor, errors: Tensor, enough: float = ENOUGH) -> bool:
    """Whether every vector of some lengths has its digits."""
    return bool((errors <= enough * lengths).all())


class System:
    """Solves with the factor of A.

    Any x takes two passes over the window: y = (x − Gᵀ A⁻¹ G x) / λ. A combination x = Gᵀa of
    rows takes one, y = n Gᵀ A⁻¹ a, in which nothing cancels and nothing is divided by λ.

    Errors are bounded from what rounding does: an error of u ‖g_i‖‖x‖ in each entry of Gx, one
    of u D_i D_j in those of A with D² its diagonal, and u ‖Dc‖₁ in the sum Gᵀc, each u from the
    number of terms. The first two come through Gᵀ A⁻¹ D, whose size τ is measured with vectors
    of signs; what they do to y is then ‖x‖ τ + ‖Dc‖ τ + ‖Dc‖₁, over λ or times n. That is to
    first order; the rest is a geometric series in u ‖D A⁻¹ D‖, and where this is not below 1
    nothing is known.

    Args:
        gram: GGᵀ, of the window and columns to work on.
        factor: of A.
        damping: λ.
        dtype: of products with the window.
    """

    def __init__(
        self, gram: Gram, factor: CholeskyFactor, damping: float, dtype: torch.dtype
    ) -> None:
        self.gram, self.factor, self.damping, self.dtype = gram, factor, damping, dtype
        self._u_inner = gram.inner_rounding(dtype)
        self._u_sum = rounding_of_sum(gram.count + 1, dtype)
        errors = factor.solved_errors()
        squared = (errors * (gram.matrix @ errors)).sum(0).amax()
        self._spread = squared.clamp_min(0).sqrt()
        u_matrix = gram.rounding + factor.rounding
        share = u_matrix * torch.linalg.vector_norm(errors * factor.scales[:, None], dim=0).amax()
        self._u_matrix = u_matrix / (1 - share).clamp_min(0)

    def solve(self, rights: Tensor) -> Solved:
        """Y for rows X ``(k, size)`` and bounds ``(k,)`` of their errors."""
        sizes, projected = self._projected(rights)
        units = rights / sizes.clamp_min(_TINY)
        coefficients = self.factor.solve(projected.T).T
        inside = self._combined(coefficients)
        off = (
            self._u_inner * self._spread
            + self._off(coefficients)
            + 2 * unit_roundoff(torch.float64)
        )
        scale = sizes / self.damping
        return (units - inside) * scale, off * scale[:, 0]

    def _projected(self, rights: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths ``(k, 1)`` of rows X, and G x ``(k, n)`` of these at unit length.

        Of shards all come in one message.
        """
        window, columns = self.gram.window, self.gram.columns
        sizes = torch.linalg.vector_norm(rights, dim=1, keepdim=True)
        units = rights / sizes.clamp_min(_TINY)  # so that squares fit into float32
        projected = window.project(units, columns, self.dtype)
        if window.shards == 1:
            return sizes, projected
        sums = window.added_up(torch.cat([projected * sizes, sizes.square()], dim=1))
        sizes = sums[:, -1:].sqrt()
        return sizes, sums[:, :-1] / sizes.clamp_min(_TINY)

    def combination(self, amounts: Tensor) -> Solved:
        """Y for X = Gᵀa, of amounts ``(k, n)``, and bounds ``(k,)`` of their errors."""
        count = self.gram.count
        coefficients = self.factor.solve(amounts.T).T
        return count * self._combined(coefficients), count * self._off(coefficients)

    def _combined(self, coefficients: Tensor) -> Tensor:
        scale = coefficients.abs().amax(dim=1, keepdim=True).clamp_min(_TINY)
        sums = self.gram.window.combine(coefficients / scale, self.gram.columns, self.dtype)
        return sums.mul_(scale)

    def _off(self, coefficients: Tensor) -> Tensor:
        """Bounds ``(k,)`` of what errors in A and in the sums do to Gᵀc."""
        scaled = coefficients * self.factor.scales
        weights = torch.linalg.vector_norm(scaled, dim=1)
        off: Tensor = self._u_matrix * self._spread * weights
        return off + self._u_sum * scaled.abs().sum(1)


# -- A block with more columns than the window has rows, inverted by way of n×n matrices -----------


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


# -- Blocks with no more columns than the window has rows: their own matrices, inverted ------------


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
