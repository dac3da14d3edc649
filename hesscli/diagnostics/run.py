"""What every run has: a clock, its surroundings, and a matrix that has passed its checks."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from hesscli.errors import UsageError
from hesscli.operators.base import Operator
from hesscli.operators.gauss_newton import EmpiricalFisher, Fisher, GaussNewton
from hesscli.operators.hessian import Hessian
from hesscli.operators.preflight import checked
from hesscli.problem.precision import doubled
from hesscli.problem.problem import Problem
from hesscli.results import Environment, Observe, Preflight, Snapshot
from hesscli.units import duration

# -- A run's time: its limit, and the observer's line ----------------------------------------------


class Stopped(KeyboardInterrupt):
    """The observer wants no more: to everyone else, as if Ctrl-C had been pressed."""


@dataclass
class Clock:
    """Time since the start, and whom to tell.

    Args:
        budget: seconds, or None for no limit.
        observer: called with each snapshot.
    """

    budget: float | None
    observer: Observe | None
    _began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    @property
    def out_of_time(self) -> bool:
        """Whether the budget is spent."""
        return self.budget is not None and self.seconds > self.budget

    def tell(self, phase: Any, **details: Any) -> None:
        """Tell the observer.

        Raises:
            Stopped: the observer wants no more.
        """
        if self.observer is None:
            return
        if self.observer(Snapshot(phase=phase, seconds=self.seconds, **details)):
            raise Stopped


def beyond(seconds: float, budget: float | None) -> tuple[str, ...]:
    """What a plan says where it takes longer than it will be given; nothing where it does not."""
    if budget is None or seconds <= budget:
        return ()
    return (f"beyond --budget {duration(budget)}, which ends it at its result so far",)


# -- Where a run happens, and the most memory that it took -----------------------------------------


_RESIDENT_GRAIN = 1 << 26
"""Resident memory is rounded up to this: its last digits differ from run to run."""


def environment(device: torch.device) -> Environment:
    """Versions, device and threads."""
    cuda = device.type == "cuda"
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        device_name=torch.cuda.get_device_name(device) if cuda else platform.machine(),
        threads=torch.get_num_threads(),
        tf32=cuda and torch.backends.cuda.matmul.allow_tf32,
    )


def peak_bytes(device: torch.device) -> int:
    """The device's peak allocation, or the process's peak resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return -(-resident // _RESIDENT_GRAIN) * _RESIDENT_GRAIN


# -- The matrices that ``--matrix`` names ----------------------------------------------------------


MATRICES: dict[str, type[Operator]] = {
    matrix.name: matrix for matrix in (Hessian, GaussNewton, Fisher, EmpiricalFisher)
}


def matrix_named(name: str) -> type[Operator]:
    """The operator class of a name.

    Raises:
        UsageError: no such matrix.
    """
    if name not in MATRICES:
        raise UsageError("no such matrix", repr(name), f"one of {', '.join(MATRICES)}")
    return MATRICES[name]


# -- How every diagnostic begins: the proof, the preflight, and the matrix in its working type -----


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
