"""Operators in Python are checked like a command's, before their first product and once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_wrong_derivatives import LostSecond
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesscli
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.errors import UnsoundError
from hesscli.operators import preflight as checks
from hesscli.problem.problem import Problem

MATRICES = [
    hesscli.Hessian,
    hesscli.GaussNewton,
    hesscli.Fisher,
    hesscli.EmpiricalFisher,
]


def problem_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Problem:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(16, 4), torch.randint(0, 3, (16,)))
    return Problem(model.to(dtype), "cross_entropy", data, weight_decay=0.5)


class Squares(nn.Module):
    """Double backward through its middle is wrong, and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(LostSecond.apply(self.first(x)))
        return result


class Stopped(nn.Module):
    """Its gradient is not that of its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        result: Tensor = self.last(h * h.detach())
        return result


def by_gradients(problem: Problem, step: float = 1e-5) -> np.ndarray:
    """The Hessian by central differences of gradients in float64."""
    twin = copy.deepcopy(problem.model).double()
    tensors = list(twin.parameters())

    def slope() -> Tensor:
        total = torch.zeros(())
        for batch in problem.batches():
            x, y = batch.data
            total = total + batch.weight * nn.functional.cross_entropy(twin(x.double()), y)
        decay = 0.5 * problem.weight_decay * sum(t.square().sum() for t in tensors)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(total + decay, tensors)])

    columns = []
    for tensor in tensors:
        flat = tensor.data.view(-1)
        for i in range(len(flat)):
            kept = float(flat[i])
            flat[i] = kept + step
            ahead = slope()
            flat[i] = kept - step
            columns.append((ahead - slope()) / (2 * step))
            flat[i] = kept
    return torch.stack(columns).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mode_is_the_one_that_passes(dtype: torch.dtype) -> None:
    problem = problem_of(Squares(), dtype)
    operator = hesscli.Hessian(problem)
    dense = operator.to_dense().numpy()
    assert operator.mode == "finite-difference"
    truth = by_gradients(problem)
    # Differences of gradients of order 1: step² and eps / step in either.
    assert np.linalg.norm(dense - truth) <= 1e-6 * np.linalg.norm(truth)
    assert problem.dtype == dtype
    vector = torch.ones(len(dense), dtype=dtype)
    product = operator @ vector
    assert product.dtype == dtype
    slack = 10 * torch.finfo(dtype).eps + 1e-6  # the result's own type
    assert (product.double() - torch.from_numpy(truth).sum(1)).norm() <= slack * np.linalg.norm(
        truth
    ) * len(truth)


def test_a_mode_that_was_asked_for_must_hold() -> None:
    operator = hesscli.Hessian(problem_of(Squares()), mode="double-backward")
    with pytest.raises(UnsoundError, match="no autodiff mode gives this model's curvature"):
        operator.to_dense()
    right = hesscli.Hessian(problem_of(Squares()), mode="finite-difference")
    assert right.mode == "finite-difference"
    assert torch.isfinite(right.to_dense()).all()


USES: dict[str, Callable[[Any], Any]] = {
    "vector": lambda a: a @ torch.ones(a.shape[0]),
    "array": lambda a: a @ np.ones((a.shape[0], 2)),
    "dense": lambda a: a.to_dense(),
    "block": lambda a: a.restrict("last") @ torch.ones(15),
    "engine": lambda a: list(Hutchinson(a, seed=0).extend(2)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_way_to_a_product_is_guarded(matrix: type[Any], use: str) -> None:
    operator = matrix(problem_of(Stopped()))
    with pytest.raises(UnsoundError, match="the gradient is not that of the loss"):
        USES[use](operator)


def test_checks_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    known = checks.preflight

    def counted(problem: Problem, make: type[Any], mode: str, *others: Any) -> Any:
        made.append((make.name, mode))
        return known(problem, make, mode, *others)

    monkeypatch.setattr(checks, "preflight", counted)
    problem = problem_of(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    hesscli.trace(problem, probes=2)
    hesscli.spectrum(problem, steps=2, probes=1)
    operator = hesscli.Hessian(problem)
    operator.to_dense()
    operator.restrict("0").to_dense()
    hesscli.Hessian(problem, mode=operator.mode).to_dense()
    assert made == [("hessian", "auto")]
    hesscli.GaussNewton(problem).to_dense()
    assert made == [("hessian", "auto"), ("ggn", "auto")]
    assert operator.check().checks == hesscli.Hessian(problem).check().checks
