"""Numbers that depend on all eigenvalues, read off a measure of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hesscli.engines.quadrature import Array, Measure

Function = Callable[[Array, Array], float | None]
"""Of eigenvalues and how many there are of each; None where it has no meaning."""


def trace(values: Array, counts: Array) -> float | None:
    """Σλ."""
    return float(counts @ values)


def squared_norm(values: Array, counts: Array) -> float | None:
    """Σλ², the squared Frobenius norm."""
    return float(counts @ values**2)


def negative_mass(values: Array, counts: Array) -> float | None:
    """Σ_{λ<0} |λ| / Σ|λ|."""
    shares = _shares(values, counts)
    return None if shares is None else float(shares[values < 0].sum())


def stable_rank(values: Array, counts: Array) -> float | None:
    """Σλ² / max λ²."""
    largest = float(np.abs(values).max(initial=0.0))
    return float(counts @ (values / largest) ** 2) if largest else None


def effective_rank(values: Array, counts: Array) -> float | None:
    """The exponential of the entropy of |λ| / Σ|λ| (Roy & Vetterli 2007, EUSIPCO, section 2)."""
    shares = _shares(values, counts)
    if shares is None:
        return None
    taken = shares > 0
    return float(np.exp(-shares[taken] @ np.log(shares[taken] / counts[taken])))


FUNCTIONS: dict[str, Function] = {
    function.__name__: function
    for function in (trace, squared_norm, negative_mass, stable_rank, effective_rank)
}


def evaluate(function: Function, measure: Measure, dimension: int) -> float | None:
    """A function of a matrix of so many rows."""
    return function(measure.values, dimension * measure.weights)


def _shares(values: Array, counts: Array) -> Array | None:
    """Each value's share of Σ|λ|, with huge and tiny ones brought near 1 first."""
    largest = float(np.abs(values).max(initial=0.0))
    if not largest:
        return None
    sizes = counts * np.abs(values / largest)
    return np.asarray(sizes / sizes.sum())
