"""Convolutions without the taps that meet padding alone, and in float64 as one matrix product.

Where a deep layer sees one position, as that of a ResNet-18 for ImageNet does on images of 32 × 32,
eight of nine taps of a 3 × 3 kernel meet nothing but zeros: torch multiplies them all the same, and
most of such a network's weights are theirs.

torch has no kernel of its own for float64 on a CPU: it multiplies the weight with one example
after the other, and so reads a deep layer's anew for each, on the way there and back. All
positions of all examples side by side take one product, whose derivatives are products too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hesscli.problem.replacing import replacing


def met(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, list[int]]:
    """The same convolution by what the input meets of the kernel: a view of the weight.

    Returns:
        Input, padded by itself where its sides need other widths, weight, and padding.
    """
    sides = [
        _met(*each)
        for each in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    if all(taps == size for (_, taps, _, _), size in zip(sides, weight.shape[2:], strict=True)):
        return input, weight, list(padding)
    for dim, (first, taps, _, _) in enumerate(sides, 2):
        weight = weight.narrow(dim, first, taps)
    before, after = [side[2] for side in sides], [side[3] for side in sides]
    if before == after and min(before) >= 0:
        return input, weight, before
    widths = [width for pair in zip(before, after, strict=True) for width in reversed(pair)]
    return F.pad(input, widths[::-1]), weight, [0] * len(sides)


@lru_cache(maxsize=256)
def _met(size: int, under: int, move: int, pad: int, step: int) -> tuple[int, int, int, int]:
    """Of one dimension: the first tap that meets the input, how many, and the widths of its sides.

    Widths below 0 are of what no tap that is left comes to.
    """
    last = (size + 2 * pad - step * (under - 1) - 1) // move * move  # where the last output begins
    meeting = []
    for tap in range(under):
        first = max(0, -(-(pad - tap * step) // move) * move)  # no output before it comes in reach
        if first <= last and first + tap * step - pad < size:
            meeting.append(tap)
    if not meeting:
        return 0, under, pad, pad
    first, end = meeting[0], meeting[-1]
    return first, end - first + 1, pad - first * step, last + end * step - pad - (size - 1)


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
    moves, steps = _pair(stride), _pair(dilation)
    input, weight, around = met(input, weight, moves, _pair(padding), steps)
    geometry = (steps, tuple(around), moves)
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
