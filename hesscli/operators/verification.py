"""Whether gradient and products are right, by tests that know nothing of how they were made.

Symmetry breaks where a mode differentiates another function than the loss; a central difference
along a unit direction also catches a matrix that is wrong but symmetric, and one of the loss
itself a gradient that autograd was kept from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesscli.meter import FORWARD, Meter, OnStep, go_on
from hesscli.operators.curvature import Curvature
from hesscli.operators.products import (
    BUILDERS,
    STEP,
    central_difference,
    flatten,
    gradient,
    unflatten,
    work,
)
from hesscli.operators.terms import Terms
from hesscli.operators.trials import Crossing, MismatchError, Product, Products, mean, signs
from hesscli.parameters import Parameters
from hesscli.problem.forward import moved
from hesscli.problem.objective import Objective, Sample, WeightedBatch
from hesscli.problem.precision import tolerance
from hesscli.results import Check
from hesscli.sums import distance, inner

_ATTEMPTS = ((STEP / 2, 0.0), (STEP / 10, 1e-3), (STEP / 100, 1e-3))
"""Step along a unit direction, and relative shift of the weights: a kink that the weights sit
on, or that a step crosses, says nothing about the mode. No step is that of the mode of central
differences, which would be compared with itself."""

_BOUND = 1e-4
"""Right modes differ by 1e-10 to 1e-6 with no kink within the step, wrong ones by percents."""
_EPS = torch.finfo(torch.float64).eps
_ROUNDED = 100
"""Rounding of a loss or a gradient, at most, in units of eps and of the size of its terms."""
_LONGER = 20
"""Steps of the loss to those of its gradient, which jumps at kinks where the loss bends."""

_AT, _WRITES = 3, 12
"""Vectors that are made for a direction and weights off theirs, and gone through for a step."""

_LEAST = 4
"""Examples that are not taken apart any more: a wrong one among them shows."""

Measure = Callable[[Sample, Tensor, float], tuple[float, float]]
"""A relative error on some examples along a unit direction with a step, and what is allowed."""


@dataclass(frozen=True)
class Comparison:
    """What autograd makes, beside differences that know nothing of how it was made.

    Attributes:
        name: of the check.
        detail: what is measured, in symbols.
        mismatch: what it is called where it is too large.
        measure: what compares.
    """

    name: str
    detail: str
    mismatch: str
    measure: Measure

    def check(self, sample: Sample) -> Check:
        """An error within what is allowed, at one of a few points and steps.

        The more examples, the more kinks lie within a step: where they are too many, halves of
        the sample must each be right by themselves.

        Args:
            sample: examples of a problem in float64.

        Raises:
            MismatchError: some examples have none; the layers are named.
        """
        pending, found = [sample], list[tuple[float, float]]()
        while pending:
            part, errors = pending.pop(), list[float]()
            for number, attempt in enumerate(_ATTEMPTS):
                with _at(part.problem, number, attempt) as (direction, step):
                    value, bound = self.measure(part, direction, step)
                if value <= bound:
                    found.append((value, bound))
                    break
                errors.append(value)
            else:
                halves = part.halves() if part.count > _LEAST else ()
                if not halves:
                    where = self._layers_off(part)
                    raise MismatchError(f"{self.mismatch} by {min(errors):.2%}{where}")
                pending += reversed(halves)
        value, bound = max(found, key=lambda pair: pair[0] / pair[1])
        return Check(name=self.name, state="passed", detail=self.detail, value=value, bound=bound)

    def _layers_off(self, sample: Sample) -> str:
        """The layers along which there is a mismatch at the last of the points."""
        last = len(_ATTEMPTS) - 1
        with _at(sample.problem, last, _ATTEMPTS[last]) as (direction, step):

            def is_wrong(mask: Tensor) -> bool:
                part = mask * direction
                value, bound = self.measure(sample, part / part.norm(), step)
                return not value <= bound

            return layers_where(sample.problem.parameters, is_wrong)


@contextmanager
def _at(
    problem: Objective, number: int, attempt: tuple[float, float]
) -> Iterator[tuple[Tensor, float]]:
    """The weights of an attempt, and its unit direction and step."""
    step, shift = attempt
    direction = moving(problem, signs(problem, number))
    with moved(problem.parameters.tensors, shift):
        yield direction.div_(direction.norm()), step


def layers_where(parameters: Parameters, is_wrong: Callable[[Tensor], bool]) -> str:
    """Names the layers along whose own directions something is wrong, given as masks (d,)."""
    wrong = []
    for layer in parameters.layers:
        mask = [
            torch.full_like(p.tensor, p.layer == layer, requires_grad=False) for p in parameters
        ]
        if is_wrong(flatten(mask)):
            wrong.append(layer)
    more = ", ..." if len(wrong) > 5 else ""
    return f", in {', '.join(wrong[:5])}{more}" if wrong else ""


def moving(problem: Objective, vector: Tensor, parameters: Parameters | None = None) -> Tensor:
    """A vector of all parameters or some that is zero now at padding rows of embeddings.

    No gradient reaches them, though outputs use them.
    """
    rows = {
        module.weight: module.padding_idx
        for module in problem.model.modules()
        if isinstance(module, nn.Embedding)
    }
    tensors = (problem.parameters if parameters is None else parameters).tensors
    for tensor, part in zip(tensors, unflatten(vector, tensors), strict=True):
        if (row := rows.get(tensor)) is not None:
            part[row] = 0
    return vector


def gradient_comparison(problem: Objective, meter: Meter) -> Comparison:
    """|gradient'v - difference of the loss| in float64, relative to what gradient'v can be.

    Args:
        problem: in float64.
        meter: counts the work.
    """
    tensors = problem.parameters.tensors

    def measure(part: Sample, direction: Tensor, step: float) -> tuple[float, float]:
        with problem.forward_context():
            value = part.evaluate()
            slope, parts = gradient(value, tensors), unflatten(direction, tensors)
            along = sum(inner(*map(torch.ravel, pair)) for pair in zip(slope, parts, strict=True))
            length, step = math.hypot(*(float(part.norm()) for part in slope)), _LONGER * step
            truth = float(
                central_difference(lambda: part.evaluate().detach(), tensors, direction, step)
            )
        meter.add(problem.gradient_cost + 2 * FORWARD, part.share)
        meter.add(problem.vectors(_AT + 1, _WRITES))
        # Along ±1 signs, gradient'v is about |gradient| / √d, however small it comes out.
        typical = length / problem.parameters.size**0.5
        scale = max(abs(along), abs(truth), typical, 1e-300)
        rounding = _rounding(problem, abs(float(value.detach())), step)
        return abs(along - truth) / scale, _BOUND + rounding / scale

    return Comparison(
        name="gradient",
        detail="|g'v - difference of the loss| / |g'v| in float64",
        mismatch="it differs from differences of the loss",
        measure=measure,
    )


def check_symmetry(
    operator: Curvature, sample: Sample, found: Crossing, precision: torch.dtype
) -> Check:
    """|vᵀAw − wᵀAv| / ‖Aw‖ for Rademacher v and w, which does not depend on d.

    Args:
        operator: what made the products.
        sample: the examples.
        found: by the products with v and w.
        precision: the type that the model computes in.

    Raises:
        MismatchError: it is above rounding; the layers are named.
    """
    problem, scale = operator.problem, max(found.length, 1e-300)
    length = problem.parameters.size**0.5
    bound = tolerance(precision) + _EPS * length / scale
    if operator.mode == "finite-difference":
        bound = 1e-6 + _gradient_rounding(problem, sample, STEP) * length / scale
    value = abs(found.one - found.other) / scale
    if not value <= bound:  # what cancels is rounded as it was before, which takes a product to see
        bound += Terms(operator, sample).rounding_of(signs(problem, 1), precision) / scale
    if not value <= bound:
        v, w = signs(problem, 0), signs(problem, 1)
        product_w = Product(operator, sample)(w[None])[0]

        def is_wrong(mask: Tensor) -> bool:
            part = mask.mul_(v)
            product = Product(operator, sample)(part[None])[0]
            return bool(abs(inner(part, product_w) - inner(w, product)) / scale > bound)

        layers = layers_where(operator.parameters, is_wrong)
        raise MismatchError(f"products are not symmetric: {value:.1e} above {bound:.0e}{layers}")
    return Check(
        name="symmetry", state="passed", detail="|v'Hw - w'Hv| / |Hw|", value=value, bound=bound
    )


def product_comparison(
    operator: Curvature, sample: Sample, made: Products, on_step: OnStep = go_on
) -> Comparison:
    """‖Av − difference‖ / ‖Av‖ along a unit direction, in float64.

    Args:
        operator: the matrix, of a problem in float64.
        sample: examples with which products were made before.
        made: these products.
        on_step: called after each product; may end it.
    """

    def measure(part: Sample, direction: Tensor, step: float) -> tuple[float, float]:
        known = made.along(direction) if part is sample else None
        found = Product(operator, part)(direction[None])[0] if known is None else known
        on_step()
        truth = _by_differences(operator, part, direction, step)
        on_step()
        scale = max(float(found.norm()), float(truth.norm()), 1e-300)
        value, bound = distance(found, truth) / scale, _BOUND
        if not value <= bound:  # rounding, which takes a gradient to see
            bound += _gradient_rounding(operator.problem, part, step) / scale
        if not value <= bound:
            terms = Terms(operator, part)
            rounding = terms.rounding_of(direction, torch.float64)
            rounding += _ROUNDED * _EPS * terms.slope / step
            bound += rounding / scale
        return value, bound

    return Comparison(
        name="central difference",
        detail="|Hv - difference| / |Hv| in float64",
        mismatch="products disagree with central differences",
        measure=measure,
    )


def _by_differences(operator: Curvature, sample: Sample, direction: Tensor, step: float) -> Tensor:
    build = BUILDERS[operator.kind]["finite-difference"]

    def difference(batch: WeightedBatch) -> Tensor:
        return build(*operator.parts(batch), step=step)(direction[None])

    cost = work(operator.kind, "finite-difference", operator.problem.way_back)
    operator.meter.add(sum(cost), sample.share)
    operator.meter.add(operator.problem.vectors(_AT + 3, _WRITES))
    with operator.problem.forward_context():
        return mean(sample, direction[None], difference)[0]


def _gradient_rounding(problem: Objective, sample: Sample, step: float) -> float:
    """What rounding of the gradient makes of its difference along a unit direction, at most."""
    with problem.forward_context():
        loss = sample.evaluate()
        slope = flatten(gradient(loss, problem.parameters.tensors))
    return _rounding(problem, abs(float(loss.detach())) + float(slope.norm()), step)


def _rounding(problem: Objective, size: float, step: float) -> float:
    """At most, of the difference of something of a size; sure probabilities cancel from 1."""
    return _ROUNDED * _EPS * (problem.loss.multiple + size) / step
