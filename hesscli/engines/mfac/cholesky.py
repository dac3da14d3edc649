"""Cholesky factors, and how far rounding can push what is solved with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hesscli.errors import UnsoundError
from hesscli.sums import rounding_of_sum, unit_roundoff

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
