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
from typing import Any

import torch
from torch import Tensor, nn

from hesscli import randomness
from hesscli.meter import FORWARD, Meter, OnStep, go_on
from hesscli.operators.curvature import Curvature
from hesscli.operators.products import (
    BUILDERS,
    STEP,
    Apply,
    central_difference,
    flatten,
    gradient,
    unflatten,
    work,
)
from hesscli.parameters import Parameters
from hesscli.problem.batches import tensors_of
from hesscli.problem.forward import moved
from hesscli.problem.objective import Objective, Sample, WeightedBatch
from hesscli.problem.precision import tolerance
from hesscli.results import Check
from hesscli.sums import distance, inner, is_finite, weighted_sum

# -- Where operators are put to the test: along which vectors, at which weights, by which steps ----


_ATTEMPTS = ((STEP / 2, 0.0), (STEP / 10, 1e-3), (STEP / 100, 1e-3))
"""Step along a unit direction, and relative shift of the weights: a kink that the weights sit
on, or that a step crosses, says nothing about the mode. No step is that of the mode of central
differences, which would be compared with itself."""

FORMS = 2
"""Quadratic forms whose rounding is measured: symmetry takes as many products."""

_LEAST = 4
"""Examples that are not taken apart any more: a wrong one among them shows."""

Measure = Callable[[Sample, Tensor, float], tuple[float, float]]
"""A relative error on some examples along a unit direction with a step, and what is allowed."""


class MismatchError(Exception):
    """Something that runs and is wrong."""


def signs(problem: Objective, number: int, parameters: Parameters | None = None) -> Tensor:
    """A Rademacher vector of a fixed stream, for all parameters or some of them."""
    return randomness.at(
        (problem.parameters if parameters is None else parameters).runs,
        randomness.rademacher,
        randomness.key(0x5EED, number),
        dtype=problem.dtype,
        device=problem.device,
    )


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


# -- How large the terms of a product are before they cancel ---------------------------------------
# Where a network is sure of its examples, the slope of the loss in its outputs is p − 1 with p near
# 1, and so is its curvature. What is left of either after subtraction is small, but its rounding is
# that of 1, and reaches the product through the outputs' own derivatives. A loss with slope and
# curvature of order one in their place shows how large that can become.


_ROUNDED_TERMS = 16
"""Rounding of a product, in units of eps and of the size of its terms: 2 to 18 were seen."""
_SIGNS = 0x7E125
"""Separates the slopes' signs from other streams."""


class Terms:
    """Of an operator's products on some examples.

    Args:
        operator: the matrix.
        sample: the examples.
    """

    def __init__(self, operator: Curvature, sample: Sample) -> None:
        self.operator, self.sample = operator, sample

    def rounding_of(self, vector: Tensor, precision: torch.dtype) -> float:
        """At most, of the product with a vector; 0 where nothing is known of the outputs.

        Args:
            vector: ``(d,)``.
            precision: the type that the model computes in.
        """
        return _ROUNDED_TERMS * torch.finfo(precision).eps * self.size_of(vector)

    def size_of(self, vector: Tensor) -> float:
        """The length of their product with a vector ``(d,)``; 0 where nothing is known of them."""
        tensors, build = self.operator.parameters.tensors, BUILDERS["hessian"]["double-backward"]

        def product(batch: WeightedBatch) -> Tensor:
            return build(lambda _: self._uncancelled(batch), tensors)(vector[None])

        with self.operator.problem.forward_context():
            total = _mean(self.sample, vector[None], product)
        size = float(total.norm())
        return size if size < math.inf else 0.0

    @property
    def slope(self) -> float:
        """The length of the gradient."""
        tensors = self.operator.parameters.tensors
        with self.operator.problem.forward_context():
            values = [b.weight * self._uncancelled(b) for b in self.sample.batches()]
            return float(flatten(gradient(torch.stack(values).sum(), tensors)).norm())

    def _uncancelled(self, batch: WeightedBatch) -> Tensor:
        """½‖f + s‖² of an example's outputs f at f = 0, with signs s: its slope is s, in the mean.

        Second derivatives of f are multiplied with s then, and its first with one another.
        """
        problem = self.operator.problem
        with _outputs_of(problem) as outputs, problem.recomputing():
            loss = problem.evaluate(batch.data)
        terms, share = [loss * 0], 2 * batch.count / self.operator.problem.loss.multiple
        for number, output in enumerate(outputs):
            signs = randomness.rademacher(
                randomness.key(_SIGNS, number),
                0,
                output.numel(),
                dtype=output.dtype,
                device=output.device,
            ).view_as(output)
            terms.append((output - output.detach() + signs).square().sum() / share)
        return torch.stack([term.to(loss.dtype) for term in terms]).sum()


@contextmanager
def _outputs_of(problem: Objective) -> Iterator[list[Tensor]]:
    """Meanwhile, whatever differentiable tensors the model returns."""
    outputs: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        found = [output] if isinstance(output, Tensor) else tensors_of(vars_of(output))
        outputs.extend(t for t in found if t.requires_grad and t.is_floating_point())

    handle = problem.model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def vars_of(output: Any) -> Any:
    """An object's attributes, where it is no collection of its own."""
    return vars(output) if hasattr(output, "__dict__") and not hasattr(output, "keys") else output


