"""How much of a trace is a matter of scale: it is measured again where the loss is the same.

Along a symmetry that scales entries, θ ↦ Λθ with the loss unchanged, the Hessian becomes
Λ⁻¹ H Λ⁻¹: its trace and its eigenvalues can be made as large or as small as one likes. D H D, with
D the diagonal matrix of the weights, stays what it is, and so does its trace Σ θᵢ² ∂²L/∂θᵢ²
(Tsuzuku, Sato, Sugiyama, ICML 2020; Kwon et al., ICML 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.special import stdtrit

from hesscli.engines.symmetry.families import Family, Scaling
from hesscli.operators.base import LiveTerm, Operator
from hesscli.problem.forward import written
from hesscli.problem.objective import WeightedBatch
from hesscli.results import Orbit, OrbitPoint

PROBES, POINTS = 4, 8
"""Quadratic forms of a trace, and transformations besides none."""
_SPREAD = 1.0
"""Standard deviation of the logarithm of a factor."""
_SURE = 0.975

Measured = tuple[float, float, float, float, float]


def can_be_rescaled(families: Sequence[Family]) -> list[Scaling]:
    """Those of some families that scale."""
    return [family for family in families if isinstance(family, Scaling)]


def measured(
    operator: Operator, batch: WeightedBatch, families: Sequence[Scaling], number: int, seed: int
) -> Measured:
    """Loss, trace and its companion on a batch after one transformation; the first is none.

    The same random signs are used for all, so that what is invariant is so to rounding. The last
    two are the half-widths of 95% intervals, by Student's t over the probes.
    """
    problem, parameters = operator.problem, operator.parameters
    theta = parameters.flatten([t.detach().double().cpu() for t in parameters.tensors])
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(0, 2, (PROBES, len(theta)), generator=generator).double() - 1
    generator.manual_seed(seed + number)
    for family in families if number else ():
        theta = family.moved(family.draw(generator, _SPREAD), theta)
    block = torch.cat([signs, signs * theta])
    parts = parameters.split(theta.to(problem.device, problem.dtype))
    with written(parameters.tensors, parts):
        loss = float(problem.evaluate(batch.data).detach())
        placed = block.to(problem.device, problem.dtype)
        products = LiveTerm(batch, operator).apply(placed).double().cpu()
    forms = (block * products).sum(1).view(2, PROBES)
    trace, companion = forms.mean(1).tolist()
    sure = float(stdtrit(PROBES - 1, _SURE)) / math.sqrt(PROBES)
    return loss, trace, companion, *(sure * forms.std(1)).tolist()


def report(found: Sequence[Measured], examples: int) -> Orbit | None:
    """What is said of an orbit, if there is one."""
    if len(found) < 2:
        return None
    points = (
        OrbitPoint(loss=a, trace=b, companion=c, trace_error=d, companion_error=e)
        for a, b, c, d, e in found
    )
    return Orbit(probes=PROBES, examples=examples, points=tuple(points))
