"""In which floating type a model really computes: whether float64 checks mean anything."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from hesscli.operators.products import gradient
from hesscli.problem.precision import Narrowing
from hesscli.problem.problem import Problem


def doubled(problem: Problem) -> AbstractContextManager[None]:
    """The problem in float64 meanwhile."""
    return problem.in_dtype(torch.float64) if problem.dtype != torch.float64 else nullcontext()


def working_precision(problem: Problem, count: int) -> torch.dtype:
    """The narrowest type between parameters and loss when float64 is asked for.

    The problem's own type where the model does not run in float64 at all.

    Args:
        problem: what is analysed; it has run in its own type.
        count: examples to run on.
    """
    watch = Narrowing()
    with doubled(problem):
        sample = problem.sample(count)
        try:
            with watch:
                value = problem.evaluate(sample.data)
            gradient(value, problem.parameters.tensors)
        except Exception:  # of any kind: the code is the user's, made for another type
            return torch.float32 if problem.dtype == torch.float64 else problem.dtype
    return watch.narrowest
