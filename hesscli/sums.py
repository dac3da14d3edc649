"""Sums: the weighted one over batches, and how far rounding can push any of them.

A sum of n products is off by at most n u of the sum of their sizes, in whatever order a processor
adds them up. Roundings that are like independent random numbers stay within λ √n u, but for
2 exp(−λ²/2) of the time (Higham & Mary 2019, "A new approach to probabilistic rounding error
analysis").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hesscli import world


class Weighted(Protocol):
    """A batch, or what stands for one."""

    @property
    def weight(self) -> float:
        """The batch's share of the whole weight mass."""


T = TypeVar("T", bound=Weighted)


def weighted_sum(
    batches: Iterable[T], into: Tensor, parts: Callable[[T], Iterable[Tensor]]
) -> Tensor:
    """Add each batch's rows, times its weight, to a total: in the total's type, best float64.

    Args:
        batches: one at a time.
        into: the total ``(k, …)``, which is changed.
        parts: a batch's k rows, a block of them after the other.

    Returns:
        The total.
    """
    for batch in batches:
        row = 0
        for part in parts(batch):
            add_rows(into[row : row + len(part)], part.detach(), batch.weight)
            row += len(part)
    return into


def add_rows(into: Tensor, part: Tensor, weight: float) -> None:
    """Add weighted rows of whatever type, which are not copied into the total's as a whole."""
    if part.dtype == into.dtype:
        into.add_(part, alpha=weight)
        return
    size = max(1, _PIECE * part.shape[-1] // max(1, part.numel()))
    pieces = torch.split(into, size, -1), torch.split(part, size, -1)
    for total, piece in zip(*pieces, strict=True):
        total.add_(piece, alpha=weight)


def shared_sum(
    batches: Iterable[T], into: Tensor, parts: Callable[[T], Iterable[Tensor]]
) -> Tensor:
    """The same where each rank has batches of its own: what they come to in all, on every rank.

    Args:
        batches: this rank's share.
        into: the total to begin with, the same on every rank.
        parts: as for :func:`weighted_sum`.
    """
    if not world.is_first():
        into.zero_()
    with world.apart():
        weighted_sum(batches, into, parts)
    return world.added_up(into)


# -- Long vectors, a piece at a time: what a piece takes in float64 is soon had again --------------

_PIECE = 1 << 18


def inner(one: Tensor, other: Tensor) -> float:
    """⟨one, other⟩ of two vectors, in float64."""
    return float(torch.stack([torch.dot(a, b) for a, b in _in_float64(one, other)]).sum())


def distance(one: Tensor, other: Tensor) -> float:
    """The length of the difference of two vectors, in float64."""
    lengths = [torch.linalg.vector_norm(a - b) for a, b in _in_float64(one, other)]
    return float(torch.stack(lengths).norm())


def off_mean(vector: Tensor, parts: Iterable[tuple[float, Tensor]]) -> float:
    """How far a vector is from the mean of others by their weights, beside the longest of all.

    One of them is held at a time. Infinite where all are zero, for that tells nothing.
    """
    total, mass, size = torch.zeros_like(vector, dtype=torch.float64), 0.0, float(vector.norm())
    for weight, part in parts:
        total.add_(part, alpha=weight)
        mass, size = mass + weight, max(size, float(part.norm()))
    return distance(total.div_(mass), vector) / size if size else math.inf


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are, in one pass that keeps nothing."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _in_float64(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    pieces = (torch.split(vector.detach(), _PIECE) for vector in (one, other))
    return ((a.double(), b.double()) for a, b in zip(*pieces, strict=True))


_SURE = 8.0
"""λ: 3e-14 of the time. Squares of float32 numbers in float64 are not that random, and were seen
at 0.013 n u: a tenth of the bound where n is some thousands."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error u of one rounding."""
    return torch.finfo(dtype).eps / 2


def rounding_of_sum(terms: int, dtype: torch.dtype) -> float:
    """Bound of a sum's error, beside the sum of the sizes of its terms."""
    return min(terms, _SURE * math.sqrt(terms)) * unit_roundoff(dtype)
