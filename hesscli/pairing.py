"""The inner product of outputs and weights, as a root for autograd that costs nothing.

``torch.autograd.grad(outputs, tensors, weights)`` would do the same, but to compare shapes that
may be symbolic it imports a computer algebra system on its first call: a third of what torch
itself takes to start. A scalar root needs no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Pairing(torch.autograd.Function):
    """Its value is not made: the gradients of ⟨outputs, weights⟩ in outputs are the weights."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.count = count
        ctx.save_for_backward(*tensors[count:])
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.saved_tensors, *[None] * ctx.count


class _Weightless(torch.autograd.Function):
    """The identity, of whose values none is kept."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.new_zeros(()).expand(tensor.shape) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, ...]:
        return slopes


def weightless(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """What stands for outputs where only their graphs are wanted, and takes no memory.

    To be paired all at once: what leads to one of them is gone through for any of them.
    """
    found: Sequence[Tensor] = _Weightless.apply(*outputs)  # type: ignore[no-untyped-call]
    return found


def paired(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A scalar whose gradient is that of Σ ⟨outputs, weights⟩, twice differentiable in the weights.

    Its own value is 0, and it is meant to be differentiated as a root: nothing may be made of it.

    Args:
        outputs: at least one, each with a graph.
        weights: of the outputs' shapes.
    """
    root: Tensor = _Pairing.apply(len(outputs), *outputs, *weights)  # type: ignore[no-untyped-call]
    return root
