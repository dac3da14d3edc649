"""Whether the curvature of a user's own loss in the model's outputs is what autograd says."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from hesscli import streams
from hesscli.errors import HesscliError, UsageError
from hesscli.operators.residual import Residual
from hesscli.problem.blame import is_out_of_memory
from hesscli.problem.output_hessian import OutputHessian, has_closed_form
from hesscli.problem.precision import doubled
from hesscli.problem.problem import Problem, WeightedBatch

_SAMPLE = 8
_STREAM = 0xC0DE
"""Separates the directions from other streams."""
_ATTEMPTS = ((False, 1.0), (True, 1.0), (True, 1e-3))
"""Whether a step is relative to each output, and of which length: one may cross a kink, or leave
the loss's domain, without saying anything of its derivatives. The last is for float64 alone."""


def require_output_hessian(problem: Problem) -> None:
    """Refuse to split a loss that is no sum of functions of single examples' outputs.

    Named losses are such by construction. That of a loss of the user's own is differentiated, so
    that it must not read the parameters otherwise, an example's slope must not depend on the
    outputs of others, and the second derivative must be that of the first.

    Raises:
        UsageError: it is another function, or its second derivative is wrong or missing.
    """
    if has_closed_form(problem.loss):
        return
    Residual(problem).slope(problem.sample(_SAMPLE))
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
    flat = streams.gaussian(
        streams.key(_STREAM, number), 0, like.numel(), dtype=like.dtype, device=like.device
    )
    return flat.view(like.shape)


def _unknown(problem: Problem, reason: str) -> UsageError:
    return UsageError(
        "the loss's Hessian in the model's outputs is not known",
        f"the loss {problem.loss.name}: {reason}",
        "the Hessian as a whole: --method hutchinson",
    )
