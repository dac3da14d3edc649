"""Checks before any number is believed, and the choice of the autodiff mode.

The products of a mode are tested in float64 on a few examples in two ways: symmetry, which a
mode that differentiates the wrong function breaks, and a central difference, which also catches
a matrix that is wrong but symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli import streams
from hesscli.errors import UnsoundError
from hesscli.operators.base import Operator
from hesscli.operators.blame import random_module, undifferentiable_module
from hesscli.operators.products import BUILDERS, MODES, Mode, flatten, gradient
from hesscli.parameters import Parameters
from hesscli.problem.problem import Problem, WeightedBatch
from hesscli.results import Check, Preflight

SAMPLE = 8
"""Examples for the checks of products: few, so that few kinks lie within a difference step."""

MakeOperator = Callable[..., Operator]

_ATTEMPTS = ((1e-5, 0.0), (1e-6, 1e-3), (1e-7, 1e-3))
"""Step along a unit direction, and relative shift of the weights: a kink that the weights sit
on, or that a step crosses, says nothing about the mode."""

_DIFFERENCE_BOUND = 1e-3


def preflight(problem: Problem, make: MakeOperator, mode: str = "auto") -> Preflight:
    """Check loss, determinism and products, and choose the mode.

    Args:
        problem: what is analysed.
        make: ``make(problem, mode=...)`` gives the operator.
        mode: a mode that must hold, or ``auto``: the first of double backward,
            forward-over-reverse and central differences (cheapest first, by counted cost)
            that runs and passes.

    Raises:
        UnsoundError: a random or non-finite loss, or no mode passes; the module is named.
    """
    proof = problem.prove()
    sample = problem.sample(SAMPLE)
    checks = [
        Check(name="finite loss", passed=True, detail=f"{problem.loss.name}", value=proof.loss),
        _determinism(problem, sample),
        _independence(problem),
    ]
    refusals: list[str] = []
    for candidate in MODES if mode == "auto" else (mode,):
        outcome = _try(problem, make, candidate, sample)  # type: ignore[arg-type]
        if isinstance(outcome, str):
            refusals.append(f"{candidate}: {outcome}")
            continue
        return Preflight(
            mode=candidate,
            attention_kernel="math",
            fallback="; ".join(refusals) or None,
            relative_rounding=outcome.rounding,
            checks=(*checks, *outcome.checks),
        )
    raise UnsoundError(
        "no autodiff mode gives this model's curvature",
        refusals[0],
        "the module named there in plain differentiable torch operations"
        if mode == "auto"
        else "--mode auto",
    )


@dataclass(frozen=True)
class _Outcome:
    checks: tuple[Check, ...]
    rounding: float | None


def _determinism(problem: Problem, sample: WeightedBatch) -> Check:
    """Loss and gradient twice on the same examples; equal but for the order of sums."""
    tensors = problem.parameters.tensors

    def once() -> tuple[float, Tensor]:
        value = problem.evaluate(sample.data)
        return float(value.detach()), flatten(gradient(value, tensors))

    (first, slope), (second, again) = once(), once()
    difference = max(
        abs(first - second) / max(abs(first), 1e-30),
        float((slope - again).norm() / slope.norm().clamp_min(1e-30)),
    )
    bound = 1e3 * torch.finfo(problem.dtype).eps
    if not difference <= bound:
        culprit = random_module(problem.model, lambda: problem.evaluate(sample.data))
        raise UnsoundError(
            "the loss is random",
            f"{first:.6g}, then {second:.6g} on the same examples"
            + (f"; {culprit} differs" if culprit else ""),
            "evaluation mode ([model] training = false), or no random operation in the forward",
        )
    return Check(
        name="determinism",
        passed=True,
        detail="same loss and gradient twice",
        value=difference,
        bound=bound,
    )


def _independence(problem: Problem) -> Check:
    """Whether an example's output depends on its batch; it may, but then the batch is the unit."""
    name = "independent examples"
    if problem.couples_examples is not None:
        detail = f"no: {problem.couples_examples}; the batch is the unit"
    elif not problem.loss.exposes_outputs or not problem.data.sliceable:
        detail = "not seen: the batch is the unit"
    else:
        detail = "outputs do not depend on the batch"
    return Check(name=name, passed=True, detail=detail)


def _try(problem: Problem, make: MakeOperator, mode: Mode, sample: WeightedBatch) -> _Outcome | str:
    """The checks of one mode, or why it cannot be used."""
    try:
        native = _quadratic_forms(make(problem, mode=mode), problem, sample)
        return _in_float64(problem, make, mode, native)
    except _Mismatch as mismatch:
        return str(mismatch)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        culprit = undifferentiable_module(
            problem.model, lambda: problem.evaluate(problem.sample(2).data)
        )
        reason = str(error).strip().splitlines()[0][:160]
        return f"{culprit or problem.loss.name} ({reason})"


class _Mismatch(Exception):
    """A mode that runs and is wrong."""


