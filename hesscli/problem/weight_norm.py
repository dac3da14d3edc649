"""torch's weight norm as the quotient that it stands for.

Its fused kernel takes norms for constants where it is differentiated twice. On a CUDA device it
also takes the root of a float64 sum in float32: a difference over a step of 1e-5 of what comes of
that is off by half a percent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.problem.replacing import replacing


def weight_norm(direction: Tensor, length: Tensor, dim: int = 0) -> Tensor:
    """Directions over their norms, which are taken over all dimensions but one, times lengths."""
    return direction * (length / torch.norm_except_dim(direction, 2, dim))


def exact_norms() -> replacing:
    """Meanwhile, weight norms are those of :func:`weight_norm`."""
    return replacing({torch._weight_norm: weight_norm})
