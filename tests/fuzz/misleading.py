"""Functions that autograd is misled about, each beside the same function in plain operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """What the network does, and what it is as a function."""

    misleading: Function
    plain: Function


class HiddenSquare(torch.autograd.Function):
    """x² whose gradient is right, and whose second derivative does not see x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x * x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.x * slope


class HiddenTanh(torch.autograd.Function):
    """tanh whose backward computes with constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = torch.tanh(x).detach()
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * (1 - ctx.y.square())


class HalfHidden(torch.autograd.Function):
    """x³ whose second derivative is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(3)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x.detach() * slope


class Once(torch.autograd.Function):
    """x² that says itself that it has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


class Honest(torch.autograd.Function):
    """x² with a backward that can be differentiated: all is right with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


class Scaled(torch.autograd.Function):
    """The identity with a gradient of another size or sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * slope, None


def square(x: Tensor) -> Tensor:
    return x * x


def same(x: Tensor) -> Tensor:
    return x


def on_some_rows(pair: Pair) -> Pair:
    """Of rows whose first entry is positive; others are passed on."""

    def chosen(function: Function) -> Function:
        return lambda x: torch.where(x[..., :1] > 0, function(x), x)

    return Pair(chosen(pair.misleading), chosen(pair.plain))


def weakly(pair: Pair) -> Pair:
    """A small part of what is passed on."""

    def some(function: Function) -> Function:
        return lambda x: x + 0.1 * function(x)

    return Pair(some(pair.misleading), some(pair.plain))


WRONG_SECOND = {
    "a square": Pair(HiddenSquare.apply, square),
    "tanh": Pair(HiddenTanh.apply, torch.tanh),
    "half of a cube's": Pair(HalfHidden.apply, lambda x: x.pow(3)),
}


def hooked(x: Tensor) -> Tensor:
    """x² whose gradient a hook scales."""
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda slope: 1.5 * slope)
    return x * x


def clipped(x: Tensor) -> Tensor:
    """tanh of a value whose gradient a hook clips."""
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda slope: slope.clamp(-1e-3, 1e-3))
    return x.tanh()


STOPPED = {
    "one of two factors": Pair(lambda x: x * x.detach(), square),
    "a scale": Pair(
        lambda x: x / (1 + x.detach().square().mean(-1, keepdim=True)),
        lambda x: x / (1 + x.square().mean(-1, keepdim=True)),
    ),
    "through .data": Pair(lambda x: x + 0.5 * x.data.tanh(), lambda x: x + 0.5 * x.tanh()),
    "without a gradient": Pair(
        lambda x: x * torch.no_grad()(torch.sigmoid)(x), lambda x: x * x.sigmoid()
    ),
    "through numpy": Pair(
        lambda x: x + torch.from_numpy(x.detach().numpy()).square(), lambda x: x + x.square()
    ),
    "straight through": Pair(
        lambda x: x + ((4 * x).round() / 4 - x).detach(), lambda x: (4 * x).round() / 4
    ),
}
HOOKED = {
    "scaling": Pair(hooked, square),
    "clipping": Pair(clipped, torch.tanh),
    "reversing": Pair(lambda x: Scaled.apply(x.tanh(), -1.0), torch.tanh),
    "doubling": Pair(lambda x: Scaled.apply(x.tanh(), 2.0), torch.tanh),
}

CASTS = {
    "to float32": Pair(lambda x: x.tanh().float().to(x.dtype), torch.tanh),
    "in the middle": Pair(
        lambda x: x.float().exp().sigmoid().to(x.dtype), lambda x: x.exp().sigmoid()
    ),
    "a float32 constant": Pair(
        lambda x: (x.tanh().float() @ torch.eye(x.shape[-1])).to(x.dtype), torch.tanh
    ),
    "through complex numbers": Pair(
        lambda x: torch.fft.irfft(torch.fft.rfft(x.tanh()), n=x.shape[-1]), torch.tanh
    ),
    "by complex modulus": Pair(
        lambda x: torch.complex(x, torch.ones_like(x)).abs(), lambda x: (x.square() + 1).sqrt()
    ),
    "softmax in float32": Pair(
        lambda x: x * F.softmax(x, -1, dtype=torch.float32).type_as(x),
        lambda x: x * F.softmax(x, -1),
    ),
}
"""The function is that of the plain operations, but for rounding to float32."""

FLOAT32_ALONE = {
    "to float32 for good": Pair(lambda x: x.tanh().float(), torch.tanh),
    "times a constant": Pair(lambda x: x.tanh() @ torch.eye(x.shape[-1]), torch.tanh),
    "plus a buffer": Pair(lambda x: torch.ones(1).mul(x.tanh()).float(), torch.tanh),
}
"""What a float32 network may have and no other, since nothing behind it would take its output."""

WITHOUT_SECOND = {
    "hardsigmoid": Pair(F.hardsigmoid, lambda x: (x / 6 + 0.5).clamp(0, 1)),
    "once differentiable": Pair(Once.apply, square),
    "hardswish": Pair(F.hardswish, lambda x: x * (x / 6 + 0.5).clamp(0, 1)),
}
