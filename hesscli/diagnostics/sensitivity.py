"""Which weights and layers matter: saliency, leverage, and what pruning and rounding do."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesscli.diagnostics.clock import Clock
from hesscli.diagnostics.collecting import WindowOptions, collect
from hesscli.diagnostics.opening import opened
from hesscli.diagnostics.sensitivities import report
from hesscli.diagnostics.solving import solve
from hesscli.diagnostics.study import Study
from hesscli.errors import UsageError
from hesscli.problem.problem import Problem
from hesscli.results import IhvpRun, Observe

Array = NDArray[np.float64]


def sensitivity(
    problem: Problem,
    *,
    matrix: str = "hessian",
    window: WindowOptions | None = None,
    rtol: float = 0.2,
    budget: float | None = 600.0,
    refine: float | None = None,
    verify: bool = False,
    seed: int = 0,
    mode: str = "auto",
    observe: Observe | None = None,
) -> IhvpRun:
    """Which weights and layers matter, and what pruning or rounding a layer does to the loss.

    Args:
        problem: model, loss and frozen examples.
        matrix: whose quadratic form predicts losses, and against which residuals are taken:
            ``hessian``, ``ggn``, ``fisher`` or ``empirical-fisher``.
        window: which gradients stand for the matrix that is inverted.
        rtol: two standard errors of a prediction beside |linear| + |quadratic|: batches are seen
            until all predictions have it.
        budget: seconds; None for no limit.
        refine: relative residual to which conjugate gradients solve for the gradient.
        verify: measure the loss with each change applied.
        seed: of sampled rows.
        mode: autodiff mode; ``auto`` takes the cheapest that passes the preflight.
        observe: told how far the run is; returning True ends it at its result so far.

    Raises:
        UsageError: rows, blocks or a window that cannot be, or a matrix that there is not.
        UnsoundError: the problem's curvature would mean nothing, or all gradients are zero.
        KeyboardInterrupt: stopped before there was a result.
    """
    clock, options = Clock(budget, observe), window or WindowOptions()
    with options.empty(problem) as empty, opened(problem, matrix, mode, clock) as opening:
        right = problem.prove().gradient
        collected = collect(problem, empty, options, seed, clock)
        solved = solve(opening.operator, collected.fisher, right, refine, clock)
        study = Study(opening, collected, right, solved, clock)
        study.run(rtol, verify, seed)
        return report(study, "gradient", seed)


def ihvp(
    problem: Problem,
    vector: Tensor | Array | None = None,
    *,
    matrix: str = "hessian",
    window: WindowOptions | None = None,
    budget: float | None = 600.0,
    refine: float | None = None,
    seed: int = 0,
    mode: str = "auto",
    source: str = "vector",
    observe: Observe | None = None,
) -> IhvpRun:
    """Y with (F̂ + λI) y = x, and its residuals against F̂ and against the matrix itself.

    Args:
        problem: model, loss and frozen examples.
        vector: x ``(d,)``; None for the gradient of the loss.
        source: what the report calls it.
        matrix: as for :func:`sensitivity`, and so the other arguments.
        window: which gradients stand for the matrix.
        budget: seconds; None for no limit.
        refine: relative residual to which conjugate gradients solve with matrix + λI.
        seed: of sampled rows.
        mode: autodiff mode.
        observe: told how far the run is.

    Returns:
        A result without layers; ``direction`` holds y by parameter.

    Raises:
        UsageError: a vector of another length, and as for :func:`sensitivity`.
        UnsoundError: as for :func:`sensitivity`.
        KeyboardInterrupt: the observer wanted no more.
    """
    clock, options = Clock(budget, observe), window or WindowOptions()
    given = None if vector is None else _checked(problem, vector)
    with options.empty(problem) as empty, opened(problem, matrix, mode, clock) as opening:
        right = problem.prove().gradient if given is None else given
        collected = collect(problem, empty, options, seed, clock)
        solved = solve(opening.operator, collected.fisher, right, refine, clock)
        study = Study(opening, collected, right, solved, clock)
        study.solve_only()
        return report(study, "gradient" if given is None else source, seed)


def _checked(problem: Problem, vector: Tensor | Array) -> Tensor:
    tensor = torch.as_tensor(vector, dtype=torch.float64, device=problem.device)
    if tuple(tensor.shape) != (problem.parameters.size,):
        raise UsageError(
            f"the vector must have {problem.parameters.size} entries, one a parameter",
            f"shape {tuple(tensor.shape)}",
            "the gradient, flattened in the order of the parameters",
        )
    return tensor
