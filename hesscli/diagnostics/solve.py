"""(F̂ + λI) y = x: how well y solves it, conjugate gradients, and other dampings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from hesscli.diagnostics.run import Clock
from hesscli.diagnostics.saliency import rank_correlation, saliencies
from hesscli.diagnostics.window import Collected
from hesscli.engines.conjugate_gradients import ConjugateGradients
from hesscli.engines.mfac import Gram, StaticFisher
from hesscli.operators.base import Operator
from hesscli.results import DampingPoint, Refinement, ResidualReport

# -- (F̂ + λI) y = x, how well y solves it, and conjugate gradients where that is not enough -------


@dataclass(frozen=True)
class Solved:
    """y, float64 ``(d,)``, with its certificate."""

    direction: Tensor
    residual: ResidualReport
    refinement: Refinement | None


def solve(
    operator: Operator,
    fisher: StaticFisher,
    right: Tensor,
    refine: float | None,
    clock: Clock,
) -> Solved:
    """Solve with the window, and by conjugate gradients with the operator where that is asked.

    Args:
        operator: the matrix that the user cares about.
        fisher: the window's matrix, damped.
        right: x ``(d,)``.
        refine: relative residual against operator + λI to come down to; None to leave y as the
            window has it.
        clock: the time limit, and whom to tell.

    Raises:
        UnsoundError: a product is not finite.
    """
    right = right.double()
    direction, solver = fisher.ihvp(right).vector.double(), None

    def damped(vector: Tensor) -> Tensor:
        return operator.apply(vector[None])[0] + fisher.damping * vector

    if refine is not None:
        solver = ConjugateGradients(
            damped,
            right,
            precondition=lambda r: fisher.ihvp(r).vector.double(),
            dtype=operator.problem.dtype,
        )
        while not (solver.done or solver.residual <= refine or clock.out_of_time):
            solver.step()
            clock.tell("refining", done=float(solver.iterations), estimate=solver.residual)
        # Where the matrix curves down, no step may have come nearer than y = 0, which is no answer.
        direction = solver.solution if solver.residual < 1 else direction
    left = relative_residual(damped(direction), right)
    residual = ResidualReport(
        window=relative_residual(fisher.multiply(direction), right),
        operator=left,
        operator_name=operator.name,
    )
    if solver is None or refine is None:
        return Solved(direction, residual, None)
    found = left or 0.0
    refinement = Refinement(
        tolerance=refine,
        iterations=solver.iterations,
        residual=found,
        converged=found <= refine,
        negative_curvature=solver.negative_curvature,
    )
    return Solved(direction, residual, refinement)


def relative_residual(image: Tensor, right: Tensor) -> float | None:
    """‖Ay − x‖ / ‖x‖; None where x is zero."""
    size = float(torch.linalg.vector_norm(right))
    return float(torch.linalg.vector_norm(image - right)) / size if size else None


# -- What different dampings make of a window: how much is data, and how much is λ -----------------


RELATIVE = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_MOST_DIRECTIONS = 1 << 28
"""Numbers in the solutions that are held at once."""


@dataclass(frozen=True)
class _Solution:
    point: DampingPoint
    direction: Tensor


def sweep(
    operator: Operator, collected: Collected, weights: Tensor, right: Tensor, clock: Clock
) -> tuple[DampingPoint, ...]:
    """One point for each damping, the largest first; none where the gradients are all zero.

    Args:
        operator: the matrix that the user cares about: one product a damping.
        collected: the window.
        weights: ``(d,)``, for their saliencies.
        right: x ``(d,)``.
        clock: whom to tell.
    """
    if not collected.damping_unit or len(RELATIVE) * len(weights) > _MOST_DIRECTIONS:
        return ()
    own = saliencies(weights, collected.fisher.diagonal())
    found: list[_Solution] = []
    for relative in RELATIVE:
        clock.tell("inverting", done=float(len(found)), total=float(len(RELATIVE)))
        found.append(_at(relative, collected, weights, right.double(), own))
    directions = torch.stack([one.direction for one in found])
    images = operator.apply(directions)
    cosines = [*(_cosine(a, b) for a, b in pairwise(directions)), None]
    shares = _span_shares(collected, directions)
    return tuple(
        replace(
            one.point,
            span_share=share,
            cosine=cosine,
            operator_residual=relative_residual(
                image + one.point.absolute * one.direction, right.double()
            ),
        )
        for one, image, cosine, share in zip(found, images, cosines, shares, strict=True)
    )


def _at(
    relative: float, collected: Collected, weights: Tensor, right: Tensor, own: Tensor
) -> _Solution:
    damping = relative * collected.damping_unit
    fisher = collected.fisher.with_damping(damping)
    diagonal = fisher.diagonal()
    point = DampingPoint(
        relative=relative,
        absolute=damping,
        span_share=None,
        cosine=None,
        leverage=float((1 - damping * diagonal).median()),
        rank_correlation=rank_correlation(saliencies(weights, diagonal), own),
        operator_residual=None,
    )
    return _Solution(point, fisher.ihvp(right).vector.double())


def _span_shares(collected: Collected, directions: Tensor) -> Sequence[float | None]:
    """‖P y‖ / ‖y‖ with P the projection to the span of the window's rows."""
    window = collected.window
    values, vectors = torch.linalg.eigh(Gram(window).matrix)
    kept = values > len(values) * torch.finfo(torch.float32).eps * values[-1]
    inside = (
        window.project(directions, slice(0, window.size), torch.float64)
        @ vectors[:, kept]
        / values[kept].sqrt()
    )
    sizes = torch.linalg.vector_norm(directions, dim=1)
    shares = torch.linalg.vector_norm(inside, dim=1) / sizes
    return [
        min(share, 1.0) if size else None
        for share, size in zip(shares.tolist(), sizes.tolist(), strict=True)
    ]


def _cosine(one: Tensor, other: Tensor) -> float | None:
    sizes = torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other)
    return float(one @ other / sizes) if sizes else None
