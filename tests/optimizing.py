"""Small networks and losses for optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """Kernels of both ranks, a matrix with rows of more than a block, vectors, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 2, 3)
        self.line = nn.Conv1d(2, 2, 2)
        self.head = nn.Linear(40, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.image(x)).flatten(2)
        x = torch.tanh(self.line(x))[..., :20].flatten(1)
        return self.head(x) * self.scale


class Quadratic(nn.Module):
    """½ θᵀAθ − bᵀθ, of which every entry is a float32 number."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        A = torch.randn(size, size, generator=generator)
        self.A, self.b = (A + A.T).to(dtype), torch.randn(size, generator=generator).to(dtype)
        self.theta = nn.Parameter(torch.randn(size // 40, 40, generator=generator).to(dtype))

    def forward(self) -> Tensor:
        x = self.theta.flatten()
        return x @ (self.A @ x) / 2 - self.b @ x


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(number: int, count: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(count, 1, 7, 7, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(3, (count,), generator=generator)


def loss_of(model: nn.Module, number: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    images, labels = batch(number, dtype=dtype)
    return F.cross_entropy(model(images), labels)


def taken(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> nn.Module:
    for number in steps:
        optimizer.step(loss_of(model, number))
    return model


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def chunks(number: int, parts: int) -> Iterator[tuple[float, Tensor, Tensor]]:
    """A batch in unequal parts, with each one's share."""
    images, labels = batch(number)
    cuts = [0, *range(1, parts), len(labels)]
    for start, stop in itertools.pairwise(cuts):
        yield (stop - start) / len(labels), images[start:stop], labels[start:stop]


Make = Callable[..., torch.optim.Optimizer]
