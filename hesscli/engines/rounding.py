"""How far rounding can push a sum, from the number of its terms.

A sum of n products is off by at most n u of the sum of their sizes, in whatever order a processor
adds them up. Roundings that are like independent random numbers stay within λ √n u, but for
2 exp(−λ²/2) of the time (Higham & Mary 2019, "A new approach to probabilistic rounding error
analysis").
"""

from __future__ import annotations

import math

import torch

_SURE = 8.0
"""λ: 3e-14 of the time. Squares of float32 numbers in float64 are not that random, and were seen
at 0.013 n u: a tenth of the bound where n is some thousands."""


def unit(dtype: torch.dtype) -> float:
    """Largest relative error u of one rounding."""
    return torch.finfo(dtype).eps / 2


def of_sum(terms: int, dtype: torch.dtype) -> float:
    """Bound of a sum's error, beside the sum of the sizes of its terms."""
    return min(terms, _SURE * math.sqrt(terms)) * unit(dtype)
