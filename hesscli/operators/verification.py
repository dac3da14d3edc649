"""Whether an operator's products are right, by tests that know nothing of how they were made.

Symmetry breaks where a mode differentiates another function than the loss; a central difference
along a unit direction also catches a matrix that is wrong but symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hesscli import streams
from hesscli.operators.base import Operator
from hesscli.operators.precision import tolerance
from hesscli.operators.products import BUILDERS, STEP, flatten, gradient
from hesscli.parameters import Parameters
from hesscli.problem.problem import WeightedBatch
from hesscli.results import Check

_ATTEMPTS = ((STEP / 2, 0.0), (STEP / 10, 1e-3), (STEP / 100, 1e-3))
"""Step along a unit direction, and relative shift of the weights: a kink that the weights sit
on, or that a step crosses, says nothing about the mode. No step is that of the mode of central
differences, which would be compared with itself."""

_DIFFERENCE_BOUND = 1e-4
"""Right modes differ by 1e-10 to 1e-6 with no kink within the step, wrong ones by percents."""


class MismatchError(Exception):
    """An operator that runs and is wrong."""


def vectors(operator: Operator, count: int) -> Tensor:
    """The first Rademacher rows ``(count, d)`` of a fixed stream."""
    problem = operator.problem
    rows = [
        streams.rademacher(
            streams.key(0x5EED, i),
            0,
            operator.parameters.size,
            dtype=problem.dtype,
            device=problem.device,
        )
        for i in range(count)
    ]
    return torch.stack(rows)


def quadratic_forms(operator: Operator, sample: WeightedBatch) -> Tensor:
    """vᵀAv for a few Rademacher v, float64.

    Raises:
        MismatchError: one is not finite.
    """
    block = vectors(operator, 4)
    forms = (block * _product(operator, sample, block)).sum(1, dtype=torch.float64)
    if not torch.isfinite(forms).all():
        raise MismatchError("its products are not finite")
    return forms


def check_symmetry(operator: Operator, sample: WeightedBatch, precision: torch.dtype) -> Check:
    """|vᵀAw − wᵀAv| / ‖Aw‖ for Rademacher v and w, which does not depend on d.

    Args:
        operator: what makes the products.
        sample: a few examples.
        precision: the type that the model computes in.

    Raises:
        MismatchError: it is above rounding; the layers are named.
    """
    v, w = vectors(operator, 2)
    product_v, product_w = _product(operator, sample, torch.stack((v, w)))
    scale = torch.maximum(product_v.norm(), product_w.norm()).clamp_min(1e-300)
    bound = tolerance(precision)
    if operator.mode == "finite-difference":
        rounding = _rounding(operator, sample, STEP) * float(v.norm())
        bound = 1e-6 + rounding / float(scale)

    def asymmetry(v: Tensor, product: Tensor) -> float:
        return float((v @ product_w - w @ product).abs() / scale)

    value = asymmetry(v, product_v)
    if not value <= bound:
        layers = _layers_where(
            operator, lambda part: asymmetry(part * v, _one(operator, sample, part * v)) > bound
        )
        raise MismatchError(f"products are not symmetric: {value:.1e} above {bound:.0e}{layers}")
    return Check(
        name="symmetry", passed=True, detail="|vᵀHw − wᵀHv| / ‖Hw‖", value=value, bound=bound
    )


def check_difference(operator: Operator, sample: WeightedBatch) -> Check:
    """‖Av − difference‖ / ‖Av‖ along a unit direction, in float64.

    Raises:
        MismatchError: they differ at every point and step; the layers are named.
    """
    errors = []
    for number, (step, shift) in enumerate(_ATTEMPTS):
        direction = vectors(operator, number + 1)[-1] * _moving(operator)
        with _shifted(operator.parameters, shift):
            value, bound = _difference(operator, sample, direction, step)
        if value <= bound:
            return Check(
                name="central difference",
                passed=True,
                detail="‖Hv − difference‖ / ‖Hv‖ in float64",
                value=value,
                bound=bound,
            )
        errors.append(value)

    def is_wrong(part: Tensor) -> bool:
        value, bound = _difference(operator, sample, part * direction, step)
        return not value <= bound

    with _shifted(operator.parameters, shift):
        layers = _layers_where(operator, is_wrong)
    raise MismatchError(f"products disagree with central differences by {min(errors):.2%}{layers}")


def _product(operator: Operator, sample: WeightedBatch, block: Tensor) -> Tensor:
    with operator.problem.forward_context():
        return operator.live(sample)(block)


def _one(operator: Operator, sample: WeightedBatch, vector: Tensor) -> Tensor:
    return _product(operator, sample, vector[None])[0]


def _moving(operator: Operator) -> Tensor:
    """Zero at padding rows of embeddings, which no gradient reaches though outputs use them."""
    rows = {
        module.weight: module.padding_idx
        for module in operator.problem.model.modules()
        if isinstance(module, nn.Embedding)
    }
    masks = [torch.ones_like(t, requires_grad=False) for t in operator.parameters.tensors]
    for tensor, mask in zip(operator.parameters.tensors, masks, strict=True):
        if (row := rows.get(tensor)) is not None:
            mask[row] = 0
    return flatten(masks)


def _difference(
    operator: Operator, sample: WeightedBatch, direction: Tensor, step: float
) -> tuple[float, float]:
    """Relative error against a central difference along a direction, and what is allowed."""
    direction = direction / direction.norm()
    product = _one(operator, sample, direction)
    with operator.problem.forward_context():
        build = BUILDERS[operator.kind]["finite-difference"]
        truth = build(*operator.parts(sample), step=step)(direction[None])[0]
    scale = max(float(product.norm()), float(truth.norm()), 1e-300)
    allowed = _DIFFERENCE_BOUND + _rounding(operator, sample, step) / scale
    return float((product - truth).norm()) / scale, allowed


def _rounding(operator: Operator, sample: WeightedBatch, step: float) -> float:
    """What rounding of the gradient makes of a difference along a unit direction, at most."""
    loss = operator.problem.evaluate(sample.data)
    slope = flatten(gradient(loss, operator.parameters.tensors))
    size = abs(float(loss.detach())) + float(slope.norm())
    return 100 * torch.finfo(torch.float64).eps * size / step


def _layers_where(operator: Operator, is_wrong: Callable[[Tensor], bool]) -> str:
    """Names the layers along whose own directions something is wrong, given as masks (d,)."""
    parameters = operator.parameters
    wrong = []
    for layer in parameters.layers:
        mask = [
            torch.full_like(p.tensor, p.layer == layer, requires_grad=False) for p in parameters
        ]
        if is_wrong(flatten(mask)):
            wrong.append(layer)
    more = ", ..." if len(wrong) > 5 else ""
    return f", in {', '.join(wrong[:5])}{more}" if wrong else ""


@contextmanager
def _shifted(parameters: Parameters, relative: float) -> Iterator[None]:
    """Weights moved a little off where they are, and put back."""
    originals = [t.detach().clone() for t in parameters.tensors]
    try:
        if relative:
            _shift(parameters, relative)
        yield
    finally:
        with torch.no_grad():
            for tensor, original in zip(parameters.tensors, originals, strict=True):
                tensor.copy_(original)


@torch.no_grad()
def _shift(parameters: Parameters, relative: float) -> None:
    for number, tensor in enumerate(parameters.tensors):
        noise = streams.gaussian(
            streams.key(0x5417, number),
            0,
            tensor.numel(),
            dtype=tensor.dtype,
            device=tensor.device,
        )
        scale = relative * (float(tensor.square().mean().sqrt()) + 0.1)
        tensor.add_(noise.view(tensor.shape), alpha=scale)
