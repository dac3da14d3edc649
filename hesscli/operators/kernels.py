"""Convolution and batch norm with a cheap second derivative, and weight norm with a right one.

torch's own double backward of a convolution makes the second weight gradient by a convolution
with kernels as large as the image, and that of batch norm in evaluation mode treats a fixed
affine map as if its statistics could move. Both are right, and together they cost a third of a
convolutional network's product. Inside :func:`twice_differentiable` a convolution's backward is
made of the three kernels that training uses, and batch norm in evaluation mode is the scale and
shift that it is. A weight's norm of torch's own is a constant to the second derivative: here it
is the quotient that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hesscli.problem.convolutions import as_product, met
from hesscli.problem.replacing import replacing
from hesscli.problem.weight_norm import weight_norm
from hesscli.torch_private import viewed

_CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_convolve = torch.ops.aten.convolution
_backward = torch.ops.aten.convolution_backward

_Given = TypeVar("_Given", Tensor, Tensor | None)
Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]
"""Stride, padding, dilation, transposed, output padding, groups, as the kernels take them."""


def twice_differentiable() -> replacing:
    """Meanwhile, convolutions, evaluation-mode batch and weight norms are those of this module.

    Forward mode does not go through them, and a third derivative does not either.
    """
    ours = {function: partial(_convolution, function) for function in _CONVOLUTIONS}
    return replacing({**ours, F.batch_norm: _batch_norm, torch._weight_norm: weight_norm})


_only: frozenset[int] | None = None
"""Where in memory the weights lie whose gradients are wanted; None for all."""


@contextmanager
def only(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Meanwhile, a way back through this module's convolutions makes no other weight's gradient.

    autograd tells its own nodes what nobody has asked for, but not a function of one's own.
    """
    global _only
    before, _only = _only, frozenset(tensor.data_ptr() for tensor in tensors)
    try:
        yield
    finally:
        _only = before


def _is_wanted(weight: Tensor) -> bool:
    """Whether a gradient of it is; what is made of other tensors leads on to them."""
    origin = viewed(weight)
    return _only is None or not origin.is_leaf or origin.data_ptr() in _only


def _leads_nowhere(slope: Tensor) -> bool:
    """Whether it is zero, as all that comes back from the steps of piecewise linear functions is.

    Looked at where some weights alone are wanted, which is where there may be nothing else, and on
    a CPU: elsewhere it would be waited for.
    """
    return _only is not None and slope.device.type == "cpu" and not slope.any()


def _convolution(
    function: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    dims = _CONVOLUTIONS[function]
    if dims == 2:
        product = as_product(input, weight, bias, stride, padding, dilation, groups)
        if product is not None:
            return product
    if isinstance(padding, str) or input.dim() != dims + 2:
        result: Tensor = function(input, weight, bias, stride, padding, dilation, groups)
        return result
    stride, padding, dilation = _each(stride, dims), _each(padding, dims), _each(dilation, dims)
    input, weight, padding = met(input, weight, stride, padding, dilation)
    geometry = stride, padding, dilation, False, [0] * dims, groups
    input, weight, bias = _as_autocast(input), _as_autocast(weight), _as_autocast(bias)
    output: Tensor = _Convolution.apply(input, weight, geometry)  # type: ignore[no-untyped-call]
    return output if bias is None else output + bias.view(-1, *[1] * dims)


def _as_autocast(tensor: _Given) -> _Given:
    """What autocast would give a convolution: its backward must see the same."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (1, -1, *[1] * (input.dim() - 2))
    return input * scale.view(shape) + shift.view(shape)


class _Convolution(torch.autograd.Function):
    """A convolution without bias; saved are its input and weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        output: Tensor = _convolve(input, weight, None, *geometry)
        return output

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        if _leads_nowhere(slopes[0]):
            return None, None, None
        of_input, of_weight = ctx.needs_input_grad[:2]
        needed = of_input, of_weight and _is_wanted(weight)
        arguments = (*slopes, input, weight, ctx.geometry, needed)
        return *_ConvolutionBackward.apply(*arguments), None  # type: ignore[no-untyped-call]


class _ConvolutionBackward(torch.autograd.Function):
    """(slope, input, weight) to the gradients in input and weight: bilinear in each pair."""

    @staticmethod
    def forward(
        ctx: Any,
        slope: Tensor,
        input: Tensor,
        weight: Tensor,
        geometry: Geometry,
        needed: tuple[bool, bool],
    ) -> Any:
        ctx.save_for_backward(slope, input, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _gradients(slope, input, weight, geometry, needed)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        slope, input, weight = ctx.saved_tensors
        along_input, along_weight = tangents
        for_slope = for_input = for_weight = None
        if along_input is not None:
            for_slope = _convolve(along_input, weight, None, *ctx.geometry)
            only_weight = (False, ctx.needs_input_grad[2] and _is_wanted(weight))
            for_weight = _gradients(slope, along_input, weight, ctx.geometry, only_weight)[1]
        if along_weight is not None:
            pushed = _convolve(input, along_weight, None, *ctx.geometry)
            for_slope = pushed if for_slope is None else for_slope + pushed
            only_input = (ctx.needs_input_grad[1], False)
            for_input = _gradients(slope, input, along_weight, ctx.geometry, only_input)[0]
        return for_slope, for_input, for_weight, None, None


def _gradients(
    slope: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in input and weight, None where not needed."""
    if not any(needed):
        return None, None
    mask = [*needed, False]
    in_input, in_weight, _ = _backward(slope, input, weight, None, *geometry, mask)
    return in_input, in_weight


def _each(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))