def _in_float64(problem: Problem, make: MakeOperator, mode: Mode, native: Tensor) -> _Outcome:
    wide = problem.dtype != torch.float64
    with problem.in_dtype(torch.float64) if wide else nullcontext():
        sample = problem.sample(SAMPLE)
        operator = make(problem, mode=mode)
        try:
            exact = _quadratic_forms(operator, problem, sample)
        except RuntimeError:
            if not wide:
                raise
            return _Outcome((_skipped(),), None)
        checks = (_symmetry(operator, sample), _central_difference(operator, problem, sample))
    rounding = float((native.double() - exact).norm() / exact.norm().clamp_min(1e-300))
    floor = 100 * torch.finfo(torch.float64).eps
    return _Outcome(checks, max(rounding, floor))


def _skipped() -> Check:
    return Check(
        name="products in float64", passed=True, detail="the model does not run in float64"
    )


def _vectors(operator: Operator, count: int) -> Tensor:
    parameters, problem = operator.parameters, operator.problem
    rows = [
        streams.rademacher(
            streams.key(0x5EED, i),
            0,
            parameters.size,
            dtype=problem.dtype,
            device=problem.device,
        )
        for i in range(count)
    ]
    return torch.stack(rows)


def _product(operator: Operator, sample: WeightedBatch, block: Tensor) -> Tensor:
    with operator.problem.forward_context():
        return operator.live(sample)(block)


def _quadratic_forms(operator: Operator, problem: Problem, sample: WeightedBatch) -> Tensor:
    block = _vectors(operator, 4)
    forms = (block * _product(operator, sample, block)).sum(1, dtype=torch.float64)
    if not torch.isfinite(forms).all():
        raise _Mismatch("its products are not finite")
    return forms


def _symmetry(operator: Operator, sample: WeightedBatch) -> Check:
    """|vᵀHw − wᵀHv| / ‖Hw‖ for Rademacher v, w: independent of d."""
    block = _vectors(operator, 2)
    hv, hw = _product(operator, sample, block)
    scale = torch.maximum(hw.norm(), hv.norm()).clamp_min(1e-300)
    value = float((block[0] @ hw - block[1] @ hv).abs() / scale)
    bound = 1e4 * torch.finfo(operator.problem.dtype).eps
    bound = max(bound, 1e-6) if operator.mode == "finite-difference" else bound
    if not value <= bound:
        raise _Mismatch(f"products are not symmetric: {value:.1e} above {bound:.0e}")
    return Check(
        name="symmetry",
        passed=True,
        detail="|vᵀHw − wᵀHv| / ‖Hw‖ in float64",
        value=value,
        bound=bound,
    )


def _central_difference(operator: Operator, problem: Problem, sample: WeightedBatch) -> Check:
    """‖Hv − difference‖ / ‖Hv‖ along a unit direction; the best of a few points and steps."""
    value = math.inf
    for number, (step, shift) in enumerate(_ATTEMPTS):
        with _shifted(operator.parameters, shift):
            value = min(value, _difference(operator, sample, step, number))
        if value <= _DIFFERENCE_BOUND:
            break
    else:
        raise _Mismatch(
            f"products disagree with central differences by {value:.0%}"
            + _blamed_layers(operator, sample)
        )
    return Check(
        name="central difference",
        passed=True,
        detail="‖Hv − difference‖ / ‖Hv‖ in float64",
        value=value,
        bound=_DIFFERENCE_BOUND,
    )


def _difference(operator: Operator, sample: WeightedBatch, step: float, number: int) -> float:
    direction = _vectors(operator, number + 1)[-1:]
    direction = direction / direction.norm()
    product = _product(operator, sample, direction)
    with operator.problem.forward_context():
        build = BUILDERS[operator.kind]["finite-difference"]
        difference = build(*operator.parts(sample), step=step)(direction)
    slope = gradient(operator.problem.evaluate(sample.data), operator.parameters.tensors)
    rounding = 1e2 * torch.finfo(torch.float64).eps / step * (1 + float(flatten(slope).norm()))
    error = max(0.0, float((product - difference).norm()) - rounding)
    return error / max(float(product.norm()), float(difference.norm()), 1e-300)


def _blamed_layers(operator: Operator, sample: WeightedBatch) -> str:
    """Layers along whose own directions the products are wrong."""
    wrong = []
    for layer in operator.parameters.layers:
        part = type(operator)(
            operator.problem,
            parameters=Parameters(operator.parameters.in_layer(layer)),
            mode=operator.mode,
        )
        step, _ = _ATTEMPTS[1]
        if _difference(part, sample, step, 0) > _DIFFERENCE_BOUND:
            wrong.append(layer)
    return f", in {', '.join(wrong[:5])}" if wrong else ""


@contextmanager
def _shifted(parameters: Parameters, relative: float) -> Iterator[None]:
    """Weights moved a little off where they are, and put back."""
    originals = [t.detach().clone() for t in parameters.tensors]
    try:
        if relative:
            with torch.no_grad():
                for number, (tensor, original) in enumerate(
                    zip(parameters.tensors, originals, strict=True)
                ):
                    noise = streams.gaussian(
                        streams.key(0x5417, number),
                        0,
                        tensor.numel(),
                        dtype=tensor.dtype,
                        device=tensor.device,
                    ).view(tensor.shape)
                    scale = relative * (float(original.square().mean().sqrt()) + 0.1)
                    tensor.add_(noise, alpha=scale)
        yield
    finally:
        with torch.no_grad():
            for tensor, original in zip(parameters.tensors, originals, strict=True):
                tensor.copy_(original)
