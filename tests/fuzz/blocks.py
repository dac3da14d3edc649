"""Pieces of networks: each keeps the shape ``(..., width)`` unless its name says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fuzz.dice import Dice

PIECEWISE = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.Identity)
SMOOTH = (nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.ELU, nn.Mish, nn.Softsign)


def activation(dice: Dice) -> nn.Module:
    return dice.one_of(PIECEWISE if dice.chance(0.5) else SMOOTH)()


class Call(nn.Module):
    """A function as a module, beside the modules that it uses."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


class Planted(nn.Module):
    """A function that autograd is misled about, and the same function in plain operations."""

    def __init__(
        self, misleading: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.misleading, self.plain, self.honest = misleading, plain, False

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) if self.honest else self.misleading(x)


class Residual(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).sigmoid()


class Gain(nn.Module):
    """One number for all entries, of any shape that broadcasts: () as well."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full(shape, 1.25))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Shift(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.offsets = nn.ParameterList([nn.Parameter(0.3 * torch.randn(width)), None])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offsets[0]


class Twice(nn.Module):
    """One linear map, used twice."""

    def __init__(self, width: int, between: nn.Module) -> None:
        super().__init__()
        self.inner, self.between = nn.Linear(width, width), between

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.between(self.inner(x)))


class Tied(nn.Module):
    """Down to two and up again by one weight, transposed the second time."""

    def __init__(self, width: int, between: nn.Module) -> None:
        super().__init__()
        self.down, self.between = nn.Linear(width, 2), between
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.between(self.down(x)), self.down.weight.T, self.bias)


class Sharing(nn.Module):
    """Two layers with one and the same parameter object."""

    def __init__(self, width: int, between: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(width, width), nn.Linear(width, width), between
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Reparametrised(nn.Module):
    """A linear map whose weight is a function of its parameter."""

    def __init__(self, width: int, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.raw, self.how = nn.Parameter(0.5 * torch.randn(width, width)), how

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.how(self.raw))


class Symmetric(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return raw.triu() + raw.triu(1).T


def symmetric(width: int) -> nn.Module:
    layer = nn.Linear(width, width)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


class LowRank(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.randn(width, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.u @ self.v.T


class MaxOut(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).unflatten(-1, (2, -1)).amax(-2)


class Quadratic(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Bilinear(width, width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


class Checkpointed(nn.Module):
    """Forgets what it computed, and computes it again in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def batch_norm_in_use(width: int) -> nn.Module:
    """Batch norm with the statistics that it has kept: a fixed affine map."""
    norm = nn.BatchNorm1d(width)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.eval()


def vector_stage(dice: Dice, width: int) -> nn.Module:
    """Of ``(N, width)``, or of any shape that ends in the width."""
    linear = lambda: nn.Linear(width, width, bias=dice.chance(0.7))  # noqa: E731
    return dice.one_of(
        [
            lambda: nn.Sequential(linear(), activation(dice)),
            lambda: nn.Sequential(linear(), activation(dice)),
            lambda: nn.Sequential(linear(), activation(dice)),
            lambda: Residual(linear(), activation(dice)),
            lambda: Residual(activation(dice), linear()),
            lambda: nn.LayerNorm(width),
            lambda: nn.RMSNorm(width),
            lambda: nn.Dropout(0.5),
            lambda: Gain(1),
            lambda: Gain(width),
            lambda: Shift(width),
            lambda: Gated(width),
            lambda: Twice(width, activation(dice)),
            lambda: Tied(width, activation(dice)),
            lambda: Reparametrised(width, dice.one_of([torch.exp, F.softplus, torch.square])),
            lambda: symmetric(width),
            lambda: LowRank(width),
            lambda: MaxOut(width),
            lambda: nn.PReLU(dice.one_of([1, 1])),
            lambda: Checkpointed(nn.Sequential(linear(), activation(dice))),
            lambda: nn.Sequential(frozen(linear()), activation(dice)),
            lambda: Quadratic(width),
        ]
    )()


def row_stage(dice: Dice, width: int) -> nn.Module:
    """Of ``(N, width)`` alone."""
    return dice.one_of(
        [
            lambda: vector_stage(dice, width),
            lambda: vector_stage(dice, width),
            lambda: vector_stage(dice, width),
            lambda: vector_stage(dice, width),
            lambda: batch_norm_in_use(width),
            lambda: nn.GroupNorm(1, width),
            lambda: Call(lambda x: F.normalize(x, dim=1)),
        ]
    )()


class Attention(nn.Module):
    """One head over ``(N, T, width)``, by torch's kernel or by hand."""

    def __init__(self, width: int, by_hand: bool) -> None:
        super().__init__()
        self.qkv, self.by_hand = nn.Linear(width, 3 * width), by_hand

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if not self.by_hand:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v


class Heads(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    """An RNN of any kind, ``(N, T, in)`` to ``(N, T, width)``."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, width: int) -> None:
        super().__init__()
        self.inner = kind(inputs, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class OverTime(nn.Module):
    """A convolution over T of ``(N, T, width)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv1d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


def sequence_stage(dice: Dice, width: int) -> nn.Module:
    """Of ``(N, T, width)``."""
    kinds = (nn.RNN, nn.GRU, nn.LSTM)
    return dice.one_of(
        [
            lambda: Attention(width, dice.chance(0.5)),
            lambda: Heads(width),
            lambda: Recurrent(dice.one_of(kinds), width, width),
            lambda: OverTime(width),
            lambda: vector_stage(dice, width),
            lambda: vector_stage(dice, width),
        ]
    )()


def pooled(dice: Dice) -> nn.Module:
    """``(N, T, width)`` to ``(N, width)``."""
    how: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x.mean(1),
        lambda x: x.amax(1),
        lambda x: x[:, -1],
        lambda x: x.sum(1) / x.shape[1] ** 0.5,
    )
    return Call(dice.one_of(how))
