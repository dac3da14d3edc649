"""Checks before any number is believed, and the choice of the autodiff mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hesscli.errors import HesscliError, UnsoundError, UsageError, first_line
from hesscli.memory import is_out_of_memory
from hesscli.meter import Meter, OnStep, go_on
from hesscli.operators.bias import Bias, measured
from hesscli.operators.curvature import Curvature, Make
from hesscli.operators.head import check_head
from hesscli.operators.own_type import differences_in_own_type, gradient_in_own_type
from hesscli.operators.products import gradient
from hesscli.operators.trials import MismatchError, Product, Products
from hesscli.operators.verification import check_symmetry, gradient_comparison, product_comparison
from hesscli.problem.blame import (
    Attempt,
    differentiate,
    differentiate_forward,
    differentiate_twice,
    differing_module,
    failing_module,
)
from hesscli.problem.objective import Objective, Sample
from hesscli.problem.precision import doubled, tolerance
from hesscli.problem.problem import Problem
from hesscli.results import Check, CheckState, Preflight
from hesscli.sums import distance
from hesscli.vocabulary import MODES, Mode

_FEWEST, _FEW, _MANY, _BIASED = 8, 16, 64, 256
"""Examples: at least; for what takes many products; for a comparison with differences; and for a
bias, which many examples have in common."""
_NUMBERS = 1 << 20
"""That a forward pass over the many may make, lest checks cost more than what they check."""

_FLOOR = 100 * torch.finfo(torch.float64).eps
"""Rounding of quadratic forms in float64 itself."""


_PASSED: WeakKeyDictionary[
    Problem, dict[tuple[type[Curvature], str, torch.dtype], tuple[Preflight, float]]
]
_PASSED = WeakKeyDictionary()
"""What was found of a problem, and the gradients that it took."""

_BIASES: WeakKeyDictionary[
    Problem, dict[tuple[type[Curvature], tuple[str, ...], Mode], tuple[Bias, float]]
]
_BIASES = WeakKeyDictionary()
"""What autocast does to the products of its matrices, and the gradients that this took."""


def checked(
    problem: Problem,
    make: type[Curvature],
    mode: str = "auto",
    meter: Meter | None = None,
    on_step: OnStep = go_on,
) -> Preflight:
    """The preflight of a problem, made once; arguments and errors are those of :func:`preflight`.

    A mode that was chosen has been checked by that. The meter counts what was made before, too,
    so that equal runs cost the same.
    """
    passed = _PASSED.setdefault(problem, {})
    key = make, mode, problem.dtype
    if key not in passed:
        work = Meter()
        found = preflight(problem, make, mode, work, on_step)
        passed[key] = passed[make, found.mode, problem.dtype] = found, work.gradients
    flight, gradients = passed[key]
    if meter is not None:
        meter.add(gradients)
    return flight


def recall(problem: Problem, make: type[Curvature], mode: str, flight: Preflight) -> None:
    """Let a preflight that was made in another process count as made; its work is counted there."""
    passed = _PASSED.setdefault(problem, {})
    for name in (mode, flight.mode):
        passed.setdefault((make, name, problem.dtype), (flight, 0.0))


def preflight(
    problem: Problem,
    make: type[Curvature],
    mode: str = "auto",
    meter: Meter | None = None,
    on_step: OnStep = go_on,
) -> Preflight:
    """Check loss, determinism and products, and choose the mode.

    Args:
        problem: what is analysed.
        make: the operator's class.
        mode: a mode that must hold, or ``auto``: the first of double backward,
            forward-over-reverse and central differences (cheapest first, by counted cost)
            that runs and passes. With central differences the operator has to run in float64.
        meter: counts the work; default a new one.
        on_step: called after each check, and between the products of one; may end it.

    Raises:
        UnsoundError: a random or non-finite loss, a gradient that is not the loss's, or no mode
            passes; module or layers are named.
        UsageError: no such mode, or a matrix of per-example gradients of a model that mixes
            examples.
    """
    candidates, proof = _candidates(problem, mode), problem.prove()
    few, many = _samples(problem)
    meter = Meter() if meter is None else meter
    meter.add(problem.trial_work)
    checks = [Check(name="finite loss", state="passed", detail=problem.loss.name, value=proof.loss)]
    for check in (
        partial(_determinism, few, meter),
        partial(_gradient, many, meter),
        partial(check_independence, problem, make),
    ):
        checks.append(check())
        on_step()
    refusals: list[str] = []
    for candidate in candidates:
        build = partial(make, problem, mode=candidate, meter=meter)
        try:
            outcome = _tested(candidate, build, few, many, on_step)
        except MismatchError as mismatch:
            refusals.append(f"{candidate}: {mismatch}")
            continue
        return Preflight(
            mode=candidate,
            attention_kernel="math",
            fallback="; ".join(refusals) or None,
            relative_rounding=outcome.forms,
            product_rounding=outcome.products,
            checks=(*checks, *outcome.checks),
        )
    raise UnsoundError(
        "no autodiff mode gives this model's curvature",
        refusals[0],
        "the module named there in plain differentiable torch operations"
        if mode == "auto"
        else "--mode auto",
    )


def _candidates(problem: Problem, mode: str) -> list[Mode]:
    """The modes that may be taken, the cheapest first.

    Raises:
        UsageError: there is no such mode, or none that keeps as little as was asked for.
    """
    if mode not in ("auto", *MODES):
        raise UsageError("no such autodiff mode", repr(mode), f"auto, {', '.join(MODES)}")
    candidates = [known for known in MODES if mode in ("auto", known)]
    if problem.blocks:
        candidates = [known for known in candidates if known != "forward-over-reverse"]
        if not candidates:
            raise UsageError(
                "--checkpoint-activations is for products by passes back",
                "--mode forward-over-reverse, which keeps all on its one way",
                "--mode double-backward, or no --checkpoint-activations",
            )
    return candidates


def _samples(problem: Problem) -> tuple[Sample, Sample]:
    """Few examples and many, which are the same where that is all there are."""
    numbers = max(1, problem.precision.numbers)
    together = problem.at_once(numbers)
    many = Sample.of(problem, min(max(_NUMBERS // numbers, _FEWEST), _MANY), together)
    few = many if many.count <= _FEW else Sample.of(problem, _FEW, together)
    if few.count == many.count:  # whole batches, of which one may do for both
        few = many
    return few, many


def bias_of(operator: Curvature, on_step: OnStep = go_on) -> Bias | None:
    """What autocast does to an operator's products; None where there is none.

    Measured once for a matrix of a problem; the meter counts what was made before, too.
    """
    if operator.autocast is None:
        return None
    problem = operator.problem
    known = _BIASES.setdefault(problem, {})
    key = type(operator), operator.parameters.names, operator.mode
    if key not in known:
        numbers, before = max(1, problem.precision.numbers), operator.meter.gradients
        count = min(max(4 * _NUMBERS // numbers, _FEWEST), _BIASED)
        sample = Sample.of(problem, count, problem.at_once(numbers))
        found = measured(operator, sample, on_step)
        known[key] = found, operator.meter.gradients - before
    else:
        operator.meter.add(known[key][1])
    return known[key][0]


def _determinism(sample: Sample, meter: Meter) -> Check:
    """Loss and gradient twice on the same examples; equal but for the order of sums."""
    problem = sample.problem

    def once() -> tuple[float, list[Tensor]]:
        with problem.forward_context():
            value = sample.evaluate()
            return float(value.detach()), gradient(value, problem.parameters.tensors)

    (first, slope), (second, again) = once(), once()
    meter.add(2 * problem.gradient_cost, sample.share)
    apart = math.hypot(*(float((a - b).norm()) for a, b in zip(slope, again, strict=True)))
    length = math.hypot(*(float(part.norm()) for part in slope))
    difference = max(abs(first - second) / max(abs(first), 1e-30), apart / max(length, 1e-30))
    bound = tolerance(problem.dtype)
    if not difference <= bound:
        culprit = differing_module(problem.model, sample.evaluate, sample.evaluate, torch.equal)
        raise UnsoundError(
            "the loss is random",
            f"{first:.6g}, then {second:.6g} on the same examples"
            + (f"; {culprit} differs" if culprit else f"; look into the loss {problem.loss.name}"),
            "model.eval() (of a spec, training = false under [model]), or no random operation",
        )
    return Check(
        name="determinism",
        state="passed",
        detail="same loss and gradient twice",
        value=difference,
        bound=bound,
    )


def _gradient(sample: Sample, meter: Meter) -> Check:
    """Autograd's gradient against the loss, in float64 wherever that is to be had."""
    precision = sample.problem.precision
    try:
        if not precision.is_float64:
            return gradient_in_own_type(sample, precision.narrowest, meter)
        with doubled(sample.problem):
            return gradient_comparison(sample.problem, meter).check(sample)
    except MismatchError as mismatch:
        raise UnsoundError(
            "the gradient is not that of the loss",
            str(mismatch),
            "no .data, .detach(), torch.no_grad() or backward of another function on its path",
        ) from None


