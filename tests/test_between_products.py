"""A run on slow batches: it may end between two products, and has a result as soon as it can."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

from hesscli import Hessian
from hesscli.diagnostics.estimation import Estimation, Tolerance
from hesscli.diagnostics.trace import standing
from hesscli.engines.estimator import Estimator, Rounding
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.unit_vectors import UnitVectors
from hesscli.problem.freezing import FrozenData
from hesscli.problem.problem import Problem


def problem(*sizes: int) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    pairs = tuple((torch.randn(n, 3), torch.randn(n, 1)) for n in sizes)
    return Problem(model, "mse", FrozenData(pairs, sizes, sum(sizes), True, "by hand"))


@pytest.mark.parametrize("units", [False, True])
def test_a_step_is_one_product_of_one_batch(units: bool) -> None:
    """However many vectors fit into a block: a product may take minutes."""
    operator = Hessian(problem(6, 6))
    engine = UnitVectors(operator) if units else Hutchinson(operator, seed=0)
    assert operator.block_size > 20
    before, most = operator.meter.products, 0.0
    for _ in engine.extend(20):
        most = max(most, operator.meter.products - before)
        before = operator.meter.products
    assert most == 0.5


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
