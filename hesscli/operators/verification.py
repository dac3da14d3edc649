"""Whether gradient and products are right, by tests that know nothing of how they were made.

Symmetry breaks where a mode differentiates another function than the loss; a central difference
along a unit direction also catches a matrix that is wrong but symmetric, and one of the loss
itself a gradient that autograd was kept from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.operators.base import Operator
from hesscli.operators.directions import MismatchError, layers_where, vectors, within_bound
from hesscli.operators.products import BUILDERS, STEP, central_difference, flatten, gradient
from hesscli.operators.terms import Terms
from hesscli.problem.precision import tolerance
from hesscli.problem.problem import Problem
from hesscli.problem.sampling import Sample
from hesscli.results import Check

_BOUND = 1e-4
"""Right modes differ by 1e-10 to 1e-6 with no kink within the step, wrong ones by percents."""
_EPS = torch.finfo(torch.float64).eps
_ROUNDED = 100
"""Rounding of a loss or a gradient, at most, in units of eps and of the size of its terms."""
_LONGER = 20
"""Steps of the loss to those of its gradient, which jumps at kinks where the loss bends."""


@dataclass(frozen=True)
class Products:
    """A v of a few Rademacher vectors v, rows ``(k, d)``."""

    vectors: Tensor
    values: Tensor

    @property
    def forms(self) -> Tensor:
        """vᵀAv, float64."""
        return (self.vectors * self.values).sum(1, dtype=torch.float64)


def products(operator: Operator, sample: Sample, count: int = 4) -> Products:
    """Of an operator on some examples.

    Raises:
        MismatchError: one is not finite.
    """
    block = vectors(operator.problem, count)
    return Products(block, product(operator, sample, block))


def product(operator: Operator, sample: Sample, block: Tensor) -> Tensor:
    """A v on some examples, without weight decay, for rows ``(k, d)``.

    Raises:
        MismatchError: it is not finite.
    """
    total = torch.zeros_like(block)
    with operator.problem.forward_context():
        for batch in sample.batches():
            total += batch.weight * operator.live(batch)(block)
    if not torch.isfinite(total).all():
        raise MismatchError("its products are not finite")
    return total


def check_gradient(sample: Sample) -> Check:
    """|gradient'v - difference of the loss| in float64, relative to what gradient'v can be.

    Args:
        sample: some examples of a problem in float64.

    Raises:
        MismatchError: they differ at every point and step; the layers are named.
    """
    problem = sample.problem
    tensors = problem.parameters.tensors

    def measure(part: Sample, direction: Tensor, step: float) -> tuple[float, float]:
        with problem.forward_context():
            value = part.evaluate()
            slope = flatten(gradient(value, tensors))
            along, step = float(slope @ direction), _LONGER * step
            truth = float(
                central_difference(lambda: part.evaluate().detach(), tensors, direction, step)
            )
        # Along ±1 signs, gradient'v is about |gradient| / √d, however small it comes out.
        typical = float(slope.norm()) / len(slope) ** 0.5
        scale = max(abs(along), abs(truth), typical, 1e-300)
        rounding = _rounding(problem, abs(float(value.detach())), step)
        return abs(along - truth) / scale, _BOUND + rounding / scale

    value, bound = within_bound(sample, measure, "it differs from differences of the loss")
    detail = "|g'v - difference of the loss| / |g'v| in float64"
    return Check(name="gradient", state="passed", detail=detail, value=value, bound=bound)


def check_symmetry(
    operator: Operator, sample: Sample, found: Products, precision: torch.dtype
) -> Check:
    """|vᵀAw − wᵀAv| / ‖Aw‖ for Rademacher v and w, which does not depend on d.

    Args:
        operator: what made the products.
        sample: the examples.
        found: the products with v and w first.
        precision: the type that the model computes in.

    Raises:
        MismatchError: it is above rounding; the layers are named.
    """
    (v, w), (product_v, product_w) = found.vectors[:2], found.values[:2]
    scale = float(torch.maximum(product_v.norm(), product_w.norm()).clamp_min(1e-300))
    bound = tolerance(precision) + _EPS * float(v.norm()) / scale
    if operator.mode == "finite-difference":
        rounding = _gradient_rounding(operator.problem, sample, STEP) * float(v.norm())
        bound = 1e-6 + rounding / scale

    def asymmetry(v: Tensor, product: Tensor) -> float:
        return float((v @ product_w - w @ product).abs()) / scale

    value = asymmetry(v, product_v)
    if not value <= bound:  # what cancels is rounded as it was before, which takes a product to see
        bound += Terms(operator, sample).rounding_of(w, precision) / scale
    if not value <= bound:
        layers = layers_where(
            operator.parameters,
            lambda part: asymmetry(part * v, _one(operator, sample, part * v)) > bound,
        )
        raise MismatchError(f"products are not symmetric: {value:.1e} above {bound:.0e}{layers}")
    return Check(
        name="symmetry", state="passed", detail="|v'Hw - w'Hv| / |Hw|", value=value, bound=bound
    )


def check_difference(operator: Operator, sample: Sample) -> Check:
    """‖Av − difference‖ / ‖Av‖ along a unit direction, in float64.

    Raises:
        MismatchError: they differ at every point and step; the layers are named.
    """

    def measure(part: Sample, direction: Tensor, step: float) -> tuple[float, float]:
        found = _one(operator, part, direction)
        truth = _by_differences(operator, part, direction, step)
        scale = max(float(found.norm()), float(truth.norm()), 1e-300)
        value = float((found - truth).norm()) / scale
        bound = _BOUND + _gradient_rounding(operator.problem, part, step) / scale
        if not value <= bound:
            terms = Terms(operator, part)
            rounding = terms.rounding_of(direction, torch.float64)
            rounding += _ROUNDED * _EPS * terms.slope / step
            bound += rounding / scale
        return value, bound

    value, bound = within_bound(sample, measure, "products disagree with central differences")
    detail = "|Hv - difference| / |Hv| in float64"
    return Check(name="central difference", state="passed", detail=detail, value=value, bound=bound)


def _by_differences(operator: Operator, sample: Sample, direction: Tensor, step: float) -> Tensor:
    build = BUILDERS[operator.kind]["finite-difference"]
    total = torch.zeros_like(direction)
    with operator.problem.forward_context():
        for batch in sample.batches():
            apply = build(*operator.parts(batch), step=step)
            total += batch.weight * apply(direction[None])[0]
    return total


def _one(operator: Operator, sample: Sample, vector: Tensor) -> Tensor:
    return product(operator, sample, vector[None])[0]


def _gradient_rounding(problem: Problem, sample: Sample, step: float) -> float:
    """What rounding of the gradient makes of its difference along a unit direction, at most."""
    with problem.forward_context():
        loss = sample.evaluate()
        slope = flatten(gradient(loss, problem.parameters.tensors))
    return _rounding(problem, abs(float(loss.detach())) + float(slope.norm()), step)


def _rounding(problem: Problem, size: float, step: float) -> float:
    """At most, of the difference of something of a size; sure probabilities cancel from 1."""
    return _ROUNDED * _EPS * (problem.loss.multiple + size) / step
