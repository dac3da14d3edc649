"""Sums of squared products, Σ_{n,c} (Σ_p g_ncop a_npj)², without keeping all that is squared.

Shapes: N examples, C columns, G groups, P positions, J inputs and O outputs of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

CACHE_BYTES = 1 << 21
"""What is worked on at once on a CPU: as much as its second-level cache holds."""
DEVICE_BYTES = 1 << 27
"""The same on an accelerator."""


def room(like: Tensor) -> int:
    """Numbers of a tensor's type that may be worked on at once."""
    bytes_at_once = CACHE_BYTES if like.device.type == "cpu" else DEVICE_BYTES
    return bytes_at_once // like.element_size()


def squared_products(gradients: Tensor, inputs: Tensor) -> Tensor:
    """Σ over examples and columns of the squared per-example weight gradients.

    Args:
        gradients: ``(N, C, G, O, P)`` for C columns, G groups, O outputs and P positions.
        inputs: ``(N, G, P, J)``.

    Returns:
        ``(G, O, J)``, by whichever order of sums takes fewer operations.
    """
    _, columns, _, outputs, positions = gradients.shape
    if pairs_are_cheaper(columns, outputs, positions, inputs.shape[-1]):
        return _by_pairs(gradients, inputs)
    return _by_gradients(gradients, inputs)


def pairs_are_cheaper(columns: int, outputs: int, positions: int, width: int) -> bool:
    """Whether pairs of positions take fewer multiplications than forming the gradients."""
    by_gradients = columns * outputs * width * (positions + 1)
    by_pairs = positions**2 * (columns * outputs + width + outputs * width)
    return by_pairs < by_gradients


def _by_gradients(gradients: Tensor, inputs: Tensor) -> Tensor:
    """Form each example's weight gradients, some outputs at a time where they are many."""
    count, columns, groups, outputs, positions = gradients.shape
    width = inputs.shape[-1]
    tall = max(1, min(outputs, room(gradients) // (count * columns * groups * width)))
    parts = []
    for first in range(0, outputs, tall):
        part = gradients[:, :, :, first : first + tall].transpose(1, 2)
        left = part.reshape(count * groups, -1, positions)
        made = torch.bmm(left, inputs.flatten(0, 1))
        squares = made.square_().view(count, groups, columns, -1, width)
        parts.append(squares.sum((0, 2)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _by_pairs(gradients: Tensor, inputs: Tensor) -> Tensor:
    """(Σ_p g_p a_p)² = Σ_pq (g_p g_q)(a_p a_q): one matrix product over all examples and pairs.

    With one position this is the product of the squares.
    """
    g, a = gradients, inputs
    left = (g[..., None] * g[..., None, :]).sum(1).permute(1, 2, 0, 3, 4).flatten(2)
    right = (a[:, :, None] * a[:, :, :, None]).transpose(0, 1).flatten(1, 3)
    return torch.bmm(left, right).clamp_(min=0)  # squares, but for rounding


def squared_norms(gradients: Tensor, inputs: Tensor) -> Tensor:
    """Σ over columns of the squared norm of each example's weight gradient, ``(N,)``.

    ‖Σ_p g_p a_pᵀ‖² = Σ_pq (g_pᵀg_q)(a_pᵀa_q), which forms no gradient where positions are few
    (Goodfellow 2015, "Efficient per-example gradient computations", for one position; Li et al.
    2022, arXiv 2110.05679, section 4, for many).

    Args:
        gradients: ``(N, C, G, O, P)`` for C columns, G groups, O outputs and P positions.
        inputs: ``(N, G, P, J)``.
    """
    count, columns, groups, outputs, positions = gradients.shape
    width, tall = inputs.shape[-1], columns * outputs
    left = gradients.transpose(1, 2).reshape(count * groups, tall, positions)
    right = inputs.flatten(0, 1)
    if positions**2 * (tall + width) < tall * width * (positions + 1):
        products = torch.bmm(left.transpose(1, 2), left)
        products *= torch.bmm(right, right.transpose(1, 2))
        return products.view(count, -1).sum(1).clamp_(min=0)  # squares, but for rounding
    rows = max(1, min(tall, room(gradients) // (count * groups * width)))
    total = gradients.new_zeros(count)
    for first in range(0, tall, rows):
        made = torch.bmm(left[:, first : first + rows], right)
        total += made.square_().view(count, -1).sum(1)
    return total
