"""A run on slow batches: it may end between two products, and has a result as soon as it can."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

from hesscli import Hessian
from hesscli.diagnostics.estimation import Estimation
from hesscli.diagnostics.looks import Tolerance
from hesscli.diagnostics.measurement import drive
from hesscli.diagnostics.run import Clock
from hesscli.diagnostics.trace import standing
from hesscli.engines.estimator import Estimator, Rounding
from hesscli.engines.hutchinson.designs import Deflated, Stratified
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.unit_vectors import UnitVectors
from hesscli.errors import BudgetError
from hesscli.operators.base import Operator
from hesscli.problem.freezing import FrozenData
from hesscli.problem.problem import Problem
from hesscli.results import Snapshot


def problem(*sizes: int) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    pairs = tuple((torch.randn(n, 3), torch.randn(n, 1)) for n in sizes)
    return Problem(model, "mse", FrozenData(pairs, sizes, sum(sizes), True, "by hand"))


def engine(operator: Operator, design: str) -> Hutchinson | UnitVectors:
    if design == "unit vectors":
        return UnitVectors(operator)
    made = {
        "plain": lambda: None,
        "stratified": lambda: Stratified(operator),
        "deflated": lambda: Deflated(operator, 2, 0, None, operator.parameters),
    }[design]()
    return Hutchinson(operator, seed=0, design=made)


class Ended(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("design", ["plain", "stratified", "deflated", "unit vectors"])
def test_a_block_may_end_after_any_product(design: str) -> None:
    """However many vectors fit into it: a product may take minutes."""
    operator = Hessian(problem(6, 6))
    source = engine(operator, design)
    assert operator.block_size > 20
    looked = [operator.meter.products]

    def look() -> None:
        looked.append(operator.meter.products)
        if len(looked) == 12:
            raise Ended

    with pytest.raises(Ended):
        looked.extend(operator.meter.products for _ in source.extend(20, look))
    assert max(after - before for before, after in itertools.pairwise(looked)) <= 2.0
    assert all(len(cells) in (0, 20) for cells in source.cells.values())  # whole batches


def test_time_is_up_within_a_block() -> None:
    """One batch, and 32 probes at its first look, after two: there is a result of two."""
    operator = Hessian(problem(12))
    looks = 0

    def look(snapshot: Snapshot) -> None:
        nonlocal looks
        looks += 1
        if looks == 4:
            raise BudgetError("the budget ended", snapshot.phase, "a larger one")

    estimator = Estimator(operator, probes=Hutchinson(operator, seed=0))
    goal = partial(standing, tolerance=Tolerance(1e-3))
    run = Estimation(estimator, goal, 0.05, Rounding(0.0), look=look)
    assert drive(Clock(None, None), run) == "budget"
    outcome = run.outcome("budget")
    assert outcome.estimator.num_probes == 2
    assert operator.meter.products < 10


def test_there_is_a_result_after_two_probes_of_two_batches() -> None:
    """With four batches, a look takes eight probes of each."""
    operator = Hessian(problem(6, 6, 6, 6))
    estimator = Estimator(operator, probes=Hutchinson(operator, seed=0))
    goal = partial(standing, tolerance=Tolerance(0.5))
    run = Estimation(estimator, goal, 0.05, Rounding(0.0))
    for _ in itertools.takewhile(lambda _: not run.ready, run.steps()):
        pass
    assert operator.meter.products == 1.0
    outcome = run.outcome("budget")
    low, high = outcome.reading.interval()
    assert math.isfinite(low)
    assert low < high