# -- Whether gradient and products are right, by tests that know nothing of how they were made -----


_BOUND = 1e-4
"""Right modes differ by 1e-10 to 1e-6 with no kink within the step, wrong ones by percents."""
_EPS = torch.finfo(torch.float64).eps
_ROUNDED = 100
"""Rounding of a loss or a gradient, at most, in units of eps and of the size of its terms."""
_LONGER = 20
"""Steps of the loss to those of its gradient, which jumps at kinks where the loss bends."""


_AT, _WRITES = 3, 12
"""Vectors that are made for a direction and weights off theirs, and gone through for a step."""

_PIECE = 1 << 18
"""Entries of a direction that are compared at once."""


@dataclass(frozen=True)
class Crossing:
    """What products with two vectors say of symmetry: vᵀAw, wᵀAv, and the larger length."""

    one: float
    other: float
    length: float


@dataclass(frozen=True)
class Products:
    """A v of a few Rademacher vectors v, rows ``(k, d)``."""

    vectors: Tensor
    values: Tensor

    @property
    def forms(self) -> Tensor:
        """vᵀAv, float64."""
        pairs = zip(self.vectors, self.values, strict=True)
        return torch.tensor([inner(*pair) for pair in pairs], dtype=torch.float64, device="cpu")

    @property
    def crossing(self) -> Crossing:
        """Of the first two."""
        (v, w), (product_v, product_w) = self.vectors[:2], self.values[:2]
        length = float(torch.maximum(product_v.norm(), product_w.norm()))
        return Crossing(inner(v, product_w), inner(w, product_v), length)

    def along(self, direction: Tensor) -> Tensor | None:
        """The product with a unit direction, where that is the first vector's."""
        length = self.vectors[0].norm()
        units = (piece / length for piece in torch.split(self.vectors[0], _PIECE))
        is_first = all(map(torch.equal, torch.split(direction, _PIECE), units))
        return self.values[0] / length if is_first else None


class Product:
    """A v on some examples, without weight decay, for rows ``(k, d)``; its work is counted.

    The graph of examples that are one batch is kept, for as long as nothing moves the weights.

    Args:
        operator: the matrix.
        sample: the examples.
    """

    def __init__(self, operator: Curvature, sample: Sample) -> None:
        self.operator, self.sample = operator, sample
        self._kept: Apply | None = None

    def __call__(self, block: Tensor) -> Tensor:
        """The products with a block of vectors.

        Raises:
            MismatchError: one is not finite.
        """
        graph, each = self.operator.cost
        each, problem = len(block) * each, self.operator.problem

        def product(batch: WeightedBatch) -> Tensor:
            apply, share = self._kept, problem.share_of(batch.count)
            if apply is None:
                apply = self.operator.live(batch)
                self.operator.meter.add(graph, share)
            if len(self.sample.parts) == 1:
                self._kept = apply
            self.operator.meter.add(each, share)
            self.operator.meter.add(problem.vectors(2.0 * len(block)))  # in parts, and as one
            return apply(block)

        with problem.forward_context():
            total = _mean(self.sample, block, product)
        if not is_finite(total):
            raise MismatchError("its products are not finite")
        return total

    def with_signs(self) -> Products:
        """With the first few Rademacher vectors."""
        problem = self.operator.problem
        self.operator.meter.add(problem.vectors(2.0 * FORMS))  # by themselves, and as rows
        size = problem.parameters.size
        block = torch.empty(FORMS, size, dtype=problem.dtype, device=problem.device)
        for number, row in enumerate(block):
            row.copy_(signs(problem, number))
        return Products(block, self(block))

    def crossing(self) -> Crossing:
        """Of the same, of which no more than two vectors are there at once."""
        problem, found = self.operator.problem, list[tuple[float, float]]()
        for number in range(2):
            product = self(signs(problem, number)[None])[0]
            found.append((inner(signs(problem, 1 - number), product), float(product.norm())))
        (other, first), (one, second) = found
        return Crossing(one, other, max(first, second))


def _mean(sample: Sample, like: Tensor, rows: Callable[[WeightedBatch], Tensor]) -> Tensor:
    """The mean of rows over a sample, which is its one part's own where it has no other."""
    if len(sample.parts) == 1:
        return rows(next(sample.batches()))
    return weighted_sum(sample.batches(), torch.zeros_like(like), lambda batch: [rows(batch)])


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
        return _mean(sample, direction[None], difference)[0]


def _gradient_rounding(problem: Objective, sample: Sample, step: float) -> float:
    """What rounding of the gradient makes of its difference along a unit direction, at most."""
    with problem.forward_context():
        loss = sample.evaluate()
        slope = flatten(gradient(loss, problem.parameters.tensors))
    return _rounding(problem, abs(float(loss.detach())) + float(slope.norm()), step)


def _rounding(problem: Objective, size: float, step: float) -> float:
    """At most, of the difference of something of a size; sure probabilities cancel from 1."""
    return _ROUNDED * _EPS * (problem.loss.multiple + size) / step
