"""What different dampings make of a window: how much is data, and how much is λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from hesscli.diagnostics.clock import Clock
from hesscli.diagnostics.collecting import Collected
from hesscli.diagnostics.ranking import saliencies
from hesscli.diagnostics.ranks import rank_correlation
from hesscli.diagnostics.solving import relative_residual
from hesscli.engines.mfac import Gram
from hesscli.operators.base import Operator
from hesscli.results import DampingPoint

RELATIVE = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_MOST_DIRECTIONS = 1 << 28
"""Numbers in the solutions that are held at once."""


@dataclass(frozen=True)
class _Solution:
    point: DampingPoint
    direction: Tensor


def sweep(
    operator: Operator, collected: Collected, weights: Tensor, right: Tensor, clock: Clock
) -> tuple[DampingPoint, ...]:
    """One point for each damping, the largest first; none where the gradients are all zero.

    Args:
        operator: the matrix that the user cares about: one product a damping.
        collected: the window.
        weights: ``(d,)``, for their saliencies.
        right: x ``(d,)``.
        clock: whom to tell.
    """
    if not collected.damping_unit or len(RELATIVE) * len(weights) > _MOST_DIRECTIONS:
        return ()
    own = saliencies(weights, collected.fisher.diagonal())
    found: list[_Solution] = []
    for relative in RELATIVE:
        clock.tell("inverting", done=float(len(found)), total=float(len(RELATIVE)))
        found.append(_at(relative, collected, weights, right.double(), own))
    directions = torch.stack([one.direction for one in found])
    images = operator.apply(directions)
    cosines = [*(_cosine(a, b) for a, b in pairwise(directions)), None]
    shares = _span_shares(collected, directions)
    return tuple(
        replace(
            one.point,
            span_share=share,
            cosine=cosine,
            operator_residual=relative_residual(
                image + one.point.absolute * one.direction, right.double()
            ),
        )
        for one, image, cosine, share in zip(found, images, cosines, shares, strict=True)
    )


def _at(
    relative: float, collected: Collected, weights: Tensor, right: Tensor, own: Tensor
) -> _Solution:
    damping = relative * collected.damping_unit
    fisher = collected.fisher.with_damping(damping)
    diagonal = fisher.diagonal()
    point = DampingPoint(
        relative=relative,
        absolute=damping,
        span_share=None,
        cosine=None,
        leverage=float((1 - damping * diagonal).median()),
        rank_correlation=rank_correlation(saliencies(weights, diagonal), own),
        operator_residual=None,
    )
    return _Solution(point, fisher.ihvp(right).vector.double())


def _span_shares(collected: Collected, directions: Tensor) -> Sequence[float | None]:
    """‖P y‖ / ‖y‖ with P the projection to the span of the window's rows."""
    window = collected.window
    values, vectors = torch.linalg.eigh(Gram(window).matrix)
    kept = values > len(values) * torch.finfo(torch.float32).eps * values[-1]
    inside = (
        window.project(directions, slice(0, window.size), torch.float64)
        @ vectors[:, kept]
        / values[kept].sqrt()
    )
    sizes = torch.linalg.vector_norm(directions, dim=1)
    shares = torch.linalg.vector_norm(inside, dim=1) / sizes
    return [
        min(share, 1.0) if size else None
        for share, size in zip(shares.tolist(), sizes.tolist(), strict=True)
    ]


def _cosine(one: Tensor, other: Tensor) -> float | None:
    sizes = torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other)
    return float(one @ other / sizes) if sizes else None
