"""Where diag H = diag G exactly, and whether a user's loss has the curvature that autograd says.

The claim is made for one parameter tensor at a time and needs two things that fail in different
ways: a proof that the model's outputs are piecewise linear in it alone, on the graph of every
batch, since a model may choose its path by its data; and a probe of R itself that finds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hesscli import randomness, world
from hesscli.errors import HesscliError, UsageError
from hesscli.memory import is_out_of_memory
from hesscli.meter import FORWARD, Meter, OnStep, go_on
from hesscli.operators.base import Operator
from hesscli.operators.hessian import Hessian, Residual
from hesscli.operators.kernels import only, twice_differentiable
from hesscli.operators.linearity import bends, normalisation, recorded
from hesscli.operators.products import flatten, gradient, unflatten, vector_jacobian
from hesscli.parameters import Parameters
from hesscli.problem.named_losses import CrossEntropy
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.output_hessian import OutputHessian, has_closed_form
from hesscli.problem.precision import doubled, tolerance
from hesscli.problem.problem import Problem
from hesscli.vocabulary import Mode

# -- Where diag H = diag G exactly: parameters on whose diagonal entries R = H − G is zero ---------


_SAMPLE = 8
_PROBE = 0x0E5D
"""Separates these probes from other streams."""


@dataclass(frozen=True)
class Exactness:
    """Whether the diagonal of H is that of G on a parameter's entries, and if not, why.

    ``reason`` is None where it is: "gelu in blocks.0.mlp" or what else stands in the way.
    """

    name: str
    reason: str | None

    @property
    def exact(self) -> bool:
        """Whether it is proven that the diagonal is exact there."""
        return self.reason is None


def exact_parameters(
    problem: Problem,
    parameters: Parameters | None = None,
    *,
    mode: Mode = "double-backward",
    meter: Meter | None = None,
    on_step: OnStep = go_on,
) -> tuple[Exactness, ...]:
    """For each parameter whether R's diagonal is exactly zero on it.

    Costs one forward pass over the data, and on a few examples a graph, for each claim a product
    with the parameter's own block of R, and two with all of R and H where that is not zero.

    Args:
        problem: model, loss and examples.
        parameters: which to look at; default all trainable ones.
        mode: autodiff mode of the products.
        meter: counts the work; default a new one.
        on_step: called after each batch and each product; may raise to end it.
    """
    parameters = problem.parameters if parameters is None else parameters
    meter = Meter() if meter is None else meter
    reasons: dict[str, str] = {}
    try:
        residual = Residual(problem, parameters=parameters, mode=mode, meter=meter)
        sample = problem.sample(_SAMPLE)
        residual.slope(sample)
        meter.add(FORWARD, problem.share_of(sample.count))
    except UsageError as error:
        reasons = dict.fromkeys(parameters.names, error.got)
    for turn in world.turns(problem.joint()):
        if not (left := _without(parameters, reasons)):
            break
        with meter.pooled():
            found, group = dict[str, str](), world.own(turn)
            with world.apart():
                if group is not None:
                    batch = problem.batch(*group)
                    found = _bends(problem, left, batch)
                    meter.add(FORWARD, problem.share_of(batch.count))
            for each in reversed(world.gathered(found)):  # the first batch's reason counts
                reasons |= each
        on_step()
    if left := _without(parameters, reasons):
        reasons |= _found(residual, left, on_step)
    return tuple(Exactness(name, reasons.get(name)) for name in parameters.names)


def may_be_exact(problem: Problem, meter: Meter) -> bool:
    """Whether a few examples let it be so for all parameters, which is not proven by that."""
    sample = problem.sample(_SAMPLE)
    meter.add(FORWARD, problem.share_of(sample.count))
    return not _bends(problem, problem.parameters, sample)


Group = Sequence[int]
"""Parameters by their places."""
_PROBED = 3.0
"""Vectors that are made for a form: signs, all of a group's, and their product."""
_OWN = 0.5
"""Of the way back to a group: no other weights' gradients are made, nor what is zero."""


def own_forms(
    residual: Residual, groups: Sequence[Group], sample: WeightedBatch
) -> Iterator[float]:
    """|vᵀRv| for a random v on each of some groups of parameters alone.

    Of the gradient's graph, which serves all of them, only a group's own part is differentiated,
    and by its parameters alone.
    """
    tensors, share = residual.parameters.tensors, residual.problem.share_of(sample.count)
    ways = residual.problem.ways_back([[tensors[index] for index in group] for group in groups])
    with residual.problem.forward_context():
        apply = _own_products(residual, sample)
        residual.meter.add(residual.cost[0], share)
        for group, way in zip(groups, ways, strict=True):
            vector = torch.cat([_probe(residual, index) for index in group])
            form = abs(float(vector @ apply(group, vector)))
            residual.meter.add(_OWN * way, share)
            residual.meter.add(residual.problem.vectors(_PROBED, size=len(vector)))
            yield form


