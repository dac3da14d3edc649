"""Whether there is no time for the batches that examples were cut into, and which ones to take.

Examples that are independent are cut into sixteen batches and more, so that these show how examples
differ, and the best method looks at some of them before any probe. A large network is read as a
whole for each, however few examples there are in it: where time is short, a first round may not
end. The user's own batches are fewer. With probes of the whole matrix in them there is nothing to
look at first, and a number as soon as all have two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hesscli import world
from hesscli.diagnostics.run import Run
from hesscli.engines.hutchinson.table import FEWEST as SHOWING
from hesscli.operators.exactness import may_be_exact
from hesscli.operators.hessian import Hessian
from hesscli.problem.problem import Problem
from hesscli.units import duration

_PROBES = 2
"""Of each batch, for an error bar."""
_BAR = 2
"""Batches that have their probes when there is a first number."""
_CHOOSING = 6.0
"""Gradients that finding the best method takes, at the least: 6.4 to 6.6 were measured at networks
of 11 to 110 million weights."""


def in_haste(run: Run) -> dict[str, Any] | None:
    """Batches to be taken as one, and why, as plain values; None where there is time for more.

    What a gradient takes is what it took in the proof, or in checks where it took longer there, or
    where another run had made the proof. All ranks come to the same.
    """
    return world.decided(_found(run) if isinstance(run.operator, Hessian) else None)


def _found(run: Run) -> dict[str, Any] | None:
    problem, operator, left = run.problem, run.operator, run.clock.left
    alone, groups = [(i,) for i in problem.indices], _together(problem)
    if left == math.inf or len(groups) == len(alone):
        return None
    pace = run.before.seconds / max(run.before.gradients, 1.0)
    pace = max(pace, run.proof / problem.gradient_cost * world.gain(len(problem.joint())))

    def seconds(some: Sequence[Sequence[int]], more: float = 0.0) -> float:
        return pace * (more + operator.foreseen(some, _PROBES) / world.gain(len(some)))

    usual, first = seconds(alone, _CHOOSING), seconds(alone[:_BAR], _CHOOSING)
    if left >= usual or seconds(groups) > max(left, first):
        return None
    if problem.hidden_outputs is None and may_be_exact(problem, operator.meter):
        return None
    largest = max(sum(problem.data.counts[i] for i in group) for group in groups)
    taken = "one batch" if len(groups) == 1 else f"{len(groups)} batches"
    why = (
        f"probes of the whole matrix in {taken} of {largest} examples: {duration(max(left, 0.0))} "
        f"of --budget were left, and a first look at all {len(alone)} batches, by the best method, "
        f"would have taken {duration(usual)}"
    )
    return {"groups": [list(group) for group in groups], "why": why}


def _together(problem: Problem) -> list[tuple[int, ...]]:
    """The user's own batches, or so many as show what examples that were left out may change."""
    groups, least = problem.joint(), SHOWING
    if problem.sampling_fraction in (None, 1):
        least = 1
    pieces = -(-least // len(groups))
    cut = (group[first::pieces] for group in groups for first in range(pieces))
    return [group for group in cut if group]