@dataclass(frozen=True)
class _Outcome:
    """A mode that passed, and its rounding where that is known.

    ``forms`` is the relative error of quadratic forms, ``products`` the length of a product's
    error beside the largest product with a unit vector.
    """

    checks: tuple[Check, ...]
    forms: float | None
    products: float | None


def _tested(mode: Mode, make: Make, few: Sample, many: Sample, on_step: OnStep) -> _Outcome:
    """What the checks of a mode say.

    Raises:
        MismatchError: it does not pass them, or the model does not run in it.
    """
    problem = few.problem
    try:
        return _test_of(problem, mode)(make, few, many, on_step)
    except (HesscliError, MismatchError):
        raise
    except Exception as error:  # the model ran before: whatever this is, it is the mode's
        if is_out_of_memory(error):
            raise
        raise MismatchError(f"{_obstacle(problem, mode)} ({first_line(error)})") from error


def _test_of(problem: Objective, mode: Mode) -> Callable[[Make, Sample, Sample, OnStep], _Outcome]:
    """The checks of one mode, in the types that the model computes in."""
    if not problem.precision.is_float64:
        return partial(_in_own_type, mode)
    return _by_differences if mode == "finite-difference" else _against_float64


def _against_float64(make: Make, few: Sample, many: Sample, on_step: OnStep) -> _Outcome:
    """Products in the problem's own type against float64, and float64 against truth."""
    problem = few.problem
    bias = bias_of(make(), on_step)
    own, largest = None, 0.0
    if bias is None and problem.dtype != torch.float64:
        own, largest = _with_largest(make(), few, on_step)
        on_step()
    with doubled(problem):
        operator = make()
        exact = Product(operator, few).with_signs()
        on_step()
        symmetry = check_symmetry(operator, few, exact.crossing, torch.float64)
        on_step()
        difference = product_comparison(operator, few, exact, on_step).check(many)
        head = check_head(operator, few, exact)
    forms, error = (0.0, 0.0) if own is None else _rounding(own, exact, largest)
    if bias is not None:
        forms, error = bias.forms, bias.products
    floor = max(_FLOOR, torch.finfo(problem.dtype).eps)  # a measurement may be small by chance
    checks = (symmetry, difference) if head is None else (symmetry, difference, head)
    return _Outcome(checks, max(forms, floor), max(error, floor))


