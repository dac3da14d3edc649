"""Products that are NaN though loss and gradient are finite: found at once, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesscli
from hesscli.errors import UnsoundError
from hesscli.problem.problem import Problem


class OfLength(nn.Module):
    """A head on something of a linear map's rows that has no second derivative at 0."""

    def __init__(self, size: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.size = size
        self.a, self.b = nn.Linear(6, 5, bias=False), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.size(self.a(x)))
        return result


SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda h: h.norm(dim=1, keepdim=True),
    "power": lambda h: h.abs().sum(1, keepdim=True) ** 1.5,
    "distance": lambda h: torch.cdist(h, torch.zeros(1, 5, dtype=h.dtype)),
}


def problem_of(size: str, count: int, zero: int) -> Problem:
    """One of the examples is zero, and stays so whatever the weights."""
    torch.manual_seed(0)
    x, y = torch.randn(count, 6), torch.randint(0, 3, (count,))
    x[zero] = 0
    model = OfLength(SIZES[size]).double()
    return Problem(model, "cross_entropy", TensorDataset(x.double(), y), batch_size=64)


@pytest.mark.parametrize("command", [hesscli.trace, hesscli.diagonal, hesscli.spectrum])
def test_the_first_product_that_is_not_finite_ends_the_run(
    command: Callable[..., object],
) -> None:
    """Where the example is one of so many that no check has seen it."""
    problem = problem_of("norm", 4000, zero=1234)
    options = {} if command is hesscli.spectrum else {"method": "hutchinson"}
    with pytest.raises(UnsoundError) as refused:
        command(problem, **options)
    assert refused.value.what == "a curvature product is not finite"
    assert "--mode finite-difference" in refused.value.hint


def test_a_type_that_overflows_is_named() -> None:
    """Squares of 1e20 do not fit into float32, in products alone."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (1e-10 * (1e15 * outputs).square().square()).mean() * 1e-25

    torch.manual_seed(0)
    data = TensorDataset(1e-4 * torch.randn(4000, 2), torch.zeros(4000, 1))
    data.tensors[0][1234] = 1e3
    problem = Problem(nn.Linear(2, 1), loss, data)
    with pytest.raises(UnsoundError) as refused:
        hesscli.trace(problem, method="hutchinson", probes=2)
    assert "float64" in refused.value.hint
