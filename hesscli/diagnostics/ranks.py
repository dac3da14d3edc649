"""Spearman's rank correlation of large vectors, and the median."""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's, ties at their mean rank; None where either is constant."""
    ranks = [torch.from_numpy(rankdata(v.cpu().numpy())) for v in (one, other)]
    centred = [r - r.mean() for r in ranks]
    sizes = [float(torch.linalg.vector_norm(c)) for c in centred]
    if not all(sizes):
        return None
    return float(centred[0] @ centred[1]) / (sizes[0] * sizes[1])
