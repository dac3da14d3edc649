"""Samples of examples that cannot speak of the rest: said, and unknown; ordinary ones: neither."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hesscli
from hesscli.engines.hutchinson.table import FEWEST, reduce_table, tails_of
from hesscli.render.document import to_json
from hesscli.results import TraceResult

LEVEL = 1e-3
GROUPS, FRACTION = 64, 0.25

Draw = Callable[[np.random.Generator, int], np.ndarray]


def lognormal(sigma: float, tokens: int = 1) -> Draw:
    """Traces of examples, each the mean of some tokens'."""
    return lambda rng, n: np.exp(sigma * rng.standard_normal((n, tokens))).mean(1)


def pareto(power: float, tokens: int) -> Draw:
    return lambda rng, n: (1 + rng.pareto(power, (n, tokens))).mean(1)


def gamma(shape: float) -> Draw:
    return lambda rng, n: rng.gamma(shape, size=n)


def normal(mean: float) -> Draw:
    return lambda rng, n: mean + rng.standard_normal(n)


def sparse(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.where(rng.random(n) < 0.1, rng.exponential(size=n), 0.0)


def said_or_held(draw: Draw, kept: int, seeds: int) -> tuple[float, float]:
    """How often a quarter of the examples is called unknown, and how often that or right."""
    rng, unknown, right = np.random.default_rng(0), 0, 0
    for _ in range(seeds):
        everything = draw(rng, round(kept / FRACTION))
        groups = np.array_split(everything[:kept], min(GROUPS, kept))
        cells = [group.mean().reshape(1, 1) for group in groups]
        weights = [float(len(group)) for group in groups]
        table = reduce_table(cells, weights, "fresh", examples=kept / len(groups))
        width = table.half_width(FRACTION, 0.05)[-1]
        unknown += width == math.inf
        right += abs(table.estimate[-1] - everything.mean()) <= width
    return unknown / seeds, right / seeds


def at_least(share: float, seeds: int) -> float:
    return float(stats.binom.ppf(LEVEL, seeds, share) / seeds)


def at_most(share: float, seeds: int) -> float:
    return float(stats.binom.isf(LEVEL, seeds, share) / seeds)


SEEDS = [200, pytest.param(2000, marks=pytest.mark.study)]
HEAVY = {
    "tokens, lognormal 2": (lognormal(2.0, 32), 128),
    "tokens, lognormal 2.5": (lognormal(2.5, 32), 128),
    "tokens, lognormal 3": (lognormal(3.0, 32), 256),
    "tokens, Pareto 1.5": (pareto(1.5, 32), 256),
    "tokens, Pareto 1.2": (pareto(1.2, 32), 256),
    "examples, lognormal 1.5": (lognormal(1.5), 60),
    "examples, lognormal 2": (lognormal(2.0), 128),
}
ORDINARY = {
    "normal": (normal(3.0), 100),
    "of both signs": (normal(0.0), 100),
    "beside what all have": (lambda rng, n: 1 + rng.exponential(size=n), 120),
    "of whom a tenth matters": (
        lambda rng, n: rng.exponential(size=n) * (rng.random(n) < 0.1),
        2048,
    ),
    "exponential": (gamma(1.0), 256),
    "of four inputs": (gamma(2.0), 64),
    "of one input": (gamma(0.5), 512),
    "tokens": (lognormal(1.0, 32), 64),
    "few": (gamma(2.0), 20),
}


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("name", HEAVY)
def test_heavy_tails_are_held_or_unknown(name: str, seeds: int) -> None:
    """At least 90 in 100; plain Student's intervals hold in 75 to 90."""
    _, right = said_or_held(*HEAVY[name], seeds)
    assert right >= at_least(0.9, seeds)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_examples_are_not_called_unknown(name: str, seeds: int) -> None:
    """In at most 5 of 100, and their intervals hold."""
    unknown, right = said_or_held(*ORDINARY[name], seeds)
    assert unknown <= at_most(0.05, seeds)
    assert right >= at_least(0.93, seeds)


def test_skewness_and_its_test_are_scipy_s() -> None:
    rng = np.random.default_rng(1)
    for count in (FEWEST, 20, 100):
        values = rng.gamma(1.0, size=(count, 3))
        found = tails_of(values, np.full(count, 1 / count))
        np.testing.assert_allclose(found.skewness, stats.skew(values), rtol=1e-9)
    share, alarms = np.full(64, 1 / 64), 0
    for _ in range(300):
        values = rng.lognormal(sigma=rng.uniform(0.5, 1.5), size=64)
        off = values - values.mean()
        scores = [
            float(stats.skewtest(np.cbrt(each)).statistic)
            for each in (values, 1 + off / off.std() / 2)
        ]
        heavy = scores[0] > 2.05 and scores[1] > 2.58 and stats.skew(values) > 2
        alarms += heavy
        for sign in (1, -1):  # a matrix that curves downwards is no other
            assert tails_of(sign * values[:, None], share, 4.0).heavy == heavy
    assert 0 < alarms < 300


def test_batches_that_are_alike_have_no_tails() -> None:
    """Equal to rounding, or all zero: nothing is skew."""
    share = np.full(64, 1 / 64)
    for value in (0.0, 1 / 3):
        rounded = value * (1 + 2.0**-52 * np.random.default_rng(2).integers(-1, 2, (64, 2)))
        found = tails_of(rounded, share)
        assert not found.heavy
        assert np.abs(found.skewness).max() == 0


# -- end to end ------------------------------------------------------------------------------------


def heavy_rows(count: int, seed: int = 0) -> TensorDataset:
    """Of a regression, whose traces are the squares of inputs."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(1.2 * torch.randn(count, 1, generator=generator))
    x = torch.randn(count, 2, generator=generator) * scale
    return TensorDataset(x, torch.randn(count, 1, generator=generator))


def said(result: Any, *words: str) -> bool:
    return any(all(word in line for word in words) for line in result.warnings)


def test_heavy_examples_are_said_and_the_interval_is_null() -> None:
    problem = hesscli.Problem(nn.Linear(2, 1), "mse", heavy_rows(400), examples=100)
    for result in (hesscli.trace(problem), hesscli.diagonal(problem)):
        assert said(result, "heavy tails", "of the trace")
        assert result.status == "data-limited"
        assert result.trace.interval == (-math.inf, math.inf)
        document = json.loads(to_json(result))
        assert document["trace"]["interval"] is None
        assert all(layer["interval"] is None for layer in document["layers"])
        assert document["trace"]["estimate"] > 0
        assert document["trace"]["data_stderr"] > 0


def test_heavy_examples_that_are_all_there_are_not_worth_a_word() -> None:
    result = hesscli.trace(hesscli.Problem(nn.Linear(2, 1), "mse", heavy_rows(100)))
    assert result.status == "exact"
    assert not result.warnings
    assert result.trace.interval[0] > 0


def test_ordinary_examples_are_not_either() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(400, 7, generator=generator)
    data = TensorDataset(rows[:, :6], rows[:, 6:])
    result = hesscli.trace(hesscli.Problem(nn.Linear(6, 1), "mse", data, examples=120))
    assert not any("tails" in line or "rest on" in line for line in result.warnings)
    assert math.isfinite(result.trace.interval[1])


def test_data_noise_that_keeps_from_a_tolerance_is_said() -> None:
    """Whatever part of the interval is widening: a run without probes does not ask for more."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(800, 3, generator=generator)
    data = TensorDataset(rows[:, :2], rows[:, 2:])
    problem = hesscli.Problem(nn.Linear(2, 1), "mse", data, examples=200)
    low, high = hesscli.trace(problem).trace.interval
    for share in (0.5, 0.9, 0.99):
        tight = hesscli.trace(problem, rtol=None, atol=share * (high - low) / 2)
        assert tight.status == "data-limited"
    assert hesscli.trace(problem, rtol=None, atol=1.01 * (high - low) / 2).status == "converged"


def one_of_many(loss: Any) -> hesscli.Problem:
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return hesscli.Problem(model, loss, TensorDataset(x, y), examples=1)


@pytest.mark.parametrize("method", ["split", "hutchinson", "stratified"])
def test_one_example_knows_nothing_of_others(method: str) -> None:
    problem = one_of_many("cross_entropy")
    result = hesscli.trace(problem, method=method, probes=4)
    assert "interval unknown" in str(result)
    diagonal = hesscli.diagonal(problem, method=method, probes=4)
    for each in (result, diagonal):
        assert said(each, "one batch of 1 of 64 examples", "unknown")
        assert each.status == "data-limited"
        document = json.loads(to_json(each))
        assert document["trace"]["interval"] is None
        assert document["trace"]["data_stderr"] is None
        assert document["trace"]["degrees_of_freedom"] is None
        assert all(layer["interval"] is None for layer in document["layers"])
    assert document["diagonal"]["relative_error"] is None
    assert document["diagonal"]["shrinkage"] in (None, [1.0, 1.0])
    for layer in document["layers"]:
        assert layer["mean_stderr"] is layer["std_stderr"] is layer["negative_stderr"] is None
        assert all(quantile["stderr"] is None for quantile in layer["quantiles"])
        assert all(entry["stderr"] is None for entry in layer["largest"])
        assert layer["block"]["explained_interval"] in ([0, 1], [1, 1])
    assert all(np.isinf(part).all() for part in diagonal.stderr.values())


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of a batch that is more than its examples."""
    x, t = batch
    return F.mse_loss(model(x - x.mean(0)), t)


@pytest.mark.parametrize(("batches", "words"), [(1, "one batch of 4"), (3, "rest on 3 batches")])
def test_few_batches_of_a_step_are_said(batches: int, words: str) -> None:
    from hesscli.problem.losses import StepLoss

    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 2), (4, 1))
    data = [tuple(torch.randn(*s, generator=generator) for s in shapes) for _ in range(24)]
    problem = hesscli.Problem(
        nn.Linear(2, 1), StepLoss(step, "step"), data, examples=4 * batches, seed=1
    )
    result: TraceResult = hesscli.trace(problem, probes=4)
    assert said(result, words)
    assert (result.trace.interval == (-math.inf, math.inf)) == (batches == 1)
