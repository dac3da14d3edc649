"""What an estimation tells at its end holds as often as it says, for little more than it must cost.

Coverage is that of 2,000 tables at once, whose truth is known: cells of all seeds that have come
to as many probes are the columns of one table.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from hesscli.diagnostics.estimation import Estimation
from hesscli.diagnostics.looks import Tolerance, first_look, miss_probability, next_look
from hesscli.diagnostics.measurement import drive
from hesscli.diagnostics.run import Clock
from hesscli.diagnostics.trace import standing
from hesscli.engines.estimator import Estimator, Rounding
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.hutchinson.table import Array, Sharing, half_width, reduce_table
from hesscli.operators.dense import Dense

SEEDS, MISS, LEVEL = 2000, 0.05, 1e-3
BATCHES, MOST = 16, 150
"""Fresh probes are of this many batches; no run has more probes of each."""


def bounds(low: float, high: float, checks: int, seeds: int = SEEDS) -> tuple[float, float]:
    """Hit rates that a coverage within [low, high] leaves with probability LEVEL at most."""
    tail = LEVEL / checks / 2
    return binom.ppf(tail, seeds, low) / seeds, binom.ppf(1 - tail, seeds, high) / seeds


# -- Coverage and cost at the stop, of cells whose mean is 0 and whose variance is known -----------


def normal(rng: np.random.Generator, probes: int) -> Array:
    return rng.standard_normal((probes, SEEDS))


def skew(rng: np.random.Generator, probes: int) -> Array:
    """As the quadratic form of a matrix with two eigenvalues: of skewness 0.7."""
    forms = rng.chisquare(16, (probes, SEEDS))
    return (forms - 16) / math.sqrt(32)


def signed(rng: np.random.Generator, probes: int) -> Array:
    """Forms of random signs and a matrix of eigenvalues 10, 5, 3.3 ...: of skewness 0.9."""
    basis = np.linalg.qr(np.random.default_rng(3).standard_normal((30, 30)))[0]
    matrix = basis @ np.diag(10.0 / (1 + np.arange(30))) @ basis.T
    np.fill_diagonal(matrix, 0)
    signs = (2 * rng.integers(0, 2, (probes, SEEDS, 30), np.int8) - 1).astype(np.float32)
    forms = (signs @ matrix.astype(np.float32) * signs).sum(-1)
    return forms / math.sqrt(2 * np.square(matrix).sum())


class Tables:
    """Cells of all seeds, and how far each has come."""

    def __init__(self, draw, design: Sharing, spread: Array) -> None:
        rng = np.random.default_rng(9)
        self.design: Sharing = design
        self.probes = np.full(SEEDS, first_look(design, BATCHES))
        owners = BATCHES if design == "fresh" else 1
        cells = np.stack([draw(rng, MOST if owners > 1 else MOST * BATCHES) for _ in range(owners)])
        self.cells = spread[:owners, None, None] * cells

    def read(self, running: Array, miss: float) -> tuple[Array, Array]:
        """Each seed's estimate and half-width."""
        estimate, width = np.zeros(SEEDS), np.zeros(SEEDS)
        for count in np.unique(self.probes[running]):
            at = running & (self.probes == count)
            table = reduce_table(self.cells[:, :count, at], np.ones(len(self.cells)), self.design)
            estimate[at], width[at] = table.estimate, half_width(table.variance(1.0), miss)
        return estimate, width


@pytest.mark.parametrize(
    ("design", "draw", "spread"),
    [
        ("fresh", normal, 0.0),
        ("fresh", normal, 0.5),
        ("fresh", skew, 0.0),
        ("fresh", signed, 0.0),
        ("shared", skew, 0.0),
    ],
)
def test_what_is_told_holds_as_often_as_it_says(design: Sharing, draw, spread: float) -> None:
    """To widths that 1.5 to 40 times the first look's cells just have, where sigma is known.

    Told in 94 to 97%, at no more than 1.3 times these cells on average from 4 times on.
    """
    rng = np.random.default_rng(10)
    spreads = np.exp(spread * rng.standard_normal(BATCHES))
    tables = Tables(draw, design, spreads)
    first, owners = tables.probes[0], len(tables.cells)
    oracle = first * np.exp(rng.uniform(math.log(1.5), math.log(40), SEEDS))
    sigma = np.sqrt(np.square(spreads[:owners]).sum()) / owners
    wanted = norm.isf(MISS / 2) * sigma / np.sqrt(oracle)
    running, missed, look = np.ones(SEEDS, dtype=bool), np.zeros(SEEDS, dtype=bool), 1
    while running.any():
        estimate, width = tables.read(running, miss_probability(MISS, look))
        ends = running & (width <= wanted)
        missed[ends], running = np.abs(estimate[ends]) > width[ends], running & ~ends
        look = 2
        _, width = tables.read(running, miss_probability(MISS, look))
        for seed in np.flatnonzero(running):
            probes = tables.probes[seed]
            tables.probes[seed] = next_look(probes, probes * (width[seed] / wanted[seed]) ** 2)
    low, high = bounds(0.94, 0.97, checks=5)
    assert low <= 1 - missed.mean() <= high
    far = oracle > 4 * first
    assert np.mean(tables.probes[far] / oracle[far]) < 1.3


@pytest.mark.parametrize("seeds", [20, pytest.param(SEEDS, marks=pytest.mark.study)])
def test_a_trace_to_a_tolerance_costs_little_more_than_it_must(seeds: int) -> None:
    """Than probes whose variance 2 Σ a² off the diagonal is known; they are looked at once."""
    generator = torch.Generator().manual_seed(8)
    rest = torch.randn(8, 24, 24, generator=generator, dtype=torch.float64)
    matrices = torch.eye(24, dtype=torch.float64) * 4 + (rest + rest.mT) / 3
    operator, diagonals = Dense.of(matrices), matrices.diagonal(dim1=1, dim2=2)
    truth = float(diagonals.sum()) / len(matrices)
    off = matrices.square().sum() - diagonals.square().sum()
    deviation = float((2 * off).sqrt()) / len(matrices) / truth
    tolerance = Tolerance(deviation / 3)
    oracle = (norm.isf(MISS / 2) * deviation / tolerance.half_width(1.0)) ** 2
    probes, hits = [], 0
    for seed in range(seeds):
        estimator = Estimator(operator, probes=Hutchinson(operator, seed=seed))
        goal = partial(standing, tolerance=tolerance)
        run = Estimation(estimator, goal, MISS, Rounding(0.0))
        outcome = run.outcome(drive(Clock(None, None), run))
        low, high = outcome.reading.interval()
        assert outcome.status == "converged"
        assert outcome.looks == 2
        hits += low <= truth <= high
        probes.append(estimator.num_probes)
    low, high = bounds(0.94, 0.97, checks=1, seeds=seeds)
    assert low <= hits / seeds <= high
    assert np.mean(probes) < 1.3 * oracle


# -- How looks are planned -------------------------------------------------------------------------


def test_the_error_budget_is_never_overspent() -> None:
    shares = [miss_probability(1.0, look) for look in range(1, 10_000)]
    assert 0.999 < sum(shares) <= 1
    assert max(shares) == shares[1] >= 0.75  # where a run is planned to end


def test_the_next_look_is_a_little_past_what_is_needed() -> None:
    """Half way where the variance of few probes is all there is; and always some way."""
    assert 20 < next_look(10, 20.0) <= 22
    assert next_look(2, 5.9) == 7
    assert next_look(10, 60.0) == 30
    assert next_look(10, 1e9) == 40
    assert next_look(100, 101.0) == 110
    assert next_look(4, 4.1, least=2) == 6
