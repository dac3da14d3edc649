"""Diagonals estimated by probing dense matrices, many seeds at a time, with known truth."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import binom

from hesscli.engines.diagonal import Diagonal

Array = np.ndarray
LEVEL = 1e-3


def matrix(diagonal: Array, kind: str, noise: float, rng: np.random.Generator) -> Array:
    """A symmetric matrix whose diagonal entries one probe sees with this noise, root mean square.

    ``flat``: all off the diagonal alike; ``spiked``: one eigenvector rules, as in a trained
    network, so that the noise is strongly correlated and as uneven as its entries.
    """
    size = len(diagonal)
    off = rng.standard_normal((size, size))
    off = off + off.T
    if kind == "spiked":
        spike = rng.standard_normal(size)
        off += 30 * np.outer(spike, spike)
    np.fill_diagonal(off, 0)
    off *= noise / np.sqrt(np.square(off).sum(1).mean())
    return off + np.diag(diagonal)


def estimates(
    a: Array, seeds: int, probes: int, replicates: int, rng: np.random.Generator
) -> Iterator[Diagonal]:
    """Means of v ⊙ Av over some probes, with residuals under random signs as replicates."""
    size, freedom = len(a), 1 / (1 / replicates + 1 / (probes - 1))
    for first in range(0, seeds, 250):
        count = min(250, seeds - first)
        v = 2.0 * rng.integers(0, 2, (count, probes, size)) - 1
        each = v * (v @ a)
        values = each.mean(1)
        signs = 2.0 * rng.integers(0, 2, (count, replicates, probes)) - 1
        noise = signs @ (each - values[:, None]) / np.sqrt(probes * (probes - 1))
        for value, error in zip(torch.from_numpy(values), torch.from_numpy(noise), strict=True):
            yield Diagonal(value, error.float(), freedom)


def at_least(coverage: float, checks: int, seeds: int) -> float:
    """The hit rate that a true coverage misses with probability 1e-3 over all checks."""
    return float(binom.ppf(LEVEL / checks, seeds, coverage) / seeds)


def at_most(coverage: float, checks: int, seeds: int) -> float:
    """The hit rate that a true coverage exceeds with probability 1e-3 over all checks."""
    return float(binom.ppf(1 - LEVEL / checks, seeds, coverage) / seeds)
