"""Layers that the loss knows nothing of: they matter to nothing, however large their weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesscli

Use = Callable[[nn.Module, Tensor], Tensor | float]


def thrown_away(spare: nn.Module, h: Tensor) -> float:
    spare(h)
    return 0.0


def detached(spare: nn.Module, h: Tensor) -> Tensor:
    return spare(h).detach().sum(1, keepdim=True)


def times_zero(spare: nn.Module, h: Tensor) -> Tensor:
    return 0 * spare(h).sum(1, keepdim=True)


def never_fires(spare: nn.Module, h: Tensor) -> Tensor:
    return torch.relu(spare(h) - 1e4).sum(1, keepdim=True)


class Spare(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use = use
        self.body, self.spare, self.head = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 3)
        with torch.no_grad():
            self.spare.weight *= 10
            self.head.weight *= 0.1

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        return self.head(h) + self.use(self.spare, h)


@pytest.mark.parametrize("rows", ["sampled", "example"])
@pytest.mark.parametrize("use", [thrown_away, detached, times_zero, never_fires])
def test_a_layer_without_effect_ranks_below_all_others(use: Use, rows: str) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,)))
    problem = hesscli.Problem(Spare(use), "cross_entropy", data)
    run = hesscli.sensitivity(problem, window=hesscli.WindowOptions(size=32, rows=rows))
    assert run.ranking is not None
    assert run.ranking.layers[-1] == "spare"
    assert max(run.ranking.above[-1][:-1]) == 0
    assert np.abs(run.saliency["spare.weight"]).max() == 0
    assert np.abs(run.saliency["head.weight"]).min() > 0
    told = [line for line in run.warnings if "does not reach" in line]
    assert bool(told) == (use in (thrown_away, detached))
    assert not any("leverage" in line and "spare" in line for line in run.warnings)
    after = next(layer for layer in run.layers if layer.name == "spare").perturbations
    assert all(abs(change.linear) + abs(change.quadratic) == 0 for change in after)


def test_a_part_of_a_layer_that_is_not_reached_matters_to_nothing() -> None:
    """The bias of a layer that is called without it."""

    class Unbiased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(x @ self.body.weight.T))

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,)))
    problem = hesscli.Problem(Unbiased(), "cross_entropy", data)
    run = hesscli.sensitivity(problem, window=hesscli.WindowOptions(size=32))
    assert np.abs(run.saliency["body.bias"]).max() == 0
    assert np.abs(run.saliency["body.weight"]).min() > 0
