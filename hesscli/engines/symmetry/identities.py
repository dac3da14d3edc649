"""Tests of a family: two identities of derivatives, and what a finite transformation changes.

The Gauss-Newton matrix G = JᵀAJ has those of its directions for which AJξ is 0. That is the
derivative of the loss's slope in the outputs along ξ: where a random element of the group leaves
the slopes of all examples as they are, so do all elements (slopes are analytic in them), and Gξ is
0. A loss that normalises its outputs has symmetries that turn these slopes: what it undoes is not
in the null space of G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hesscli.engines.symmetry.families import Family

NEAR = 0.5
"""How far a finite transformation goes: factors are about e to this, and its inverse."""
_SMALL = 1e-3
"""A loss below this times its gradient's length is measured by that: its rounding is of numbers
that cancel."""


UNITS = 100
"""Sums of many terms err by a few to a hundred units of rounding."""
ROUNDING = UNITS * torch.finfo(torch.float64).eps
"""What an eps breaks by less does not show."""


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
        reading: of a flat vector of parameters, the outputs and the loss's slope in them; None
            where that is not asked, or the loss is none of outputs.
        least: what gradient and spread count as at least: of larger numbers that cancel in them,
            the share whose rounding a bound takes for a break.
    """

    theta: Tensor
    loss: Callable[[Tensor], float]
    value: float
    gradient: Tensor
    product: Callable[[Tensor], Tensor] | None = None
    spread: float = 0.0
    turns: bool = True
    reading: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    least: tuple[float, float] = 0.0, 0.0

    @cached_property
    def read(self) -> tuple[Tensor, Tensor] | None:
        """Outputs and slope here."""
        return None if self.reading is None else self.reading(self.theta)

    @property
    def sizes(self) -> Residuals:
        """What residuals are relative to."""
        length = float(self.gradient.norm())
        return Residuals(
            gradient=max(length, self.least[0]),
            hessian=None if self.product is None else max(self.spread, self.least[1]),
            finite=max(abs(self.value), _SMALL * length),
            gauss_newton=None if self.reading is None else 1.0,
        )


@dataclass(frozen=True)
class Residuals:
    """By how much a family breaks, relative to what would be usual; None where not measured.

    Attributes:
        gradient: |⟨g, Xθ⟩| / (|g| |Xθ|), the largest of all generators.
        hessian: |H Xθ + Xᵀg| / (|Hv| |Xθ|) of a random one, v a random unit vector.
        finite: the loss's change over its size, by a transformation near and by one far away.
        gauss_newton: the outputs' change over their size by that near, or that of the loss's slope
            in them, whichever is less.
    """

    gradient: float
    hessian: float | None
    finite: float
    gauss_newton: float | None = None


def residuals_of(family: Family, place: Place, generator: torch.Generator) -> Residuals:
    """All of a family at one place.

    Args:
        family: what is tested.
        place: a batch, and parameters.
        generator: of random elements.
    """
    theta, gradient = place.theta, place.gradient
    hessian = None if place.product is None else _hessian(family, place, generator)
    near = family.moved(family.draw(generator, NEAR), theta)
    return Residuals(
        gradient=_ratio(largest_moment(family, theta, gradient), place.sizes.gradient),
        hessian=hessian,
        finite=_finite(family, place, near, generator),
        gauss_newton=_gauss_newton(place, near),
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
    usual = (place.sizes.hessian or 0.0) * float(tangent.norm())
    return _ratio(missing, usual + float(turned.norm()))


def _finite(family: Family, place: Place, near: Tensor, generator: torch.Generator) -> float:
    def change(there: Tensor) -> float:
        found = abs(place.loss(there) - place.value)
        return _ratio(found if math.isfinite(found) else math.inf, place.sizes.finite)

    changed = change(near)
    if family.told.eps and changed > ROUNDING:  # nobody expects it to be small far away
        return changed
    return max(changed, change(family.moved(family.far(generator), place.theta)))


def _gauss_newton(place: Place, near: Tensor) -> float | None:
    if place.reading is None or place.read is None:
        return None
    pairs = zip(place.read, place.reading(near), strict=True)
    changes = (_ratio(float((there - here).norm()), float(here.norm())) for here, there in pairs)
    return min(change if math.isfinite(change) else math.inf for change in changes)


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
        gauss_newton=_weighted(
            [one.gauss_newton for one in found], [one.gauss_newton for one in sizes]
        ),
    )


def _weighted(found: Sequence[float | None], sizes: Sequence[float | None]) -> float | None:
    known = [(x, size) for x, size in zip(found, sizes, strict=True) if None not in (x, size)]
    if not known:
        return None
    if not all(math.isfinite(x or 0.0) for x, _ in known):
        return math.inf
    most = max(size or 0.0 for _, size in known) or 1.0
    return max((x or 0.0) * (size or 0.0) / most for x, size in known)
