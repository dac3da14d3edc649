"""What comes out of a solve, and what may go in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.engines.mfac.window import GradientWindow
from hesscli.errors import UnsoundError, UsageError


@dataclass(frozen=True)
class Solution:
    """What was solved for, and how far off rounding may have put it.

    Attributes:
        vector: y, float64 ``(d,)``.
        error: bound of ‖ŷ − y‖ / ‖y‖, as far as it is due to rounding; infinite where no digit
            is sure.
    """

    vector: Tensor
    error: float

    @classmethod
    def of(cls, vector: Tensor, error: Tensor) -> Solution:
        """From ŷ and a bound of ‖ŷ − y‖, a scalar; ‖y‖ is no less than ‖ŷ‖ without it."""
        size, off = torch.stack([torch.linalg.vector_norm(vector), error]).tolist()
        if off == 0:
            return cls(vector, 0.0)
        return cls(vector, off / (size - off) if off < size else math.inf)


def checked_damping(damping: float) -> float:
    """λ, which must be above 0.

    Raises:
        UsageError: it is not, or it is not finite.
    """
    if not 0 < damping < math.inf:
        raise UsageError(
            "--damping must be above 0 and finite", f"{damping}", "--damping 1e-3 or abs:1e-5"
        )
    return float(damping)


def checked_rows(rows: Tensor, length: int, window: GradientWindow) -> Tensor:
    """Vectors ``(k, length)`` in float64, where the window is.

    Raises:
        UsageError: they have another length.
        UnsoundError: one is not finite.
    """
    if rows.ndim != 2 or rows.shape[1] != length:
        raise UsageError(
            "a vector has the wrong length",
            f"shape {tuple(rows.shape[1:])}",
            f"a vector of {length} numbers",
        )
    if not bool(torch.isfinite(rows).all()):
        raise UnsoundError(
            "a vector to solve for is not finite",
            "NaN or infinity",
            "--dtype float64, or a checkpoint from before the run diverged",
        )
    return rows.detach().to(window.device, torch.float64)


def only(slot: int, window: GradientWindow) -> Tensor:
    """Amounts ``(n,)`` of the rows, of which there is one.

    Raises:
        UsageError: there is no such row.
    """
    if not 0 <= slot < window.count:
        raise UsageError(
            "no such row in the window", f"{slot}", f"a slot from 0 to {window.count - 1}"
        )
    amounts = torch.zeros(window.count, dtype=torch.float64, device=window.device)
    amounts[slot] = 1
    return amounts
