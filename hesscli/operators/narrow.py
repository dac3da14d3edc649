"""Checks of models that cannot be brought to compute in float64: what differences can show there.

Steps are as long as a type with so few digits needs, about eps to the power 1/3. Gradients are
smooth enough for them, so that one that is off is refused. Products are not: a step that long
crosses kinks, whose curvature differences see and no second derivative does. What agrees has
passed; what does not was not checked, and is said to be so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hesscli.operators.curvature import Curvature
from hesscli.operators.products import central_difference, flatten, gradient
from hesscli.operators.verification import MismatchError, moving, product, vectors
from hesscli.problem.objective import Sample
from hesscli.results import Check

_STEPS = (1.0, 0.25, 4.0)
"""In units of eps to the power 1/3."""
_BOUND = 0.05
"""What higher derivatives may do over a step that long; what is wrong in kind is off by more."""
_BLIND = 0.5
"""From here on rounding could hide anything."""
_ROUNDED = 30
"""Rounding of a loss or a gradient in units of eps, at most."""


def check_gradient(sample: Sample, precision: torch.dtype) -> Check:
    """|gradient'v − difference of the loss| along the gradient and signs together.

    Args:
        sample: some examples of a problem in its own type.
        precision: the type that it computes in.

    Raises:
        MismatchError: they differ at every step, by more than rounding.
    """
    problem = sample.problem
    with problem.forward_context():
        loss = sample.evaluate()
        slope = flatten(gradient(loss, problem.parameters.tensors)).detach()
    direction = _towards(slope, sample)
    along = float(slope @ direction)

    def measure(step: float) -> tuple[float, float]:
        def value() -> Tensor:
            return sample.evaluate().detach().double()

        with problem.forward_context():
            truth = float(central_difference(value, problem.parameters.tensors, direction, step))
        return abs(along - truth), max(abs(along), abs(truth))

    size = problem.loss.multiple + abs(float(loss.detach()))
    value, bound = _best(measure, size, precision)
    if bound < _BLIND and not value <= bound:
        raise MismatchError(f"it differs from differences of the loss by {value:.0%}")
    return _outcome("gradient", "|g'v - difference of the loss| / |g'v|", value, bound, precision)


def check_difference(operator: Curvature, sample: Sample, precision: torch.dtype) -> Check:
    """‖Av − difference‖ / ‖Av‖ along a direction that the matrix stretches, and signs.

    Args:
        operator: what makes the products, in the problem's own type.
        sample: some examples.
        precision: the type that it computes in.
    """
    problem, tensors = operator.problem, operator.problem.parameters.tensors
    if operator.kind != "hessian":
        detail = f"the model computes in {_name(precision)}"
        return Check(name="central difference", state="skipped", detail=detail)
    signs = vectors(problem, 1)
    direction = _towards(product(operator, sample, signs)[0], sample)
    found = product(operator, sample, direction[None])[0]
    slopes: list[float] = []

    def slope() -> Tensor:
        part = flatten(gradient(sample.evaluate(), tensors)).detach()
        slopes.append(float(part.norm()))
        return part

    def measure(step: float) -> tuple[float, float]:
        with problem.forward_context():
            truth = central_difference(slope, tensors, direction, step)
        return float((found - truth).norm()), max(float(found.norm()), float(truth.norm()))

    measure(float(torch.finfo(precision).eps) ** (1 / 3))  # which shows how long gradients are
    value, bound = _best(measure, problem.loss.multiple + max(slopes), precision)
    return _outcome("central difference", "|Hv - difference| / |Hv|", value, bound, precision)


def _best(
    measure: Callable[[float], tuple[float, float]], size: float, precision: torch.dtype
) -> tuple[float, float]:
    """The relative error nearest to its bound, over a few steps, and that bound."""
    eps, found = float(torch.finfo(precision).eps), []
    for factor in _STEPS:
        step = factor * eps ** (1 / 3)
        error, scale = measure(step)
        rounding = _ROUNDED * eps * size / step
        if scale:
            found.append((error / scale, _BOUND + rounding / scale))
    seen = [pair for pair in found if pair[1] < _BLIND]
    return min(seen or found or [(0.0, _BLIND)], key=lambda pair: pair[0] / pair[1])


def _outcome(name: str, detail: str, value: float, bound: float, precision: torch.dtype) -> Check:
    told = f"{detail} in {_name(precision)}"
    if bound >= _BLIND:
        told = f"{_name(precision)} has too few digits here for a difference"
        return Check(name=name, state="skipped", detail=told)
    if not value <= bound:
        told = f"off by {value:.0%} in {_name(precision)}, as kinks within a step may be"
        return Check(name=name, state="skipped", detail=told)
    return Check(name=name, state="passed", detail=told, value=value, bound=bound)


def _towards(vector: Tensor, sample: Sample) -> Tensor:
    """A unit direction: a vector's, and signs in equal parts, so that it is long along both."""
    signs = vectors(sample.problem, 1)[0] * moving(sample.problem)
    length = vector.norm()
    mixed: Tensor = signs / signs.norm() + (vector / length if length else 0)
    return mixed.div_(mixed.norm())


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")
