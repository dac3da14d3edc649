"""How every diagnostic begins: the proof, the preflight, and the matrix in its working type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from hesscli.diagnostics.clock import Clock
from hesscli.operators.base import Operator
from hesscli.operators.matrices import matrix_named
from hesscli.operators.preflight import checked
from hesscli.problem.precision import doubled
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
    flight = checked(problem, build, mode)
    with doubled(problem) if flight.mode == "finite-difference" else nullcontext():
        yield Opening(build(problem, mode=flight.mode), flight)
