"""Models that ask for less than float64 on their way, and what they compute once widened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import hesscli
from hesscli.problem.precision import Widened, doubled
from hesscli.problem.problem import Problem

TABLE = torch.linspace(-1, 1, 25).view(5, 5)
"""Numbers in float32 that no module owns."""


class Between(nn.Module):
    """Something between two layers."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(4, 5), between, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.between(torch.tanh(self.first(x)))
        result: Tensor = self.last(h.to(self.last.weight))
        return result


def filled(h: Tensor) -> Tensor:
    room = torch.empty(h.shape)
    room[:] = h
    room.mul_(2.0)
    return room


def in_bfloat16(h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (h @ h.T @ h).float()


Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""Of code as people write it, and what it means."""

NARROW: dict[str, Pair] = {
    "float": (lambda h: h.float(), lambda h: h),
    "half": (lambda h: h.half(), lambda h: h),
    "to": (lambda h: h.to(torch.float32) + 0, lambda h: h),
    "to keyword": (lambda h: h.to(dtype=torch.bfloat16), lambda h: h),
    "type": (lambda h: h.type(torch.float32), lambda h: h),
    "softmax": (lambda h: h.softmax(1, dtype=torch.float32), lambda h: h.softmax(1)),
    "sum": (lambda h: h + h.sum(1, True, dtype=torch.float32), lambda h: h + h.sum(1, True)),
    "eye": (lambda h: h @ torch.eye(5), lambda h: h),
    "constant": (lambda h: h @ TABLE, lambda h: h @ TABLE.to(h)),
    "list": (
        lambda h: torch.cat([h[:, :2], TABLE[:1, 2:].expand(len(h), 3)], 1),
        lambda h: torch.cat([h[:, :2], TABLE[:1, 2:].expand(len(h), 3).to(h)], 1),
    ),
    "functional": (
        lambda h: functional.linear(h, TABLE, TABLE[0]),
        lambda h: functional.linear(h, TABLE.to(h), TABLE[0].to(h)),
    ),
    "complex": (
        lambda h: torch.fft.irfft(torch.fft.rfft(h.float()).to(torch.complex64), n=5),
        lambda h: h,
    ),
    "in place": (filled, lambda h: 2 * h),
    "autocast": (in_bfloat16, lambda h: h @ h.T @ h),
}


def problem_of(model: nn.Module) -> Problem:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(6, 4), torch.randint(0, 3, (6,)))
    return Problem(model, "cross_entropy", data, batch_size=6)


@pytest.mark.parametrize("name", NARROW)
def test_a_widened_model_is_the_one_that_is_meant(name: str) -> None:
    narrow, meant = NARROW[name]
    torch.manual_seed(0)
    model = Between(narrow)
    twin = Between(meant)
    twin.load_state_dict(model.state_dict())
    problem, true = problem_of(model), problem_of(twin.double())
    assert problem.precision.is_float64
    truth = true.sample(6)
    with doubled(problem):
        sample = problem.sample(6)
        loss = problem.evaluate(sample.data)
        # Some fifty operations, each rounded once.
        assert float(loss) == pytest.approx(float(true.evaluate(truth.data)), rel=1e-13)
        with problem.forward_context():
            products = hesscli.Hessian(problem).live(sample)(torch.eye(43, dtype=torch.float64))
    expected = hesscli.Hessian(true).live(truth)(torch.eye(43, dtype=torch.float64))
    torch.testing.assert_close(products, expected, rtol=1e-11, atol=1e-13)


def test_nothing_stays_widened() -> None:
    problem = problem_of(Between(lambda h: h.float()))
    before = copy.deepcopy(problem.model.state_dict())
    with doubled(problem), problem.forward_context():
        assert torch.zeros(1).dtype == torch.float64
        with doubled(problem), problem.forward_context():  # once is enough
            assert torch.zeros(1).float().dtype == torch.float64
    assert torch.zeros(1).dtype == torch.float32
    assert torch.zeros(1).double().float().dtype == torch.float32
    assert problem.dtype == torch.float32
    for name, tensor in problem.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == torch.float32


def test_the_type_of_new_numbers_comes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), Widened():
        _ = 1 / 0
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.view(torch.int64).dtype,
        lambda x: torch.tensor([1, 2]).dtype,
        lambda x: x.long().dtype,
        lambda x: (x > 0).dtype,
        lambda x: x.to(torch.int8).dtype,
    ],
)
def test_what_is_no_floating_number_stays(call: Callable[[Tensor], Any]) -> None:
    x = torch.ones(2, dtype=torch.float64)
    expected = call(x)
    with Widened():
        assert call(x) == expected


def test_a_model_that_casts_is_told_of() -> None:
    result = hesscli.trace(problem_of(Between(lambda h: h.float())), probes=2)
    assert any("float32" in warning and "checked" in warning for warning in result.warnings)
    plain = hesscli.trace(problem_of(Between(torch.tanh)), probes=2)
    assert plain.warnings == ()
