"""Where diag H = diag G exactly: parameters on whose diagonal entries R = H − G is zero.

The claim is made for one parameter tensor at a time and needs two things that fail in different
ways: a proof that the model's outputs are piecewise linear in it alone, on the graph of every
batch, since a model may choose its path by its data; and a probe of R itself that finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from hesscli import streams
from hesscli.errors import UsageError
from hesscli.operators.base import Operator
from hesscli.operators.hessian import Hessian
from hesscli.operators.linearity import bends, normalisation
from hesscli.operators.recording import recorded
from hesscli.operators.residual import Residual
from hesscli.parameters import Parameters
from hesscli.problem.classification import CrossEntropy
from hesscli.problem.precision import doubled, tolerance
from hesscli.problem.problem import Problem, WeightedBatch
from hesscli.results import Mode

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
        """Whether it is proven."""
        return self.reason is None


def exact_parameters(
    problem: Problem, parameters: Parameters | None = None, *, mode: Mode = "double-backward"
) -> tuple[Exactness, ...]:
    """For each parameter whether R's diagonal is exactly zero on it.

    Costs one forward pass over the data, and a product on a few examples for each claim.

    Args:
        problem: model, loss and examples.
        parameters: which to look at; default all trainable ones.
        mode: autodiff mode of the products.
    """
    parameters = problem.parameters if parameters is None else parameters
    reasons: dict[str, str] = {}
    try:
        residual = Residual(problem, parameters=parameters, mode=mode)
        residual.slope(problem.sample(_SAMPLE))
    except UsageError as error:
        reasons = dict.fromkeys(parameters.names, error.got)
    for batch in problem.batches():
        if not (left := _without(parameters, reasons)):
            break
        reasons |= _bends(problem, left, batch)
    if left := _without(parameters, reasons):
        reasons |= _found(residual, left)
    return tuple(Exactness(name, reasons.get(name)) for name in parameters.names)


def within_parameters(
    residual: Residual,
    parameters: Iterable[int],
    sample: WeightedBatch,
    beside: Operator | None = None,
) -> Iterator[float]:
    """|vᵀRv| / (‖v‖ ‖Bv‖) for a Gaussian v on each of some parameters alone.

    Signs would not do: on f = (a² − b²) x they cancel. B is the matrix ``beside``, by default R.
    """
    selection, problem = residual.parameters, residual.problem
    with problem.forward_context():
        apply = residual.live(sample)
        measure = apply if beside is None else beside.live(sample)
        for index in parameters:
            vector = torch.zeros(selection.size, dtype=problem.dtype, device=problem.device)
            part = selection.split(vector)[index].view(-1)
            stream = streams.key(_PROBE, index)
            part.copy_(streams.gaussian(stream, 0, len(part), dtype=part.dtype, device=part.device))
            product = apply(vector[None])[0]
            form = abs(float(vector @ product))
            size = product if beside is None else measure(vector[None])[0]
            yield form / float(vector.norm() * size.norm()) if form else 0.0


def _found(residual: Residual, claims: Parameters) -> dict[str, str]:
    """The claims on which a probe finds something."""
    problem = residual.problem
    indices = [residual.parameters.names.index(name) for name in claims.names]
    precision = problem.precision
    with doubled(problem) if precision.is_float64 else nullcontext():
        sample, bound = problem.sample(_SAMPLE), tolerance(precision.narrowest)
        forms = dict(zip(indices, within_parameters(residual, indices, sample), strict=True))
        left = [index for index, form in forms.items() if not form <= bound]
        if left:  # where R cancels as a whole, what is left of it is rounding beside H
            whole = Hessian(problem, parameters=residual.parameters, mode=residual.mode)
            beside = within_parameters(residual, left, sample, whole)
            left = [i for i, form in zip(left, beside, strict=True) if not form <= bound]
        names = residual.parameters.names
        return {names[i]: f"a probe found {forms[i]:.1e} of R on it" for i in left}


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
