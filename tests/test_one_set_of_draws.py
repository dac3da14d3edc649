"""Wherever a diagonal ends, its entries, sums, means and trace are of the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import hesscli
from hesscli.engines.hutchinson.table import reduce_table

BATCHES = 16


def classes(activation: type[nn.Module]) -> tuple[Any, ...]:
    model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)).double()
    return model, "cross_entropy", (torch.randn(32, 4).double(), torch.randint(0, 3, (32,)))


def many_outputs(activation: type[nn.Module]) -> tuple[Any, ...]:
    """More outputs than columns are affordable: random ones."""
    model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 48)).double()
    return model, "bce_with_logits", (torch.randn(32, 4).double(), torch.rand(32, 48).double())


@pytest.mark.parametrize(
    ("make", "activation", "options", "stops"),
    [
        (classes, nn.Tanh, {"method": "hutchinson"}, (5, 20, 40, 70, 100)),
        (classes, nn.Tanh, {"method": "split"}, (23, 30, 40, 60, 90)),
        (classes, nn.Tanh, {"method": "stratified"}, (5, 20, 40, 70)),
        (many_outputs, nn.ReLU, {}, (20, 36, 50, 100)),
        (many_outputs, nn.Tanh, {}, (33, 40, 45, 50, 60)),
    ],
    ids=["probes", "split", "strata", "columns", "columns and probes"],
)
def test_what_is_written_adds_up_wherever_it_ends(
    make: Any, activation: type[nn.Module], options: dict[str, Any], stops: tuple[int, ...]
) -> None:
    """In float64: the sum of a layer's entries, its mean times its size, and its trace."""
    torch.manual_seed(0)
    model, loss, arrays = make(activation)
    problem = hesscli.Problem(model, loss, TensorDataset(*arrays))
    estimates = set()
    for stop in stops:
        steps = 0

        def observe(snapshot: hesscli.results.Snapshot, stop: int = stop) -> bool:
            nonlocal steps
            steps += snapshot.phase in ("squaring gradients", "probing")
            return steps >= stop

        run = hesscli.diagonal(problem, observe=observe, rtol=1e-6, **options)
        assert run.status == "interrupted"
        estimates.add(run.trace.estimate)
        assert sum(layer.estimate for layer in run.layers) == pytest.approx(run.trace.estimate)
        for layer in run.layers:
            written = sum(float(run.entries[p.name].sum()) for p in layer.parameters)
            assert written == pytest.approx(layer.estimate, rel=1e-10, abs=1e-12)
            assert layer.mean * layer.num_parameters == pytest.approx(layer.estimate, rel=1e-12)
    assert len(estimates) > 1  # it ended in several rounds


def test_a_rest_that_is_probed_on_some_batches_has_its_variance() -> None:
    """G of all kept batches and R of some of them, against the spread over many draws.

    A third of 48 batches is kept, a half of those probed; G and R go together from batch to batch.
    """
    rng = np.random.default_rng(0)
    population, runs, probes = 48, 2000, 4
    known = rng.standard_normal(population)
    rest = 0.8 * known + 0.6 * rng.standard_normal(population)
    truth = known.mean() + rest.mean()
    errors, stated = [], []
    for _ in range(runs):
        kept = rng.permutation(population)[:BATCHES]
        probed = kept[: BATCHES // 2]
        noise = rng.standard_normal((len(probed), probes, 1))
        cells = list(rest[probed][:, None, None] + noise)
        added = list(known[kept][:, None, None])
        table = reduce_table(cells, [1.0] * BATCHES, "fresh", added)
        errors.append(float(table.estimate[0]) - truth)
        stated.append(float(table.variance(len(probed) / population).value[0]))
    assert abs(np.mean(errors)) < 4 * np.std(errors) / runs**0.5
    # Of a sample variance of 2000 runs, and of the mean of the stated ones.
    spread = np.var(errors) * (2 / runs) ** 0.5 + np.std(stated) / runs**0.5
    assert abs(np.mean(stated) - np.var(errors)) < 4 * spread
