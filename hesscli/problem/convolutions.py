"""Convolutions in float64 as one matrix product, where a layer has more outputs than positions.

torch has no kernel of its own for float64 on a CPU: it multiplies the weight with one example
after the other, and so reads a deep layer's anew for each, on the way there and back. All
positions of all examples side by side take one product, whose derivatives are products too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hesscli.problem.replacing import replacing


def as_products() -> replacing:
    """Meanwhile, two-dimensional convolutions are those of :func:`as_product` where they may be."""
    return replacing({F.conv2d: _conv2d})


def _conv2d(*args: Any, **kwargs: Any) -> Tensor:
    product = as_product(*args, **kwargs)
    return F.conv2d(*args, **kwargs) if product is None else product


def as_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """A convolution as a product; None where torch's own takes less, or is of another kind.

    What is copied of the input for it is no larger than the weight.
    """
    if weight.dtype != torch.float64 or weight.device.type != "cpu" or input.dim() != 4:
        return None
    if groups != 1 or isinstance(padding, str):
        return None
    geometry = (_pair(dilation), _pair(padding), _pair(stride))
    outputs, _, *kernel = weight.shape
    height, width = (
        (size + 2 * pad - step * (under - 1) - 1) // move + 1
        for size, under, step, pad, move in zip(input.shape[2:], kernel, *geometry, strict=True)
    )
    if len(input) * height * width > outputs:
        return None
    under = F.unfold(input, tuple(kernel), *geometry).transpose(1, 2)
    made = F.linear(under, weight.flatten(1), bias)
    return made.transpose(1, 2).reshape(len(input), outputs, height, width)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))
