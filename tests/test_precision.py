"""In which type a model computes, whatever else it does with its numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesscli

WIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "comparison": lambda h: h * (h > 0),
    "where": lambda h: torch.where(h < 0.5, h, h.tanh()),
    "number": lambda h: h * float(h.detach().abs().max() > -1),
    "argmax": lambda h: h.gather(1, h.argmax(1, keepdim=True)).expand_as(h),
    "sort": lambda h: h.sort(1).values,
    "integers": lambda h: h + (h.long() - h.long()),
    "finite": lambda h: h if bool(torch.isfinite(h).all()) else 0 * h,
}
NARROW: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda h: h.float(),
    "there and back": lambda h: h.float().to(h.dtype),
    "after a comparison": lambda h: (h * (h > 0)).float().to(h.dtype),
}


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function = nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


def precision(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> torch.dtype:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 4), torch.randint(3, (12,)))
    model = Between(function).to(dtype)
    return hesscli.Problem(model, "cross_entropy", data).precision.plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WIDE)
def test_what_gives_no_numbers_of_its_own_narrows_nothing(name: str, dtype: torch.dtype) -> None:
    assert precision(WIDE[name], dtype) == torch.float64


@pytest.mark.parametrize("name", NARROW)
def test_casts_are_seen(name: str) -> None:
    assert precision(NARROW[name], torch.float64) == torch.float32


@pytest.mark.parametrize("outputs", [3, 300])
def test_a_weight_is_not_made_by_turning_it(outputs: int) -> None:
    """What an example makes grows with its outputs, and not with the weights that make them."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 500), torch.randint(3, (12,)))
    problem = hesscli.Problem(nn.Linear(500, outputs), "cross_entropy", data)
    assert outputs <= problem.precision.numbers < 12 * outputs + 500
    assert outputs <= problem.independence.numbers < 12 * outputs + 500
