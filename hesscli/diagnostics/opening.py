"""How every diagnostic begins: the proof, the preflight, and the matrix in its working type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hesscli.diagnostics.clock import Clock
from hesscli.operators.base import Operator
from hesscli.operators.matrices import matrix_named
from hesscli.operators.preflight import preflight
from hesscli.problem.problem import Problem
from hesscli.results import Preflight

PROOF_GRADIENTS = 4 / 3
"""What the proof of the problem costs: a gradient, and a forward pass that checks the labels."""


@dataclass(frozen=True)
class Opening:
    """A matrix that has passed its checks."""

    operator: Operator
    flight: Preflight


@contextmanager
def opened(problem: Problem, matrix: str, mode: str, clock: Clock) -> Iterator[Opening]:
    """Prove the problem, check its products, and make the matrix.

    Raises:
        UsageError: a matrix that this problem does not have.
        UnsoundError: the problem's curvature would mean nothing.
        KeyboardInterrupt: the observer wanted no more.
    """
    build = matrix_named(matrix)
    problem.prove(clock.observer)
    clock.tell("preflight")
    flight = preflight(problem, build, mode)
    with problem.in_dtype(_working_dtype(problem, flight)):
        yield Opening(build(problem, mode=flight.mode), flight)


def _working_dtype(problem: Problem, flight: Preflight) -> torch.dtype:
    """The problem's own type, but float64 for differences."""
    return torch.float64 if flight.mode == "finite-difference" else problem.dtype