def _own_products(residual: Residual, sample: WeightedBatch) -> Callable[[Group, Tensor], Tensor]:
    """Products with the diagonal block of some parameters on some examples."""
    if residual.mode != "double-backward":

        def alone(group: Group, vector: Tensor) -> Tensor:
            block = residual.block(Parameters(residual.parameters[index] for index in group))
            return block.live(sample)(vector[None])[0]

        return alone
    function, tensors = residual.parts(sample)
    with twice_differentiable():
        graph = gradient(function(None), tensors, create_graph=True)

    def product(group: Group, vector: Tensor) -> Tensor:
        own, by = [graph[index] for index in group], [tensors[index] for index in group]
        with twice_differentiable(), only(by):
            return flatten(vector_jacobian(own, by, unflatten(vector, by)))

    return product


def _probe(residual: Residual, index: int) -> Tensor:
    """Of one parameter, entries of different sizes: on f = (a² − b²) x equal ones cancel."""
    problem, size = residual.problem, residual.parameters[index].numel
    return randomness.at(
        [(0, size)],
        randomness.uneven,
        randomness.key(_PROBE, index),
        dtype=problem.dtype,
        device=problem.device,
    )


def within_parameters(
    residual: Residual,
    parameters: Iterable[int],
    sample: WeightedBatch,
    beside: Operator | None = None,
) -> Iterator[float]:
    """|vᵀRv| / (‖v‖ ‖Bv‖) for a random v on each of some parameters alone.

    B is the matrix ``beside``, by default R.
    """
    selection, problem = residual.parameters, residual.problem
    share = problem.share_of(sample.count)
    operators = [residual] if beside is None else [residual, beside]
    with problem.forward_context():
        applies = [operator.live(sample) for operator in operators]
        residual.meter.add(sum(operator.cost[0] for operator in operators), share)
        for index in parameters:
            vector = torch.zeros(selection.size, dtype=problem.dtype, device=problem.device)
            selection.split(vector)[index].view(-1).copy_(_probe(residual, index))
            product, *others = (apply(vector[None])[0] for apply in applies)
            residual.meter.add(sum(operator.cost[1] for operator in operators), share)
            size = others[0] if others else product
            form = abs(float(vector @ product))
            yield form / float(vector.norm() * size.norm()) if form else 0.0


def _found(residual: Residual, claims: Parameters, on_step: OnStep) -> dict[str, str]:
    """The claims on which a probe finds something."""
    problem, left = residual.problem, _not_zero(residual, claims, on_step)
    precision = problem.precision
    if not left:
        return {}
    with doubled(problem) if precision.is_float64 else nullcontext():
        sample, bound = problem.sample(_SAMPLE), tolerance(precision.narrowest)
        found = _above(bound, left, within_parameters(residual, left, sample), on_step)
        if left := list(found):  # where R cancels as a whole, what is left is rounding beside H
            whole = Hessian(problem, parameters=residual.parameters, mode=residual.mode)
            beside = within_parameters(residual, left, sample, whole)
            left = list(_above(bound, left, beside, on_step))
        names = residual.parameters.names
        return {names[i]: f"a probe found {found[i]:.1e} of R on it" for i in left}


def _not_zero(residual: Residual, claims: Parameters, on_step: OnStep) -> list[int]:
    """The claims whose form is not exactly zero: by layers, and one by one where a layer's is not.

    What no path of the graph leads to is zero in any type, so that the model's own will do, but
    for slopes that are too small for it.
    """
    problem = residual.problem
    place = {name: index for index, name in enumerate(residual.parameters.names)}
    groups = [tuple(place[p.name] for p in claims.in_layer(layer)) for layer in claims.layers]
    has_slope = bool(residual.slope(problem.sample(_SAMPLE)).any())
    is_wider = problem.precision.is_float64 and not has_slope
    with doubled(problem) if is_wider else nullcontext():
        sample = problem.sample(_SAMPLE)
        found = _above(0.0, groups, own_forms(residual, groups, sample), on_step)
        left = [index for group in found for index in group]
        if len(left) == len(found):
            return left
        alone = [(index,) for index in left]
        return [i for (i,) in _above(0.0, alone, own_forms(residual, alone, sample), on_step)]


K = TypeVar("K", bound=Hashable)


def _above(
    bound: float, indices: Sequence[K], forms: Iterator[float], on_step: OnStep
) -> dict[K, float]:
    """What has a quadratic form above a bound, NaN included."""
    found = {}
    for index, form in zip(indices, forms, strict=True):
        if not form <= bound:
            found[index] = form
        on_step()
    return found


