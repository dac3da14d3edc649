"""Gradients that are zero by an invariance are rounding: nobody takes them for wrong ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesscli
from hesscli.problem.problem import Problem

N, POSITIONS, WIDTH = 32, 5, 4


class Head(nn.Module):
    """Attention; a bias of the keys shifts all scores of a query alike."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.keys(x).transpose(1, 2)
        result: Tensor = self.head((scores.softmax(-1) @ self.v(x)).mean(1))
        return result

    def keys(self, x: Tensor) -> Tensor:
        return self.k(x)


class BareBias(Head):
    """The bias of the keys is a parameter of no module of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key_bias = nn.Parameter(torch.randn(WIDTH))

    def keys(self, x: Tensor) -> Tensor:
        return self.k(x) + self.key_bias


class Shifted(nn.Module):
    """A layer of its own whose one parameter a normalisation takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def before_instance_norm() -> nn.Module:
    convolution = nn.Conv1d(POSITIONS, 3, 2)
    return nn.Sequential(
        convolution, nn.InstanceNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 3)
    )


def before_layer_norm() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(20, 6), Shifted(), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)
    )


def before_softmax() -> nn.Module:
    """Scores of classes, shifted alike for all of them."""
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 3), Shifted())


INVARIANT: dict[str, Callable[[], nn.Module]] = {
    "key bias": Head,
    "bare key bias": BareBias,
    "instance norm": before_instance_norm,
    "layer norm": before_layer_norm,
    "softmax": before_softmax,
}


def problem_of(model: nn.Module, dtype: torch.dtype) -> Problem:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(N, POSITIONS, WIDTH), torch.randint(0, 3, (N,)))
    return Problem(model.to(dtype), "cross_entropy", data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", INVARIANT.values(), ids=INVARIANT)
def test_they_do_not_stand_in_the_way_of_exactness(
    build: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    problem = problem_of(build(), dtype)
    dense = hesscli.GaussNewton(problem).to_dense().trace()
    result = hesscli.trace(problem, matrix="ggn")
    assert result.status == "exact"
    # Each entry is a sum over N examples of squares, each rounded some ten times on its way.
    slack = 10 * N * torch.finfo(dtype).eps * float(dense)
    assert abs(result.trace.estimate - float(dense)) <= slack
    assert result.trace.rounding_error <= slack


@pytest.mark.parametrize("build", [Head, BareBias], ids=["by module", "by example"])
def test_they_do_not_stand_in_the_way_of_the_split(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    problem = problem_of(build(), torch.float32)
    assert hesscli.trace(problem, method="split", probes=2).method.name == "split"


# -- modules with a forward of their own ---------------------------------------------------------


class Rows(nn.Conv1d):
    """A convolution of rows that are no images: ``(N, 20)`` to ``(N, 19)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, None])[:, 0]


class Indexed(nn.Embedding):
    """Takes an index of another form than the table does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x > 0).long()).mean((1, 2))


class Transposed(nn.Linear):
    """Takes features first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.T.unflatten(0, (20,)).T)


class Pair(nn.LayerNorm):
    """Normalises a part of what it is given, and more of it than it says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., :WIDTH]) + x[..., WIDTH : 2 * WIDTH]


OWN: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Sequential(nn.Flatten(), Rows(1, 1, 2), nn.Linear(19, 3)),
    "embedding": lambda: nn.Sequential(Indexed(2, 3), nn.Tanh(), nn.Linear(3, 3)),
    "linear": lambda: nn.Sequential(nn.Flatten(), Transposed(20, 4), nn.ReLU(), nn.Linear(4, 3)),
    "norm": lambda: nn.Sequential(nn.Flatten(), Pair(WIDTH), nn.Linear(WIDTH, 3)),
}


@pytest.mark.parametrize("build", OWN.values(), ids=OWN)
def test_subclasses_with_shapes_of_their_own(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    problem = problem_of(build(), torch.float64)
    dense = hesscli.GaussNewton(problem).to_dense().trace()
    result = hesscli.trace(problem, matrix="ggn")
    assert result.status == "exact"
    # Sums over N examples of a few dozen rounded products, in float64.
    assert result.trace.estimate == pytest.approx(float(dense), rel=1e-12)
