"""(F̂ + λI) y = x, how well y solves it, and conjugate gradients where that is not enough."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.diagnostics.clock import Clock
from hesscli.engines.conjugate_gradients import ConjugateGradients
from hesscli.engines.mfac import StaticFisher
from hesscli.operators.base import Operator
from hesscli.results import Refinement, ResidualReport


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
