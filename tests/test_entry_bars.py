"""±1.96 standard errors of single entries hold 93 to 97 in 100: of all, and of the largest tenth.

Dense matrices are probed as the engine does, with random signs, through the streams that keep the
entries. ``make coverage`` runs 2,000 seeds of each.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from noisy_diagonals import matrix
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesscli
from hesscli.engines.entries import Entries, Part
from hesscli.parameters import Parameters

SIZE = 40
SEEDS = [40, pytest.param(2000, marks=pytest.mark.study)]


def holds(hits: list[list[float]], high: float = 0.97) -> bool:
    """Whether no column's mean over seeds is significantly outside, at a level of 1e-3.

    The spread of a seed's share is at most that of a single entry's, which few seeds do not show.
    """
    found = np.array(hits)
    least = (0.95 * 0.05 / found.shape[0]) ** 0.5 if len(found) < 100 else 0.0
    spread = np.maximum(found.std(0) / len(found) ** 0.5, least)
    share = found.mean(0)
    return bool((share >= 0.93 - 3.3 * spread).all() and (share <= high + 3.3 * spread).all())


def batches(kind: str, count: int, rng: np.random.Generator) -> Tensor:
    """Matrices of batches: one they share, with a heavy-tailed diagonal, and each its own."""
    common = matrix(np.exp(1.5 * rng.standard_normal(SIZE)), kind, 8.0, rng)
    own = 0.3 * rng.standard_normal((count, SIZE, SIZE))
    return torch.from_numpy(common + own + own.transpose(0, 2, 1))


def estimated(
    matrices: Tensor, probes: int, fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Entries and their bars, from two rounds."""
    parameters = Parameters.of(nn.Linear(SIZE, 1, bias=False))
    entries = Entries(parameters, torch.device("cpu"))
    stream, done = entries.stream(parameters, exact=False), 0
    while done < probes:
        count = 2 if done == 0 else probes - done
        for index, a in enumerate(matrices):
            signs = torch.randint(0, 2, (count, SIZE), generator=generator).double() * 2 - 1
            found = stream.of_batch(index, 1 / len(matrices))
            stream.add(found, signs * (signs @ a), done)
            stream.keep(found)
        stream.close_round(count)
        done += count
    found = entries.diagonal([Part(stream, fraction, probes)], 0.0)
    return found.values, found.bars()


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("kind", ["flat", "spiked"])
@pytest.mark.parametrize(
    ("count", "probes", "fraction"),
    [(1, 16, 1), (1, 64, 1), (4, 4, 1), (16, 2, 1), (16, 16, 1), (16, 4, 0.25), (32, 2, 0.25)],
)
def test_bars_hold(count: int, probes: int, fraction: float, kind: str, seeds: int) -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    population = batches(kind, round(count / fraction), rng)
    truth = population.diagonal(dim1=1, dim2=2).mean(0)
    largest = truth.abs() >= truth.abs().quantile(0.9)
    hits = []
    for _ in range(seeds):
        kept = torch.randperm(len(population), generator=generator)[:count]
        values, bars = estimated(population[kept], probes, fraction, generator)
        held = ((values - truth).abs() <= 1.96 * bars).double()
        hits.append([float(held.mean()), float(held[largest].mean())])
    assert holds(hits), np.mean(hits, axis=0)


class Smooth(nn.Module):
    """A network small enough for its dense Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("seeds", [5, pytest.param(200, marks=pytest.mark.study)])
@pytest.mark.parametrize(("method", "highest"), [("hutchinson", 0.97), ("split", 1.0)])
def test_bars_of_a_network_s_entries_hold(method: str, highest: float, seeds: int) -> None:
    """Whole runs of 16 probes; where what was probed is shrunk, bars are conservative."""
    torch.manual_seed(0)
    x = torch.randn(48, 6).double() * torch.tensor([4.0, 2.0, 1.0, 1.0, 0.5, 0.5])
    data = TensorDataset(x, torch.randint(0, 3, (48,)))
    problem = hesscli.Problem(Smooth().double(), "cross_entropy", data)
    truth = hesscli.Hessian(problem).to_dense().diagonal().numpy()
    largest = np.abs(truth) >= np.quantile(np.abs(truth), 0.9)
    hits = []
    for seed in range(seeds):
        run = hesscli.diagonal(problem, method=method, probes=16, seed=seed)
        values, bars = (
            np.concatenate([part.ravel() for part in parts.values()])
            for parts in (run.entries, run.stderr)
        )
        held = np.abs(values - truth) <= 1.96 * bars + 1e-12
        hits.append([held.mean(), held[largest].mean()])
        assert (run.diagonal.shrinkage is not None) == (highest == 1.0)
    assert holds(hits, highest), np.mean(hits, axis=0)
