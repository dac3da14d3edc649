"""R = H − G, against second derivatives of the loss and Jacobians of the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional
from torch.nn.functional import cross_entropy

from hesscli import GaussNewton, Hessian
from hesscli.errors import UsageError
from hesscli.operators.hessian import Residual
from hesscli.problem.freezing import FrozenData
from hesscli.problem.losses import StepLoss
from hesscli.problem.named_losses import LanguageModel
from hesscli.problem.problem import Problem
from hesscli.vocabulary import MODES

ROUNDING = 1e-12
"""Relative to H: float64, sums of some thousand terms."""
DIFFERENCES = 1e-7
"""h² and ε/h along unit vectors."""


def draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def ragged(*tensors: Tensor) -> FrozenData:
    """Parts of 13, 8 and 3 examples."""
    sizes = [13, 8, 3]
    parts = zip(*(torch.split_with_sizes(t, sizes) for t in tensors), strict=True)
    return FrozenData(tuple(parts), tuple(sizes), 24, True, "by hand")


def second(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """By autograd alone: under vmap, ``torch.func.hessian`` errs for the weight of a LayerNorm."""
    matrix: Tensor = torch.autograd.functional.hessian(function, at)
    return matrix


class Attention(nn.Module):
    """Tokens to logits, by one head with a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.query, self.key, self.value = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        x = x + scores.softmax(2) @ self.value(x)
        result: Tensor = self.head(self.norm(x))
        return result


def perceptron(activation: nn.Module, *last: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 3), *last)


X, LABELS, GOALS = draw(24, 3), torch.arange(24) % 3, draw(24, 3, seed=2)
WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
TOKENS, NEXT = torch.arange(96).view(24, 4) % 5, (torch.arange(96).view(24, 4) ** 2) % 5

# Network, loss, examples, and by torch the loss whose Hessian in the outputs is G's.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor, Tensor, Any]] = {
    "gelu": (
        perceptron(nn.GELU()),
        nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1),
        X,
        LABELS,
        lambda f: cross_entropy(f, LABELS, WEIGHTS, label_smoothing=0.1),
    ),
    "tanh": (perceptron(nn.Tanh()), "mse", X, GOALS, lambda f: functional.mse_loss(f, GOALS)),
    "nll": (
        perceptron(nn.SiLU(), nn.LogSoftmax(1)),
        nn.NLLLoss(WEIGHTS, ignore_index=1),
        X,
        LABELS,
        lambda f: cross_entropy(f, LABELS, WEIGHTS, ignore_index=1),
    ),
    "attention": (
        Attention,
        LanguageModel(),
        TOKENS,
        NEXT,
        lambda f: cross_entropy(f.transpose(1, 2), NEXT),
    ),
    "user": (
        perceptron(nn.Tanh()),
        lambda f, y: (f - y).pow(4).mean(),
        X,
        GOALS,
        lambda f: (f - GOALS).pow(4).mean(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_jacobians_leave_of_second_derivatives(name: str) -> None:
    build, loss, inputs, targets, criterion = CASES[name]
    torch.manual_seed(0)
    model = build().double()
    named = {n: p.detach() for n, p in model.named_parameters()}
    theta = torch.cat([p.reshape(-1) for p in named.values()])

    def outputs(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in named.values()])
        at = {n: v.view(p.shape) for v, (n, p) in zip(parts, named.items(), strict=True)}
        result: Tensor = functional_call(model, at, (inputs,))
        return result

    whole = second(lambda theta: criterion(outputs(theta)), theta)
    jacobian = jacrev(outputs)(theta).reshape(-1, len(theta))
    at = outputs(theta)
    curvature = second(lambda f: criterion(f.view_as(at)), at.reshape(-1))
    expected = whole - jacobian.T @ curvature @ jacobian
    assert float(expected.norm() / whole.norm()) > 0.01

    problem = Problem(model, loss, ragged(inputs, targets), weight_decay=0.125)
    for mode in MODES:
        residual = Residual(problem, mode=mode).to_dense()
        bound = DIFFERENCES if mode == "finite-difference" else ROUNDING
        assert float((residual - expected).norm() / whole.norm()) < bound, mode
        split = GaussNewton(problem, mode=mode).to_dense() + residual
        assert float((Hessian(problem, mode=mode).to_dense() - split).norm()) < bound * float(
            whole.norm()
        ), mode


def test_the_sunspots_sample_splits(sunspots: Problem) -> None:
    """H = G + R with the decay in G and H, as products in every mode and on a selection."""
    vectors = draw(sunspots.parameters.size, 1)
    whole = Hessian(sunspots) @ vectors
    for mode in MODES:
        residual = Residual(sunspots, mode=mode) @ vectors
        split = GaussNewton(sunspots, mode=mode) @ vectors + residual
        bound = DIFFERENCES if mode == "finite-difference" else ROUNDING
        assert float((whole - split).norm() / whole.norm()) < bound, mode
        assert float(residual.norm() / whole.norm()) > 1e-3
    places = [p.offset + i for p in sunspots.parameters.select("hidden2") for i in range(p.numel)]
    embedded = torch.zeros(sunspots.parameters.size, 2, dtype=torch.float64)
    embedded[places] = draw(len(places), 2)
    part = Residual(sunspots).restrict("hidden2") @ embedded[places]
    expected = (Residual(sunspots) @ embedded)[places]
    assert float((part - expected).norm() / expected.norm()) < ROUNDING


def test_losses_of_more_than_the_outputs_are_refused() -> None:
    model = nn.Linear(3, 3).double()

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) + model.weight.square().sum()

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    for loss, got in (
        (penalised, "[loss] 'penalised' reads the model's parameters"),
        (StepLoss(step, "step"), "[loss] step = 'step'"),
    ):
        with pytest.raises(UsageError) as refused:
            Residual(Problem(model, loss, ragged(X, LABELS))).to_dense()
        assert refused.value.got == got
