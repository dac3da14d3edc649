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
class Kind:
    """What is done to a layer's weights, as reports have it."""

    kind: Literal["prune", "round"]
    level: float
    granularity: Granularity


@dataclass(frozen=True)
class Change(Kind):
    """It done to a layer: ``delta`` is float64, flat over its parameters in their order."""

    delta: Tensor


def kinds_of(parameters: Sequence[Parameter]) -> list[Kind]:
    """What is done to a layer, in the order of :func:`changes_of`."""
    pruned = [Kind("prune", share, "weight") for share in PRUNED]
    grids = grids_of(parameters)
    return pruned + [Kind("round", float(bits), grid) for bits in BITS for grid in grids]


def changes_of(parameters: Sequence[Parameter], saliency: Tensor) -> Iterator[Change]:
    """The changes whose effect on the loss is predicted: pruning, then rounding at falling bits.

    As is usual, vectors and scalars (biases, the scales of norms) are left as they are. Only
    where a layer has nothing else are they changed; then none is rounded by channel, since a
    grid for each single weight holds it exactly.

    Args:
        parameters: of one layer.
        saliency: flat, over all of them.
    """
    chosen = [p.tensor.dim() >= 2 or "channel" not in grids_of(parameters) for p in parameters]
    weights = [p.tensor.detach().to(torch.float64) for p in parameters]
    for each in kinds_of(parameters):
        if each.granularity == "weight":
            delta = _pruned(weights, saliency, chosen, each.level)
        else:
            delta = _rounded(weights, chosen, int(each.level), each.granularity)
        yield Change(each.kind, each.level, each.granularity, delta)


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
    count = round(share * len(weights))
    if not count:
        return torch.zeros_like(weights)
    last = saliency.kthvalue(count).values  # in a tenth of the time of putting all in order
    delta = torch.where(saliency < last, -weights, 0.0)
    alike = (saliency == last).nonzero()[:, 0]
    taken = alike[: count - int((saliency < last).sum())]
    delta[taken] = -weights[taken]
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
    levels = (rows / largest.where(largest > 0, 1.0)).mul_(steps).round_()
    rounded = levels.div_(steps).mul_(largest)  # so ordered, the outermost level is exact
    return rounded.sub_(rows).view_as(weights)


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
