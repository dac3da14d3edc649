"""(F̂ + λI) y = x by way of A = nλI + GGᵀ, which is as small as the window has rows."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.engines.mfac.cholesky import CholeskyFactor
from hesscli.engines.mfac.gram import Gram
from hesscli.sums import rounding_of_sum, unit_roundoff

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
