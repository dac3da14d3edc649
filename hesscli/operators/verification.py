"""Whether gradient and products are right, by tests that know nothing of how they were made.

Symmetry breaks where a mode differentiates another function than the loss; a central difference
along a unit direction also catches a matrix that is wrong but symmetric, and one of the loss
itself a gradient that autograd was kept from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.operators.base import Operator
from hesscli.operators.directions import MismatchError, layers_where, vectors, within_bound
from hesscli.operators.products import BUILDERS, STEP, central_difference, flatten, gradient
from hesscli.problem.precision import tolerance
from hesscli.problem.problem import Problem, WeightedBatch
from hesscli.results import Check

_BOUND = 1e-4
"""Right modes differ by 1e-10 to 1e-6 with no kink within the step, wrong ones by percents."""
_EPS = torch.finfo(torch.float64).eps
_LONGER = 20
"""Steps of the loss to those of its gradient, which jumps at kinks where the loss bends."""


def quadratic_forms(operator: Operator, sample: WeightedBatch) -> Tensor:
    """vᵀAv for a few Rademacher v, float64.

    Raises:
        MismatchError: one is not finite.
    """
    block = vectors(operator.problem, 4)
    forms = (block * _product(operator, sample, block)).sum(1, dtype=torch.float64)
    if not torch.isfinite(forms).all():
        raise MismatchError("its products are not finite")
    return forms


def check_gradient(problem: Problem, sample: WeightedBatch) -> Check:
    """|gradient'v - difference of the loss| in float64, relative to what gradient'v can be.

    Args:
        problem: what is analysed, in float64.
        sample: a few examples.

    Raises:
        MismatchError: they differ at every point and step; the layers are named.
    """
    tensors = problem.parameters.tensors

    def loss() -> Tensor:
        return problem.evaluate(sample.data)

    def measure(direction: Tensor, step: float) -> tuple[float, float]:
        value = loss()
        slope = flatten(gradient(value, tensors))
        along, step = float(slope @ direction), _LONGER * step
        truth = float(central_difference(lambda: loss().detach(), tensors, direction, step))
        # Along ±1 signs, gradient'v is about |gradient| / √d, however small it comes out.
        typical = float(slope.norm()) / len(slope) ** 0.5
        scale = max(abs(along), abs(truth), typical, 1e-300)
        rounding = _rounding(abs(float(value.detach())), step)
        return abs(along - truth) / scale, _BOUND + rounding / scale

    value, bound = within_bound(problem, measure, "it differs from differences of the loss")
    detail = "|g'v - difference of the loss| / |g'v| in float64"
    return Check(name="gradient", passed=True, detail=detail, value=value, bound=bound)


def check_symmetry(operator: Operator, sample: WeightedBatch, precision: torch.dtype) -> Check:
    """|vᵀAw − wᵀAv| / ‖Aw‖ for Rademacher v and w, which does not depend on d.

    Args:
        operator: what makes the products.
        sample: a few examples.
        precision: the type that the model computes in.

    Raises:
        MismatchError: it is above rounding; the layers are named.
    """
    v, w = vectors(operator.problem, 2)
    product_v, product_w = _product(operator, sample, torch.stack((v, w)))
    scale = torch.maximum(product_v.norm(), product_w.norm()).clamp_min(1e-300)
    bound = tolerance(precision) + _EPS * float(v.norm() / scale)
    if operator.mode == "finite-difference":
        rounding = _gradient_rounding(operator, sample, STEP) * float(v.norm())
        bound = 1e-6 + rounding / float(scale)

    def asymmetry(v: Tensor, product: Tensor) -> float:
        return float((v @ product_w - w @ product).abs() / scale)

    value = asymmetry(v, product_v)
    if not value <= bound:
        layers = layers_where(
            operator.parameters,
            lambda part: asymmetry(part * v, _one(operator, sample, part * v)) > bound,
        )
        raise MismatchError(f"products are not symmetric: {value:.1e} above {bound:.0e}{layers}")
    return Check(
        name="symmetry", passed=True, detail="|v'Hw - w'Hv| / |Hw|", value=value, bound=bound
    )


def check_difference(operator: Operator, sample: WeightedBatch) -> Check:
    """‖Av − difference‖ / ‖Av‖ along a unit direction, in float64.

    Raises:
        MismatchError: they differ at every point and step; the layers are named.
    """

    def measure(direction: Tensor, step: float) -> tuple[float, float]:
        product = _one(operator, sample, direction)
        with operator.problem.forward_context():
            build = BUILDERS[operator.kind]["finite-difference"]
            truth = build(*operator.parts(sample), step=step)(direction[None])[0]
        scale = max(float(product.norm()), float(truth.norm()), 1e-300)
        allowed = _BOUND + _gradient_rounding(operator, sample, step) / scale
        return float((product - truth).norm()) / scale, allowed

    what = "products disagree with central differences"
    value, bound = within_bound(operator.problem, measure, what)
    detail = "|Hv - difference| / |Hv| in float64"
    return Check(name="central difference", passed=True, detail=detail, value=value, bound=bound)


def _product(operator: Operator, sample: WeightedBatch, block: Tensor) -> Tensor:
    with operator.problem.forward_context():
        return operator.live(sample)(block)


def _one(operator: Operator, sample: WeightedBatch, vector: Tensor) -> Tensor:
    return _product(operator, sample, vector[None])[0]


def _gradient_rounding(operator: Operator, sample: WeightedBatch, step: float) -> float:
    """What rounding of the gradient makes of its difference along a unit direction, at most."""
    loss = operator.problem.evaluate(sample.data)
    slope = flatten(gradient(loss, operator.parameters.tensors))
    return _rounding(abs(float(loss.detach())) + float(slope.norm()), step)


def _rounding(size: float, step: float) -> float:
    """At most, of the difference of something of a size; sure probabilities cancel from 1."""
    return 100 * _EPS * (1 + size) / step
