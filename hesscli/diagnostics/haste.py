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
from dataclasses import dataclass
from typing import Any

from hesscli import world
from hesscli.diagnostics.measurement import Work
from hesscli.diagnostics.run import Run
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.hutchinson.table import FEWEST as SHOWING
from hesscli.meter import Spent
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


@dataclass(frozen=True)
class Haste:
    """What a trace does whose time is short.

    Attributes:
        groups: the batches that are taken as one.
        largest: the examples in the largest of them.
        apart: the batches that there are.
        left: seconds that there are for all.
        usual: seconds until these would have shown anything.
        first: work until the groups have probes for an error bar.
    """

    groups: list[tuple[int, ...]]
    largest: int
    apart: int
    left: float
    usual: float
    first: Spent

    @property
    def taken(self) -> str:
        """What is probed, in words."""
        batches = (
            "one batch of" if len(self.groups) == 1 else f"{len(self.groups)} batches of at most"
        )
        return f"probes of the whole matrix in {batches} {self.largest} examples"


def in_haste(run: Run) -> dict[str, Any] | None:
    """Batches to be taken as one, and why, as plain values; None where there is time for more.

    What a gradient takes is what it took in the proof, or in checks where it took longer there, or
    where another run had made the proof. All ranks come to the same.
    """
    found = _found(run, run.clock.left)
    told = None if found is None else {"groups": list(map(list, found.groups)), "why": _why(found)}
    return world.decided(told)


def expected(run: Run) -> Work | None:
    """What a trace will take up to its first number, where it will be in haste.

    How many more probes there is time for, or need of, nobody knows before.
    """
    budget = run.clock.budget
    found = None if budget is None else _found(run, budget - run.before.seconds)
    if found is None:
        return None
    note = (
        f"up to a first number, in haste: {found.taken}, for --budget leaves "
        f"{duration(max(found.left, 0.0))}, and a first look at all {found.apart} batches, by the "
        f"best method, would take {duration(found.usual)}"
    )
    return Work(phase=Hutchinson.phase, spent=found.first, note=note)


def _why(found: Haste) -> str:
    return (
        f"{found.taken}: {duration(max(found.left, 0.0))} of --budget were left, and a first look "
        f"at all {found.apart} batches, by the best method, would have taken "
        f"{duration(found.usual)}"
    )


def _found(run: Run, left: float) -> Haste | None:
    """What to do where so many seconds are left, if that is to be in haste."""
    problem, operator = run.problem, run.operator
    alone, groups = [(i,) for i in problem.indices], _together(problem)
    if not isinstance(operator, Hessian) or left == math.inf or len(groups) == len(alone):
        return None
    pace = run.before.seconds / max(run.before.gradients, 1.0)
    pace = max(pace, run.proof / problem.gradient_cost * world.gain(len(problem.joint())))

    def spent(some: Sequence[Sequence[int]]) -> Spent:
        work = operator.foreseen(some, _PROBES)
        share = sum(operator.counts[i] for group in some for i in group) / problem.data.count
        return Spent(_PROBES * share, work, pace * work).dealt(world.gain(len(some)))

    usual, first = (pace * _CHOOSING + spent(some).seconds for some in (alone, alone[:_BAR]))
    if left >= usual or spent(groups).seconds > max(left, first):
        return None
    if problem.hidden_outputs is None and may_be_exact(problem, operator.meter):
        return None
    largest = max(sum(problem.data.counts[i] for i in group) for group in groups)
    return Haste(groups, largest, len(alone), left, usual, spent(groups))


def _together(problem: Problem) -> list[tuple[int, ...]]:
    """The user's own batches, or so many as show what examples that were left out may change."""
    groups, least = problem.joint(), SHOWING
    if problem.sampling_fraction in (None, 1):
        least = 1
    pieces = -(-least // len(groups))
    cut = (group[first::pieces] for group in groups for first in range(pieces))
    return [group for group in cut if group]
