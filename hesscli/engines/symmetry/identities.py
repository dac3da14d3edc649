"""Three tests of a family: two identities of derivatives, and a finite transformation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.engines.symmetry.families import Family

NEAR = 0.5
"""How far a finite transformation goes: factors are about e to this, and its inverse."""
_SMALL = 1e-3
"""A loss below this times its gradient's length is measured by that: its rounding is of numbers
that cancel."""


ROUNDING = 100 * torch.finfo(torch.float64).eps
"""Sums of many terms err by a few to a hundred units: what an eps breaks by less does not show."""


@dataclass(frozen=True)
class Place:
    """A batch at some parameters, by what can be asked of it.

    Attributes:
        theta: the parameters, float64 ``(d,)``.
        loss: of a flat vector of others.
        value: the loss here.
        gradient: of the loss, float64 ``(d,)``.
        product: with its Hessian; None where none are made.
        spread: the length of the product with a random unit vector.
        turns: whether it is the Hessian's, which turns with the gradient; other matrices do not.
    """

    theta: Tensor
    loss: Callable[[Tensor], float]
    value: float
    gradient: Tensor
    product: Callable[[Tensor], Tensor] | None = None
    spread: float = 0.0
    turns: bool = True

    @property
    def sizes(self) -> Residuals:
        """What residuals are relative to."""
        length = float(self.gradient.norm())
        return Residuals(
            gradient=length,
            hessian=None if self.product is None else self.spread,
            finite=max(abs(self.value), _SMALL * length),
        )


@dataclass(frozen=True)
class Residuals:
    """By how much a family breaks, relative to what would be usual; None where not measured.

    Attributes:
        gradient: |⟨g, Xθ⟩| / (|g| |Xθ|), the largest of all generators.
        hessian: |H Xθ + Xᵀg| / (|Hv| |Xθ|) of a random one, v a random unit vector.
        finite: the loss's change over its size, by a transformation near and by one far away.
    """

    gradient: float
    hessian: float | None
    finite: float


def residuals_of(family: Family, place: Place, generator: torch.Generator) -> Residuals:
    """All three of a family at one place.

    Args:
        family: what is tested.
        place: a batch, and parameters.
        generator: of random elements.
    """
    theta, gradient = place.theta, place.gradient
    return Residuals(
        gradient=_ratio(largest_moment(family, theta, gradient), float(gradient.norm())),
        hessian=None if place.product is None else _hessian(family, place, generator),
        finite=_finite(family, place, generator),
    )


def largest_moment(family: Family, theta: Tensor, gradient: Tensor) -> float:
    """|⟨g, Xθ⟩| / |Xθ|, the largest of all generators."""
    moments, lengths = family.moments(theta, gradient).abs(), family.lengths(theta)
    relative = moments[lengths > 0] / lengths[lengths > 0]
    return float(relative.max()) if len(relative) else 0.0


def _hessian(family: Family, place: Place, generator: torch.Generator) -> float:
    assert place.product is not None
    drawn = family.draw(generator, 1.0)
    tangent = family.tangent(drawn, place.theta)
    turned = family.transposed(drawn, place.theta, place.gradient) * float(place.turns)
    missing = float((place.product(tangent) + turned).norm())
    return _ratio(missing, place.spread * float(tangent.norm()) + float(turned.norm()))


def _finite(family: Family, place: Place, generator: torch.Generator) -> float:
    def change(coefficients: Tensor) -> float:
        found = abs(place.loss(family.moved(coefficients, place.theta)) - place.value)
        return _ratio(found if math.isfinite(found) else math.inf, place.sizes.finite)

    near = change(family.draw(generator, NEAR))
    if family.told.eps and near > ROUNDING:  # nobody expects it to be small far away
        return near
    return max(near, change(family.far(generator)))


def _ratio(value: float, usual: float) -> float:
    """0 where nothing is usual and nothing was found."""
    return value / usual if usual else float(value > 0)


def worst_of(found: Sequence[Residuals], sizes: Sequence[Residuals]) -> Residuals:
    """The largest of each over some places, each relative to what is usual at the largest of them.

    Where a model is sure of every example, loss and gradient are next to nothing, and what is left
    of an identity is rounding of much larger numbers.

    Args:
        found: a family's residuals, place by place.
        sizes: what they were relative to.
    """
    return Residuals(
        gradient=_weighted([one.gradient for one in found], [one.gradient for one in sizes]) or 0.0,
        hessian=_weighted([one.hessian for one in found], [one.hessian for one in sizes]),
        finite=_weighted([one.finite for one in found], [one.finite for one in sizes]) or 0.0,
    )


def _weighted(found: Sequence[float | None], sizes: Sequence[float | None]) -> float | None:
    known = [(x, size) for x, size in zip(found, sizes, strict=True) if None not in (x, size)]
    if not known:
        return None
    if not all(math.isfinite(x or 0.0) for x, _ in known):
        return math.inf
    most = max(size or 0.0 for _, size in known) or 1.0
    return max((x or 0.0) * (size or 0.0) / most for x, size in known)
