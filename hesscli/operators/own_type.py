"""Differences for models that cannot be brought to compute in float64: what they show there.

Steps are as long as a type with so few digits needs, about eps to the power 1/3. Gradients are
smooth enough for them, so that one that is off is refused. Products are not: a step that long
crosses kinks, whose curvature differences see and no second derivative does. What agrees has
passed; what does not was not checked, and is said to be so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hesscli.meter import FORWARD, Meter, OnStep
from hesscli.operators.curvature import Curvature, Make
from hesscli.operators.products import central_difference, flatten, gradient
from hesscli.operators.trials import MismatchError, Product, signs
from hesscli.operators.verification import moving
from hesscli.parameters import Parameters
from hesscli.problem.objective import Objective, Sample
from hesscli.results import Check
from hesscli.sums import distance, inner

_STEPS = (4.0, 1.0, 0.25)
"""In units of eps to the power 1/3: the first leaves the most digits, the others meet less."""
_BOUND = 0.05
"""What higher derivatives may do over a step that long; what is wrong in kind is off by more."""
_BLIND = 0.5
"""From here on rounding could hide anything."""
_ROUNDED = 30
"""Rounding of a loss or a gradient in units of eps, at most."""
_PORTIONS = 3
"""In which a network is that is too large for float64: a difference takes six vectors at once."""


def gradient_in_own_type(sample: Sample, precision: torch.dtype, meter: Meter) -> Check:
    """|gradient'v − difference of the loss| along the gradient and signs together.

    Args:
        sample: some examples of a problem in its own type.
        precision: the type that it computes in.
        meter: counts the work.

    Raises:
        MismatchError: they differ at every step, by more than rounding.
    """
    problem = sample.problem
    with problem.forward_context():
        loss = sample.evaluate()
        slope = flatten(gradient(loss, problem.parameters.tensors)).detach()
    meter.add(problem.gradient_cost, sample.share)
    direction = _towards(slope, problem, problem.parameters)
    along = inner(slope, direction)
    del slope

    def measure(step: float) -> tuple[float, float]:
        def value() -> Tensor:
            return sample.evaluate().detach().double()

        with problem.forward_context():
            truth = float(central_difference(value, problem.parameters.tensors, direction, step))
        meter.add(2 * FORWARD, sample.share)
        return abs(along - truth), max(abs(along), abs(truth))

    size = problem.loss.multiple + abs(float(loss.detach()))
    value, bound = _nearest_to_bound(measure, lambda: size, precision)
    if bound < _BLIND and not value <= bound:
        raise MismatchError(f"it differs from differences of the loss by {value:.0%}")
    return _difference_check(
        "gradient", "|g'v - difference of the loss| / |g'v|", value, bound, precision
    )


def differences_in_own_type(
    make: Make, sample: Sample, precision: torch.dtype, on_step: OnStep
) -> Check:
    """‖Av − difference‖ / ‖Av‖ along directions that the matrix stretches, and signs.

    Args:
        make: of what makes the products, in the problem's own type.
        sample: some examples.
        precision: the type that it computes in.
        on_step: called after each difference; may end it.
    """
    problem, name = sample.problem, "central difference"
    if make().kind != "hessian":
        return Check(name=name, state="skipped", detail=problem.precision.why_narrow)
    portions = problem.parameters.portions(_PORTIONS if problem.precision.too_large else 1)
    pairs = [
        _difference_in_own_type(make(parameters=each), sample, precision, on_step)
        for each in portions
    ]
    value, bound = max(pairs, key=lambda pair: (pair[1] >= _BLIND, pair[0] / pair[1]))
    detail = "|Hv - difference| / |Hv|"
    if len(pairs) > 1:
        detail += f" of the blocks of {len(pairs)} portions of the parameters"
    return _difference_check(name, detail, value, bound, precision)


def _difference_in_own_type(
    operator: Curvature, sample: Sample, precision: torch.dtype, on_step: OnStep
) -> tuple[float, float]:
    """The relative error of a block's products, and its bound."""
    problem, parameters = operator.problem, operator.parameters
    product, slopes = Product(operator, sample), list[float]()
    direction = _towards(product(signs(problem, 0, parameters)[None])[0], problem, parameters)
    found = product(direction[None])[0]

    def slope() -> Tensor:
        part = flatten(gradient(sample.evaluate(), parameters.tensors)).detach()
        slopes.append(float(part.norm()))
        return part

    def measure(step: float) -> tuple[float, float]:
        with problem.forward_context():
            truth = central_difference(slope, parameters.tensors, direction, step)
        operator.meter.add(2 * problem.gradient_cost, sample.share)
        on_step()
        return distance(found, truth), max(float(found.norm()), float(truth.norm()))

    return _nearest_to_bound(measure, lambda: problem.loss.multiple + max(slopes), precision)


def _nearest_to_bound(
    measure: Callable[[float], tuple[float, float]],
    size: Callable[[], float],
    precision: torch.dtype,
) -> tuple[float, float]:
    """The relative error and its bound at the first step that passes, else the nearest to passing.

    Args:
        measure: an error at a step, and what it is beside.
        size: of what differences are taken of, known once one was measured.
        precision: the type that they are computed in.
    """
    eps, found = float(torch.finfo(precision).eps), []
    for factor in _STEPS:
        step = factor * eps ** (1 / 3)
        error, scale = measure(step)
        rounding = _ROUNDED * eps * size() / step
        if scale:
            found.append((error / scale, _BOUND + rounding / scale))
            if found[-1][0] <= found[-1][1] < _BLIND:
                return found[-1]
    seen = [pair for pair in found if pair[1] < _BLIND]
    return min(seen or found or [(0.0, _BLIND)], key=lambda pair: pair[0] / pair[1])


def _difference_check(
    name: str, detail: str, value: float, bound: float, precision: torch.dtype
) -> Check:
    told = f"{detail} in {_name(precision)}"
    if bound >= _BLIND:
        told = f"{_name(precision)} has too few digits here for a difference"
        return Check(name=name, state="skipped", detail=told)
    if not value <= bound:
        told = f"off by {value:.0%} in {_name(precision)}, as kinks within a step may be"
        return Check(name=name, state="skipped", detail=told)
    return Check(name=name, state="passed", detail=told, value=value, bound=bound)


def _towards(vector: Tensor, problem: Objective, parameters: Parameters) -> Tensor:
    """A unit direction: a vector's, and signs in equal parts, so that it is long along both."""
    mixed = moving(problem, signs(problem, 0, parameters), parameters)
    mixed.div_(mixed.norm())
    if length := float(vector.norm()):
        mixed.add_(vector, alpha=1 / length)
    return mixed.div_(mixed.norm())


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")