def _rounding(own: Products, exact: Products, largest: float) -> tuple[float, float]:
    """Of forms, and of products beside the largest with a unit vector.

    Two errors of a standard deviation σ have a root mean square below σ/2 in 22% of all cases,
    below σ/4 in 6%: it is doubled.
    """
    forms = 2 * float((own.forms - exact.forms).norm() / exact.forms.norm().clamp_min(1e-300))
    # For signs v, ‖Ev‖² is ‖E‖² of Frobenius in the mean: no unit vector's product is off by more.
    errors = list(map(distance, own.values, exact.values))
    return forms, math.hypot(*errors) / math.sqrt(len(errors)) / max(largest, 1e-300)


def _with_largest(operator: Curvature, sample: Sample, on_step: OnStep) -> tuple[Products, float]:
    """Products, and the length of the largest with a unit vector: a step of the power method."""
    product = Product(operator, sample)
    found = product.with_signs()
    on_step()
    lengths = found.values.norm(dim=1)
    if not float(lengths[0]):
        return found, 0.0
    top = product(found.values[:1] / lengths[0])
    return found, max(float(top.norm()), float((lengths / found.vectors.norm(dim=1)).max()))


def _by_differences(make: Make, few: Sample, many: Sample, on_step: OnStep) -> _Outcome:
    """Differences in float64 only, whose error is what another step makes of them."""
    problem = few.problem
    with doubled(problem):
        operator = make()
        exact = Product(operator, few).with_signs()
        on_step()
        symmetry = check_symmetry(operator, few, exact.crossing, torch.float64)
        difference = product_comparison(operator, few, exact, on_step).check(many)
    error = max(difference.value or 0.0, _FLOOR)
    return _Outcome((symmetry, difference), error, error)


