"""Entries that are pulled towards a known shape: what moves, what stays, and what the bars say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hesscli
from hesscli.engines.diagonal import Diagonal, shrunk

SIZE = 40
DECAY = 0.5


def entries(run: hesscli.results.DiagResult) -> np.ndarray:
    return np.concatenate([part.ravel() for part in run.entries.values()])


def layer(values: Tensor, stderr: Tensor) -> Diagonal:
    """Entries whose replicates are their standard errors themselves, under both signs."""
    noise = torch.stack([stderr, -stderr]).float()
    return Diagonal(values.double(), noise, math.inf)


def noisy(generator: torch.Generator) -> tuple[Diagonal, Tensor, Tensor]:
    """Entries near twice a shape, of which every fifth has no noise."""
    shape = torch.rand(SIZE, generator=generator, dtype=torch.float64)
    stderr = 0.5 + torch.rand(SIZE, generator=generator, dtype=torch.float64)
    stderr[::5] = 0
    drawn = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return layer(2 * shape + stderr * drawn, stderr), shape, stderr


def test_noise_is_pulled_in_what_is_known_stays_and_the_sum_is_kept() -> None:
    found, shape, stderr = noisy(torch.Generator().manual_seed(0))
    moved, kept = shrunk(found, shape)
    assert 0 <= kept < 0.5
    assert torch.equal(moved.values[::5], found.values[::5])
    before, after = (each.values - 2 * shape for each in (found, moved))
    assert float(after.norm()) < 0.7 * float(before.norm())
    rounding = SIZE * 2.0**-53 * float(found.values.abs().sum())
    assert abs(float(moved.values.sum() - found.values.sum())) <= rounding
    how_far = moved.values - found.values
    torch.testing.assert_close(moved.bars(), (stderr**2 + how_far**2).sqrt(), rtol=1e-6, atol=0)


def test_an_entry_moves_by_no_more_than_its_noise_allows() -> None:
    """One that is known to rounding among noisy ones."""
    found, shape, stderr = noisy(torch.Generator().manual_seed(1))
    stderr[3] = 1e-9
    found = layer(found.values, stderr)
    moved, _ = shrunk(found, shape)
    assert 0 < abs(float(moved.values[3] - found.values[3])) <= 6e-9


@pytest.mark.parametrize("shape", [torch.zeros(SIZE), torch.eye(SIZE)[0]], ids=["none", "no noise"])
def test_without_a_shape_nothing_moves(shape: Tensor) -> None:
    found, _, _ = noisy(torch.Generator().manual_seed(2))
    assert torch.equal(shrunk(found, shape.double())[0].values, found.values)


def test_bars_of_what_was_moved_cover_wherever_the_truth_is() -> None:
    """By quadrature over the noise: any share kept, any distance u of the truth from the shape."""
    z = np.linspace(-8, 8, 16001)
    weight = norm.pdf(z) / norm.pdf(z).sum()
    for given_up in (0.0, 0.3, 0.7, 1.0):
        for u in (0.0, 1.0, 2.0, 2.5, 3.0, 5.0, 10.0, 30.0):
            moved = np.clip(-given_up * (u + z), -5, 5)
            held = np.abs(z + moved) <= 1.96 * np.hypot(1, moved)
            assert weight @ held >= 0.9499, (given_up, u)  # 1.96 and the grid are rounded


# -- weight decay ----------------------------------------------------------------------------------


def tanh_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def own_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("cross_entropy", {"method": "hutchinson"}),
        ("cross_entropy", {"method": "stratified"}),
        ("cross_entropy", {"method": "deflated"}),
        ("cross_entropy", {"method": "split"}),
        ("cross_entropy", {"method": "hutchinson", "matrix": "ggn"}),
        ("cross_entropy", {"matrix": "ggn"}),
        (own_loss, {}),
        (nn.CrossEntropyLoss(), {"method": "hutchinson"}),
    ],
)
def test_weight_decay_is_in_every_entry(loss: Any, options: dict[str, Any]) -> None:
    """The same probes with and without: entries, sums and means differ by the decay alone."""
    torch.manual_seed(5)
    data = TensorDataset(torch.randn(32, 4), torch.randint(0, 3, (32,)))
    model = tanh_net()
    without, with_decay = (
        hesscli.diagonal(
            hesscli.Problem(model, loss, data, weight_decay=decay), probes=4, **options
        )
        for decay in (0.0, DECAY)
    )
    tight = {"rtol": 0, "atol": 1e-12}
    np.testing.assert_allclose(entries(with_decay), entries(without) + DECAY, **tight)
    for one, other in zip(without.layers, with_decay.layers, strict=True):
        np.testing.assert_allclose(other.mean, one.mean + DECAY, **tight)
        added = DECAY * one.num_parameters
        np.testing.assert_allclose(other.estimate, one.estimate + added, rtol=0, atol=1e-11)


# -- entries that are known ------------------------------------------------------------------------


class Masked(nn.Module):
    """A layer of whose outputs one is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x)) * torch.tensor([1.0, 1.0, 0.0], dtype=x.dtype))


def dead_relu() -> nn.Module:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].bias[2] = -100.0
    return model


@pytest.mark.parametrize("make", [Masked, dead_relu])
@pytest.mark.parametrize("method", ["hutchinson", "auto"])
def test_units_that_do_nothing_have_entries_of_zero(
    make: Callable[[], nn.Module], method: str
) -> None:
    torch.manual_seed(6)
    data = TensorDataset(torch.randn(32, 4), torch.randint(0, 3, (32,)))
    run = hesscli.diagonal(hesscli.Problem(make(), "cross_entropy", data), method=method, probes=2)
    first = next(iter(run.entries))
    assert np.abs(run.entries[first][:2]).max() > 0
    assert np.abs(run.entries[first][2]).max() == 0
    assert np.abs(run.stderr[first][2]).max() == 0


class Normed(nn.Module):
    """Rows of weights divided by their lengths, and a bias in which outputs are linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(3, 4, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


def test_a_bias_that_is_exact_stays_beside_noisy_weights() -> None:
    """Of (y − t)² summed over three outputs in the mean over 3: the bias's entries are 2 / 3."""
    torch.manual_seed(7)
    data = TensorDataset(torch.rand(32, 4).double(), torch.randn(32, 3).double() - 8)
    run = hesscli.diagonal(hesscli.Problem(Normed(), "mse", data), probes=2)
    assert run.diagonal.shrinkage is not None
    assert run.diagonal.shrinkage[0] < 1
    np.testing.assert_allclose(run.entries["bias"], 2 / 3, rtol=1e-12)
    assert run.stderr["bias"].max() == 0