def _bends(problem: Problem, parameters: Parameters, batch: WeightedBatch) -> dict[str, str]:
    """The parameters that the outputs of a batch may be curved in, and by what."""
    with recorded(problem.model) as recording:
        outputs = problem.outputs(batch.data)
    natural = problem.loss.natural.unscaled
    # The slope of a cross-entropy sums to zero over the classes.
    dim = natural.class_dim(outputs) if isinstance(natural, CrossEntropy) else None
    straight = () if dim is None else normalisation(outputs, dim)
    found = bends(outputs, parameters.tensors, recording, straight)
    return {parameters.names[index]: reason for index, reason in found.items()}


def _without(parameters: Parameters, reasons: dict[str, str]) -> Parameters:
    return Parameters(p for p in parameters if p.name not in reasons)


# -- Whether the curvature of a user's own loss in the model's outputs is what autograd says -------


_STREAM = 0xC0DE
"""Separates the directions from other streams."""
_ATTEMPTS = ((False, 1.0), (True, 1.0), (True, 1e-3))
"""Whether a step is relative to each output, and of which length: one may cross a kink, or leave
the loss's domain, without saying anything of its derivatives. The last is for float64 alone."""


def require_output_hessian(problem: Problem, meter: Meter | None = None) -> None:
    """Refuse to split a loss that is no sum of functions of single examples' outputs.

    Named losses are such by construction. That of a loss of the user's own is differentiated, so
    that it must not read the parameters otherwise, an example's slope must not depend on the
    outputs of others, and the second derivative must be that of the first.

    Args:
        problem: model, loss and examples.
        meter: counts the work; default a new one.

    Raises:
        UsageError: it is another function, or its second derivative is wrong or missing.
    """
    if has_closed_form(problem.loss):
        return
    sample = problem.sample(_SAMPLE)
    Residual(problem).slope(sample)
    if meter is not None:
        meter.add(2 * FORWARD, problem.share_of(sample.count))
    is_double = problem.precision.is_float64
    with doubled(problem) if is_double else nullcontext(), problem.forward_context():
        sample = problem.sample(_SAMPLE)
        hessian = OutputHessian(problem.loss, problem.fixed_outputs(sample.data), sample.data)
        if _mixes(hessian):
            raise _unknown(problem, "an example's slope depends on the outputs of others")
        eps = float(torch.finfo(problem.precision.narrowest).eps)
        steps = [(relative, length * math.cbrt(eps)) for relative, length in _ATTEMPTS]
        tried = steps if is_double else steps[:2]
        if not any(_agrees(problem, sample, hessian, *step, eps) for step in tried):
            raise _unknown(problem, "its second derivative is not that of its first")


def _mixes(hessian: OutputHessian) -> bool:
    """Whether products with some examples' outputs reach the rows of others."""
    vector = _normal(hessian.slope, 0)
    half = len(vector) // 2
    vector[half:] = 0
    product = hessian @ vector
    size, beyond = float(product.norm()), float(product[half:].norm())
    return beyond > math.sqrt(torch.finfo(product.dtype).eps) * size


def _agrees(
    problem: Problem,
    sample: WeightedBatch,
    hessian: OutputHessian,
    relative: bool,
    step: float,
    eps: float,
) -> bool:
    """Whether A v is a central difference of the slope, on the outputs that the loss reads."""
    outputs, slope = hessian.outputs.detach(), hessian.slope.detach()
    vector = _normal(slope, 1)
    vector *= outputs.abs() if relative else outputs.square().mean().sqrt() + eps
    vector *= (slope != 0) | ((hessian @ _normal(slope, 2)) != 0)
    product = hessian @ vector
    try:
        ahead, behind = (
            OutputHessian(problem.loss, outputs + side * step * vector, sample.data).slope.detach()
            for side in (1, -1)
        )
    except HesscliError:
        raise
    except Exception as error:  # of any kind: outputs that the loss does not take
        if is_out_of_memory(error):
            raise
        return False
    difference = (ahead - behind) / (2 * step)
    allowed = 100 * math.cbrt(eps) ** 2 * max(float(product.norm()), float(difference.norm()))
    rounding = 100 * eps / step * float(slope.norm())
    return float((product - difference).norm()) <= allowed + rounding


def _normal(like: Tensor, number: int) -> Tensor:
    flat = randomness.gaussian(
        randomness.key(_STREAM, number), 0, like.numel(), dtype=like.dtype, device=like.device
    )
    return flat.view(like.shape)


def _unknown(problem: Problem, reason: str) -> UsageError:
    return UsageError(
        "the loss's Hessian in the model's outputs is not known",
        f"the loss {problem.loss.name}: {reason}",
        "the Hessian as a whole: --method hutchinson",
    )
