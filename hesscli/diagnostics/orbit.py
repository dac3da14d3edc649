"""How much of sharpness is a matter of scale: it is measured again where the loss is the same.

Along a symmetry that scales entries, θ ↦ Λθ with the loss unchanged, the Hessian becomes
Λ⁻¹ H Λ⁻¹: its trace and its eigenvalues can be made as large or as small as one likes. D H D, with
D the diagonal matrix of the weights, stays what it is, and so do its trace Σ θᵢ² ∂²L/∂θᵢ² and its
largest eigenvalue (Tsuzuku, Sato, Sugiyama, ICML 2020; Kwon et al., ICML 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from scipy.special import stdtrit
from torch import Tensor

from hesscli.engines.lanczos import Lanczos
from hesscli.engines.symmetry.families import Family, Scaling, signs
from hesscli.operators.base import LiveTerm, Operator
from hesscli.problem.forward import written
from hesscli.problem.objective import WeightedBatch
from hesscli.results import Orbit, OrbitPoint

PROBES, STEPS, POINTS = 4, 5, 3
"""Quadratic forms of a trace, steps to an eigenvalue, and transformations besides none."""
PRODUCTS = 2 * (PROBES + STEPS)
"""At each point."""
_SPREAD = 1.5
"""Standard deviation of the logarithm of a factor."""
_SURE = 0.975

Measured = tuple[float, ...]
"""The fields of a point, in their order."""


def can_be_rescaled(families: Sequence[Family]) -> list[Scaling]:
    """Those of some families that scale."""
    return [family for family in families if isinstance(family, Scaling)]


def measured(
    operator: Operator, batch: WeightedBatch, families: Sequence[Scaling], number: int, seed: int
) -> Measured:
    """What a batch has after one transformation; the first is none.

    The same random vectors are used for all, so that what is invariant is so to rounding. Bars of
    traces are half-widths of 95% intervals, by Student's t over the probes; those of eigenvalues
    the residuals of Ritz pairs.
    """
    problem, parameters = operator.problem, operator.parameters
    theta = parameters.flatten([t.detach().double().cpu() for t in parameters.tensors])
    generator = torch.Generator().manual_seed(seed)
    probes = signs((PROBES, len(theta)), generator)
    generator.manual_seed(seed + number)
    for family in families if number else ():
        theta = family.moved(family.draw(generator, _SPREAD), theta)
    block = torch.cat([probes, probes * theta])
    parts = parameters.split(theta.to(problem.device, problem.dtype))
    with written(parameters.tensors, parts):
        loss = float(problem.evaluate(batch.data).detach())
        term = LiveTerm(batch, operator)

        def product(rows: Tensor) -> Tensor:
            return term.apply(rows.to(problem.device, problem.dtype)).double().cpu()

        forms = (block * product(block)).sum(1).view(2, PROBES)
        plain = _largest(lambda row: product(row[None])[0], len(theta), seed)
        scaled = _largest(lambda row: theta * product((theta * row)[None])[0], len(theta), seed)
    sure = float(stdtrit(PROBES - 1, _SURE)) / math.sqrt(PROBES)
    traces = forms.mean(1).tolist(), (sure * forms.std(1)).tolist()
    return loss, *traces[0], *traces[1], plain[0], scaled[0], plain[1], scaled[1]


def _largest(product: Callable[[Tensor], Tensor], size: int, seed: int) -> tuple[float, float]:
    """The largest Ritz value, and its residual."""
    lanczos = Lanczos(product, size, seed=seed, reserve=STEPS + 1)
    for _ in range(STEPS):
        lanczos.step()
    ritz = lanczos.ritz()
    return float(ritz.values[-1]), float(ritz.residuals[-1])


def report(found: Sequence[Measured], examples: int) -> Orbit | None:
    """What is said of an orbit, if there is one."""
    if len(found) < 2:
        return None
    names = OrbitPoint.__dataclass_fields__
    points = tuple(OrbitPoint(**dict(zip(names, each, strict=True))) for each in found)
    return Orbit(probes=PROBES, steps=STEPS, examples=examples, points=points)
