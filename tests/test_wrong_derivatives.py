"""Derivatives that are not the loss's, on all examples or on a few, however the model computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from hesscli.errors import UnsoundError
from hesscli.operators.gauss_newton import GaussNewton
from hesscli.operators.hessian import Hessian
from hesscli.operators.preflight import preflight
from hesscli.operators.products import Apply, flatten, unflatten
from hesscli.problem.losses import StepLoss
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.problem import Problem
from hesscli.vocabulary import Mode

Function = Callable[[Tensor], Tensor]


class LostSecond(torch.autograd.Function):
    """x² with the right gradient, of which the second derivative does not know x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x * x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.x * slope


class Reversed(torch.autograd.Function):
    """The identity with a gradient of the wrong sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return -slope


def hooked(h: Tensor) -> Tensor:
    h = h.clone()
    if h.requires_grad:
        h.register_hook(lambda slope: 1.5 * slope)
    return h * h


def unseen(h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.abs()
    return h * scale


WRONG_GRADIENTS: dict[str, Function] = {
    "reversed": lambda h: Reversed.apply(torch.tanh(3 * h)),
    "hook": hooked,
    "detach": lambda h: h * h.detach(),
    "data": lambda h: h * h.data,
    "no_grad": unseen,
}

BESIDE: dict[str, Function] = {
    "nothing": lambda h: h,
    "cast": lambda h: h.float(),
    "complex": lambda h: torch.fft.irfft(torch.fft.rfft(h), n=3),
    "constant": lambda h: h @ torch.eye(3),
}


class Some(nn.Module):
    """Rows whose first input is positive pass a function, whatever else is beside it."""

    def __init__(self, function: Function, beside: Function, *, on_all: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)
        self.function, self.beside, self.on_all = function, beside, on_all

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        chosen = torch.ones_like(x[:, :1], dtype=torch.bool) if self.on_all else x[:, :1] > 0
        h = self.beside(torch.where(chosen, 2 * self.function(h), h))
        result: Tensor = self.last(h.to(self.last.weight))
        return result


def step(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def problem_of(model: nn.Module, count: int, *, stepwise: bool = False) -> Problem:
    """A tenth of the examples, the last ones, have a positive first input."""
    torch.manual_seed(1)
    x, y = torch.randn(count, 4), torch.randint(0, 3, (count,))
    x[:, 0] = torch.linspace(-9, 1, count)
    if stepwise:
        batches = list(zip(x.split(4), y.split(4), strict=True))
        return Problem(model, StepLoss(step, "step"), batches)
    return Problem(model, "cross_entropy", TensorDataset(x, y))


def model_of(function: Function, beside: str = "nothing", *, on_all: bool = False) -> Some:
    torch.manual_seed(0)
    return Some(function, BESIDE[beside], on_all=on_all)


@pytest.mark.parametrize(("count", "stepwise"), [(10, False), (64, False), (64, True)])
@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_wrong_gradients_of_few_examples_are_refused(name: str, count: int, stepwise: bool) -> None:
    problem = problem_of(model_of(WRONG_GRADIENTS[name]), count, stepwise=stepwise)
    with pytest.raises(UnsoundError, match="the gradient is not that of the loss"):
        preflight(problem, Hessian)


@pytest.mark.parametrize(
    ("name", "beside"), itertools.product(["reversed", "detach"], ["cast", "complex", "constant"])
)
def test_wrong_gradients_beside_narrow_types_are_refused(name: str, beside: str) -> None:
    problem = problem_of(model_of(WRONG_GRADIENTS[name], beside), 20)
    with pytest.raises(UnsoundError, match="the gradient is not that of the loss"):
        preflight(problem, GaussNewton)


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize(("count", "stepwise"), [(10, False), (64, False), (64, True)])
def test_wrong_second_derivatives_give_way_to_differences(
    beside: str, count: int, stepwise: bool
) -> None:
    problem = problem_of(model_of(LostSecond.apply, beside), count, stepwise=stepwise)
    flight = preflight(problem, Hessian)
    assert flight.mode == "finite-difference"
    assert flight.fallback is not None
    assert "differ" in flight.fallback or "symmetric" in flight.fallback


def watched(h: Tensor) -> Tensor:
    """A hook that looks on."""
    h = h.clone()
    if h.requires_grad:
        h.register_hook(lambda slope: None)
    return torch.tanh(h)


RIGHT: dict[str, Function] = {
    "square": lambda h: h * h,
    "kinks": lambda h: torch.relu(h) + h.abs(),
    "maximum": lambda h: torch.maximum(h, h.flip(1)) + h.clamp(-0.1, 0.1),
    "stopped constant": lambda h: h * h.detach().sign().abs(),
    "watched": watched,
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("count", [2, 64])
@pytest.mark.parametrize("name", RIGHT)
def test_right_derivatives_pass(name: str, count: int, beside: str) -> None:
    problem = problem_of(model_of(RIGHT[name], beside, on_all=True), count)
    flight = preflight(problem, Hessian)
    assert (flight.mode, flight.fallback) == ("double-backward", None)
    assert all(check.state != "skipped" for check in flight.checks)


def normalised(h: Tensor) -> Tensor:
    """A layer norm written out."""
    off = h - h.mean(-1, keepdim=True)
    return off / (off.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class ReverseOverForward(Hessian):
    """The gradient of the derivative along a vector: torch errs by a fifth in layer norms."""

    def live(self, batch: WeightedBatch) -> Apply:
        function, tensors = self.parts(batch)
        here = tuple(tensor.detach() for tensor in tensors)

        def product(vector: Tensor) -> Tensor:
            along = tuple(unflatten(vector, tensors))
            slope = torch.func.grad(lambda theta: torch.func.jvp(function, (theta,), (along,))[1])
            return flatten(slope(here))

        return lambda block: torch.stack([*map(product, block)]).detach()


@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse"])
def test_layer_norms_have_the_products_of_what_they_compute(mode: Mode) -> None:
    """Of the same network with its norms written out, by autograd alone and in float64."""
    torch.manual_seed(0)
    norms = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    problem = problem_of(norms, 20)
    first, norm, _, last = norms
    tensors = list(norms.parameters())
    vector = torch.randn(problem.parameters.size, dtype=torch.float64)

    def loss() -> Tensor:
        terms = []
        for batch in problem.batches():
            x, y = batch.data
            h = torch.tanh(norm.weight * normalised(first(x)) + norm.bias)
            terms.append(batch.weight * functional.cross_entropy(last(h), y))
        return torch.stack(terms).sum()

    slope = flatten(torch.autograd.grad(loss(), tensors, create_graph=True))
    wanted = flatten(torch.autograd.grad(slope @ vector, tensors))
    found = Hessian(problem, mode=mode) @ vector
    assert float((found - wanted).norm()) < 1e-10 * float(wanted.norm())
    with pytest.raises(UnsoundError, match=r"symmetric|disagree"):
        preflight(problem, ReverseOverForward, mode=mode)
