"""The inverse's diagonal from some of a window's rows, of many choices of them at once."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.engines.mfac.cholesky import (
    NotPositiveError,
    factorised,
    inverse_lower,
    too_little,
)
from hesscli.engines.mfac.dual import DualBlock
from hesscli.engines.mfac.static import Division, Sizes
from hesscli.engines.mfac.window import GradientWindow
from hesscli.meter import OnStep, go_on

_TOGETHER = 1 << 15
"""Numbers in the matrices of one set that are inverted together."""


def inverse_diagonals(
    window: GradientWindow,
    columns: slice,
    sizes: Sizes,
    damping: float,
    sets: Tensor,
    on_step: OnStep = go_on,
) -> Tensor:
    """Diag (F̂_S + λI)⁻¹ with F̂_S the mean over the rows in S, for each of some sets S.

    Rows are in as many groups as a set has members, slot s in group s modulo their number. Products
    are made once for each group, and a set has the sum of its groups'.

    Args:
        window: the rows.
        columns: a range of whole blocks, of all columns, start and stop given. One that lies in
            a shard is that one's alone; at any other all that share the window work together.
        sizes: of these blocks.
        damping: λ.
        sets: which groups are in each set ``(S, groups)``, boolean.
        on_step: called after some columns; may end it.

    Returns:
        Float64 ``(S, columns)``, of those that the window keeps.

    Raises:
        UnsoundError: λ is lost in rounding.
    """
    kept, division = window.own(columns), Division.of(window, sizes, columns.start)
    width, sets = kept.stop - kept.start, sets.to(window.device)
    found = torch.empty(len(sets), width, dtype=torch.float64, device=window.device)
    for size, where in division.shared:
        place = slice(where.start - kept.start, where.stop - kept.start)
        found[:, place] = _of_a_large_block(window, where, size, damping, sets, on_step)
    own = window.alone()
    with window.apart():
        for size, where in division.runs(window.count, _TOGETHER):
            place = slice(where.start - kept.start, where.stop - kept.start)
            if size <= window.count:
                found[:, place] = _of_small_blocks(own, where, size, damping, sets)
            else:
                found[:, place] = _of_a_large_block(own, where, size, damping, sets, on_step)
            on_step()
    return found


def _of_small_blocks(
    window: GradientWindow, columns: slice, size: int, damping: float, sets: Tensor
) -> Tensor:
    """Of blocks of one size, no more than there are rows: by matrices as large as they."""
    groups, rows = sets.shape[1], window.tile(columns.start, columns.stop)
    each = -(-len(rows) // groups)
    filled = rows.new_zeros(each * groups, rows.shape[1], dtype=torch.float64)
    filled[: len(rows)] = rows  # rows of zeros add nothing
    blocks = filled.view(each, groups, -1, size).permute(1, 2, 0, 3)
    grams = blocks.mT @ blocks
    sums = (_weights(sets, len(rows)) @ grams.flatten(1)).view(len(sets), *grams.shape[1:])
    sums.diagonal(dim1=-2, dim2=-1).add_(damping)
    try:
        lower = factorised(sums).lower
    except NotPositiveError as error:
        raise too_little(damping, error.missing) from error
    return inverse_lower(lower).square_().sum(-2).flatten(1)


def _weights(sets: Tensor, count: int) -> Tensor:
    """What a group's sum of squares weighs in each set's mean ``(S, groups)``."""
    members = torch.arange(count, device=sets.device) % sets.shape[1]
    chosen = sets.double()
    rows = chosen @ torch.bincount(members, minlength=sets.shape[1]).double()
    return chosen / rows[:, None]


def _of_a_large_block(
    window: GradientWindow,
    columns: slice,
    size: int,
    damping: float,
    sets: Tensor,
    on_step: OnStep,
) -> Tensor:
    """Of one with more columns than there are rows, or in shards: by parts of GGᵀ."""
    precise = True if size < 2 * window.count else None
    whole = DualBlock(window, columns, damping, precise, on_step=on_step)
    members = torch.arange(window.count, device=window.device) % sets.shape[1]
    diagonals = []
    for chosen in sets:
        slots = chosen[members].nonzero()[:, 0]
        diagonals.append(whole.select(slots).diagonal[0])
        on_step()
    return torch.stack(diagonals)
