"""Checks before any number is believed, and the choice of the autodiff mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.errors import HesscliError, UnsoundError, UsageError, first_line
from hesscli.operators.base import Operator
from hesscli.operators.directions import MismatchError
from hesscli.operators.independence import check_independence
from hesscli.operators.precision import doubled, working_precision
from hesscli.operators.products import MODES, flatten, gradient
from hesscli.operators.verification import (
    check_difference,
    check_gradient,
    check_symmetry,
    quadratic_forms,
)
from hesscli.problem.blame import (
    Attempt,
    differentiate,
    differentiate_forward,
    differentiate_twice,
    differing_module,
    failing_module,
    is_out_of_memory,
)
from hesscli.problem.precision import tolerance
from hesscli.problem.problem import Problem, WeightedBatch
from hesscli.results import Check, Mode, Preflight

SAMPLE = 8
"""Examples for the checks of products: few, so that few kinks lie within a difference step."""

_FLOOR = 100 * torch.finfo(torch.float64).eps
"""Rounding of quadratic forms in float64 itself."""


def preflight(problem: Problem, make: type[Operator], mode: str = "auto") -> Preflight:
    """Check loss, determinism and products, and choose the mode.

    Args:
        problem: what is analysed.
        make: the operator's class.
        mode: a mode that must hold, or ``auto``: the first of double backward,
            forward-over-reverse and central differences (cheapest first, by counted cost)
            that runs and passes. With central differences the operator has to run in float64.

    Raises:
        UnsoundError: a random or non-finite loss, a gradient that is not the loss's, or no mode
            passes; module or layers are named.
        UsageError: no such mode, or a matrix of per-example gradients of a model that mixes
            examples.
    """
    if mode not in ("auto", *MODES):
        raise UsageError("no such autodiff mode", repr(mode), f"auto, {', '.join(MODES)}")
    proof = problem.prove()
    sample = problem.sample(SAMPLE)
    determinism = _determinism(problem, sample)
    precision = working_precision(problem, SAMPLE)
    checks = (
        Check(name="finite loss", passed=True, detail=problem.loss.name, value=proof.loss),
        determinism,
        _gradient(problem, precision),
        check_independence(problem, make),
    )
    refusals: list[str] = []
    for candidate in [known for known in MODES if mode in ("auto", known)]:
        outcome = _try(problem, make, candidate, precision)
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


def _determinism(problem: Problem, sample: WeightedBatch) -> Check:
    """Loss and gradient twice on the same examples; equal but for the order of sums."""

    def once() -> tuple[float, Tensor]:
        value = problem.evaluate(sample.data)
        return float(value.detach()), flatten(gradient(value, problem.parameters.tensors))

    (first, slope), (second, again) = once(), once()
    difference = max(
        abs(first - second) / max(abs(first), 1e-30),
        float((slope - again).norm() / slope.norm().clamp_min(1e-30)),
    )
    bound = tolerance(problem.dtype)
    if not difference <= bound:

        def run() -> object:
            return problem.evaluate(sample.data)

        culprit = differing_module(problem.model, run, run, torch.equal)
        raise UnsoundError(
            "the loss is random",
            f"{first:.6g}, then {second:.6g} on the same examples"
            + (f"; {culprit} differs" if culprit else f"; look into the loss {problem.loss.name}"),
            "evaluation mode ([model] training = false), or no random operation in the forward",
        )
    return Check(
        name="determinism",
        passed=True,
        detail="same loss and gradient twice",
        value=difference,
        bound=bound,
    )


def _gradient(problem: Problem, precision: torch.dtype) -> Check:
    """Autograd's gradient against the loss, where that computes in float64."""
    if precision != torch.float64:
        return _skipped("gradient", precision)
    try:
        with doubled(problem):
            return check_gradient(problem, problem.sample(SAMPLE))
    except MismatchError as mismatch:
        raise UnsoundError(
            "the gradient is not that of the loss",
            str(mismatch),
            "no .data, .detach(), torch.no_grad() or backward of another function on its path",
        ) from None


def _skipped(name: str, precision: torch.dtype) -> Check:
    narrow = str(precision).removeprefix("torch.")
    return Check(name=name, passed=True, detail=f"skipped: the model computes in {narrow}")


@dataclass(frozen=True)
class _Outcome:
    """A mode that passed, and the relative error of its quadratic forms where that is known."""

    checks: tuple[Check, ...]
    rounding: float | None


def _try(
    problem: Problem, make: type[Operator], mode: Mode, precision: torch.dtype
) -> _Outcome | str:
    """The checks of one mode, or why it cannot be used."""
    try:
        if precision != torch.float64:
            return _in_own_type(problem, make, mode, precision)
        if mode == "finite-difference":
            return _by_differences(problem, make)
        return _against_float64(problem, make, mode)
    except MismatchError as mismatch:
        return str(mismatch)
    except HesscliError:
        raise
    except Exception as error:  # the model ran before, so that whatever this is, it is the mode's
        if is_out_of_memory(error):
            raise
        return f"{_obstacle(problem, mode)} ({first_line(error)})"


def _against_float64(problem: Problem, make: type[Operator], mode: Mode) -> _Outcome:
    """Quadratic forms in the problem's own type against float64, and float64 against truth."""
    own = quadratic_forms(make(problem, mode=mode), problem.sample(SAMPLE))
    with doubled(problem):
        sample, operator = problem.sample(SAMPLE), make(problem, mode=mode)
        exact = quadratic_forms(operator, sample)
        symmetry = check_symmetry(operator, sample, torch.float64)
        difference = check_difference(operator, sample)
    rounding = float((own - exact).norm() / exact.norm().clamp_min(1e-300))
    return _Outcome((symmetry, difference), max(rounding, _FLOOR))


def _by_differences(problem: Problem, make: type[Operator]) -> _Outcome:
    """Differences in float64 only, whose error is what another step makes of them."""
    with doubled(problem):
        sample, operator = problem.sample(SAMPLE), make(problem, mode="finite-difference")
        quadratic_forms(operator, sample)
        symmetry = check_symmetry(operator, sample, torch.float64)
        difference = check_difference(operator, sample)
    return _Outcome((symmetry, difference), max(difference.value or 0.0, _FLOOR))


def _in_own_type(
    problem: Problem, make: type[Operator], mode: Mode, precision: torch.dtype
) -> _Outcome:
    """Symmetry alone, of a model that does not compute in float64."""
    skipped = _skipped("central difference", precision)
    if mode == "finite-difference":
        raise MismatchError(f"central differences need float64: {skipped.detail}")
    sample, operator = problem.sample(SAMPLE), make(problem, mode=mode)
    quadratic_forms(operator, sample)
    return _Outcome((check_symmetry(operator, sample, precision), skipped), None)


_ATTEMPTS: dict[Mode, Attempt] = {
    "double-backward": differentiate_twice,
    "forward-over-reverse": differentiate_forward,
    "finite-difference": differentiate,
}


def _obstacle(problem: Problem, mode: Mode) -> str:
    """The module that a mode does not get through; the loss where it is no module."""
    sample = problem.sample(2)
    with problem.forward_context():
        module = failing_module(
            problem.model, lambda: problem.evaluate(sample.data), _ATTEMPTS[mode]
        )
    return module or f"the loss {problem.loss.name}"
