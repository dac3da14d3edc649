"""Changes that people make to trained weights: pruning them, and rounding them to few bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hesscli.parameters import Parameter

Granularity = Literal["weight", "tensor", "channel"]
Grid = Literal["tensor", "channel"]

PRUNED = (0.1, 0.5, 0.9)
"""Shares of a layer's weights."""
BITS = (8, 6, 4, 3, 2)


@dataclass(frozen=True)
class Change:
    """A change of one layer's weights; the first three fields are those of a report.

    ``delta`` is float64, flat over the layer's parameters in their order.
    """

    kind: Literal["prune", "round"]
    level: float
    granularity: Granularity
    delta: Tensor


def changes_of(parameters: Sequence[Parameter], saliency: Tensor) -> list[Change]:
    """The changes whose effect on the loss is predicted: pruning, then rounding at falling bits.

    As is usual, vectors and scalars (biases, the scales of norms) are left as they are. Only
    where a layer has nothing else are they changed; then none is rounded by channel, since a
    grid for each single weight holds it exactly.

    Args:
        parameters: of one layer.
        saliency: flat, over all of them.
    """
    grids = grids_of(parameters)
    chosen = [p.tensor.dim() >= 2 or "channel" not in grids for p in parameters]
    weights = [p.tensor.detach().to(torch.float64) for p in parameters]
    pruned = [
        Change("prune", share, "weight", _pruned(weights, saliency, chosen, share))
        for share in PRUNED
    ]
    rounded = [
        Change("round", float(bits), grid, _rounded(weights, chosen, bits, grid))
        for bits in BITS
        for grid in grids
    ]
    return pruned + rounded


def grids_of(parameters: Sequence[Parameter]) -> tuple[Grid, ...]:
    """On which a layer is rounded: by channel where it has matrices or kernels."""
    matrices = any(p.tensor.dim() >= 2 for p in parameters)
    return ("tensor", "channel") if matrices else ("tensor",)


def prune(weights: Tensor, saliency: Tensor, share: float) -> Tensor:
    """δ that sets the least salient weights to zero: ``round(share · n)`` of them.

    Args:
        weights: flat ``(n,)``.
        saliency: ``(n,)``; among equal ones the first in the tensor go first.
        share: from 0 to 1.
    """
    least = torch.argsort(saliency, stable=True)[: round(share * len(weights))]
    delta = torch.zeros_like(weights)
    delta[least] = -weights[least]
    return delta


def round_to(weights: Tensor, bits: int, granularity: Grid) -> Tensor:
    """δ that rounds weights to an even grid of 2^bits − 1 levels, symmetric about an exact zero.

    The largest |weight| is the outermost level, 2^(bits−1) − 1 steps from zero: the restricted
    range of symmetric quantisation (Krishnamoorthi 2018, arXiv 1806.08342, section 2.2). Halfway
    between two levels the even one is taken.

    Args:
        weights: of any shape.
        bits: 2 (three levels) or more.
        granularity: one grid for all, or one for each index of dimension 0, which is the output
            channel in all but transposed convolutions.

    Returns:
        The change in float64; with it added, rounding again changes nothing.
    """
    weights = weights.detach().to(torch.float64)
    steps = 2 ** (bits - 1) - 1
    rows = weights.reshape(1 if granularity == "tensor" else len(weights), -1)
    largest = rows.abs().amax(dim=1, keepdim=True)
    levels = (rows / largest.where(largest > 0, 1.0) * steps).round()
    rounded: Tensor = levels / steps * largest  # so ordered, the outermost level is exact
    return (rounded - rows).view_as(weights)


@contextmanager
def applied(parameters: Sequence[Parameter], delta: Tensor, scale: float) -> Iterator[None]:
    """The network with ``scale`` · δ added meanwhile; after that, its very own bytes again.

    Args:
        parameters: whose tensors are changed in place.
        delta: flat over them.
        scale: 1 for all of δ.
    """
    tensors = [p.tensor for p in parameters]
    originals = [t.detach().clone() for t in tensors]
    parts = torch.split_with_sizes(delta, [t.numel() for t in tensors])
    changed = (
        w.to(torch.float64) + scale * part.to(w.device).view_as(w)
        for w, part in zip(originals, parts, strict=True)
    )
    try:
        try:
            _write(tensors, changed)
            yield
        finally:
            _write(tensors, originals)
    except BaseException:  # it may have been Ctrl-C, in the middle of putting them back
        _write(tensors, originals)
        raise


def _pruned(
    weights: Sequence[Tensor], saliency: Tensor, chosen: Sequence[bool], share: float
) -> Tensor:
    """The pruning of a layer, ranked over all the tensors that are chosen."""
    flat = _flat(weights)
    where = _flat(
        torch.full_like(w, c, dtype=torch.bool) for w, c in zip(weights, chosen, strict=True)
    )
    delta = torch.zeros_like(flat)
    delta[where] = prune(flat[where], saliency.to(flat)[where], share)
    return delta


def _rounded(weights: Sequence[Tensor], chosen: Sequence[bool], bits: int, grid: Grid) -> Tensor:
    """The rounding of a layer, each of the chosen tensors on grids of its own."""
    return _flat(
        round_to(w, bits, grid) if c else torch.zeros_like(w)
        for w, c in zip(weights, chosen, strict=True)
    )


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@torch.no_grad()
def _write(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
