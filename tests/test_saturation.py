"""A loss that has no digit left is said to be so, and one that has some is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesscli


def sure(factor: float, loss: str = "cross_entropy") -> hesscli.Problem:
    """A network that is right about all examples, its logits multiplied."""
    torch.manual_seed(0)
    x, model = torch.randn(32, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        outputs = model(x)
        model[2].weight *= factor
        model[2].bias *= factor
    targets: dict[str, Tensor] = {
        "cross_entropy": outputs.argmax(1),
        "bce_with_logits": (outputs > 0).float(),
    }
    return hesscli.Problem(model, loss, TensorDataset(x, targets[loss]))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits"])
@pytest.mark.parametrize("run", [hesscli.check, hesscli.trace, hesscli.diagonal])
def test_a_saturated_loss_is_said_by_every_command(run, loss: str) -> None:
    result = run(sure(1e7, loss))
    assert result.problem.loss == 0
    assert any("saturated" in text for text in result.warnings)


def test_spectrum_says_so_too() -> None:
    result = hesscli.spectrum(sure(1e7), probes=1, budget=3)
    assert any("saturated" in text for text in result.warnings)


@pytest.mark.parametrize(("factor", "loss"), [(1.0, "cross_entropy"), (100.0, "cross_entropy")])
def test_a_sure_network_is_none(factor: float, loss: str) -> None:
    assert not sure(factor, loss).prove().warnings


def test_a_perfect_fit_of_numbers_is_none() -> None:
    """A squared error of 0 has a Hessian like any other, and no class to be sure of."""
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    problem = hesscli.Problem(model, "mse", TensorDataset(torch.randn(32, 6), torch.zeros(32, 3)))
    assert problem.prove().loss == 0
    assert not problem.prove().warnings