def _in_own_type(mode: Mode, make: Make, few: Sample, many: Sample, on_step: OnStep) -> _Outcome:
    """What can be seen of a model that does not compute in float64."""
    problem = few.problem
    precision = problem.precision.narrowest
    if mode == "finite-difference":
        raise MismatchError(f"central differences need float64: {problem.precision.why_narrow}")
    operator = make()
    crossing = Product(operator, few).crossing()
    on_step()
    symmetry = check_symmetry(operator, few, crossing, precision)
    difference = differences_in_own_type(make, many, precision, on_step)
    return _Outcome((symmetry, difference), None, None)


_ATTEMPTS: dict[Mode, Attempt] = {
    "double-backward": differentiate_twice,
    "forward-over-reverse": differentiate_forward,
    "finite-difference": differentiate,
}


def _obstacle(problem: Objective, mode: Mode) -> str:
    """The module that a mode does not get through; the loss where it is no module."""
    sample = problem.sample(2)
    with problem.forward_context():
        module = failing_module(
            problem.model, lambda: problem.evaluate(sample.data), _ATTEMPTS[mode]
        )
    return module or f"the loss {problem.loss.name}"


# -- What the test of independent examples found, as a check ---------------------------------------


def check_independence(problem: Problem, make: type[Curvature]) -> Check:
    """What was found when the data was frozen.

    Raises:
        UsageError: examples are mixed, and the operator is made of per-example gradients.
    """
    found = problem.independence
    if found.unseen is not None:
        return _check("not applicable", f"{found.unseen}: the batch is the unit")
    if found.mixes is None:
        detail = "an example's output and loss do not depend on its batch"
        return _check("passed", detail, found.change, found.bound)
    if make.per_example:
        raise UsageError(
            "per-example gradients do not exist here",
            f"{found.mixes} mixes the examples of a batch",
            "--matrix ggn or hessian",
        )
    told = f"{found.mixes} mixes them: the batch is the unit"
    return _check("not applicable", told, found.change, found.bound)


def _check(
    state: CheckState, detail: str, value: float = math.inf, bound: float | None = None
) -> Check:
    known = math.isfinite(value)
    return Check(
        name="independent examples",
        state=state,
        detail=detail,
        value=value if known else None,
        bound=bound if known else None,
    )
