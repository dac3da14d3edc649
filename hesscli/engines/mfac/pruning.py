"""What weights cost to remove, and how the others make up for it: Optimal Brain Surgeon's step.

To second order the removal of weights Q costs ½ w_Qᵀ ([(F̂ + λI)⁻¹]_QQ)⁻¹ w_Q if the others move by
the best there is (Hassibi & Stork 1993, "Optimal Brain Surgeon"; Singh & Alistarh 2020,
"WoodFisher", arXiv 2004.14340; Frantar, Kurtic & Alistarh 2021, "M-FAC", arXiv 2107.03356).
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from hesscli.engines.mfac.dual import DualBlock
from hesscli.engines.mfac.static import StaticFisher
from hesscli.errors import UnsoundError
from hesscli.meter import OnStep, go_on


def compensation(
    fisher: StaticFisher, weights: Tensor, gone: Tensor, on_step: OnStep = go_on
) -> Tensor:
    """How all others are to move when some weights go to zero together.

    δ = −(F̂ + λI)⁻¹_:Q ([(F̂ + λI)⁻¹]_QQ)⁻¹ w_Q, which is −w_Q in Q, is solved where it is small:
    by what stays, S, it is (F̂_SS + λI) δ_S = F̂_SQ w_Q. The right side is a combination of the
    window's rows, whose solution is one pass over them and is not divided by λ. So it takes no
    longer for a million weights than for one.

    Args:
        fisher: F̂ + λI, whole or by blocks.
        weights: w ``(d,)``.
        gone: which of them go ``(d,)``, boolean.
        on_step: called between blocks; may end it.

    Returns:
        δ, float64 ``(d,)``.

    Raises:
        UnsoundError: λ is lost in rounding.
    """
    removed = torch.where(gone, weights.double(), 0.0)
    change = -removed
    window = fisher.window
    for part in fisher.parts():
        place, own, others = part.columns, removed[None, part.columns], part.without(gone)
        if isinstance(others, DualBlock):
            found, _ = others.combination(window.project(own, place) / window.count)
        else:
            pull = part.multiply(own).masked_fill(gone[None, place], 0.0)  # λw is all in Q
            found, _ = others.solve(pull)
        change[place] += found[0]
        on_step()
    return change


def sum_of_columns(fisher: StaticFisher, weights: Tensor, gone: Tensor) -> Tensor:
    """The same as if each went alone: −Σ_q w_q / [(F̂ + λI)⁻¹]_qq · (F̂ + λI)⁻¹ e_q.

    This is what the authors of M-FAC take (section 4), who then set Q to zero. Where weights that
    go depend on each other it makes up for the same loss several times.

    Args:
        fisher: F̂ + λI.
        weights: w ``(d,)``.
        gone: which of them go ``(d,)``, boolean.

    Returns:
        δ, float64 ``(d,)``, −w_Q in Q.
    """
    removed = torch.where(gone, weights.double(), 0.0)
    change = fisher.ihvp(-removed / fisher.diagonal()).vector
    return torch.where(gone, -removed, change)


def cheapest_patterns(weights: Tensor, inverses: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which weights of each group it costs least to remove together.

    Every choice Q is tried: ½ w_Qᵀ ([(F̂ + λI)⁻¹]_QQ)⁻¹ w_Q.

    Args:
        weights: of each group ``(r, m)``.
        inverses: (F̂ + λI)⁻¹ of each group's columns ``(r, m, m)``.
        count: of a group's weights that are to go.

    Returns:
        The choice ``(r, m)``, boolean, and what it costs ``(r,)``.

    Raises:
        UnsoundError: rounding leaves too little of a group's block.
    """
    weights, costs = weights.double(), []
    patterns = torch.tensor(list(combinations(range(weights.shape[1]), count)), device="cpu")
    for pattern in patterns.to(weights.device):
        lower, info = torch.linalg.cholesky_ex(inverses[:, pattern[:, None], pattern])
        if bool(info.any()):
            raise UnsoundError(
                "rounding leaves nothing of the inverse for a group of entries",
                f"{int((info != 0).sum())} of {len(weights)} groups",
                "a larger --damping, or a smaller --window",
            )
        right = weights[:, pattern, None]
        root: Tensor = torch.linalg.solve_triangular(lower, right, upper=False)
        costs.append(root.square().sum((1, 2)) / 2)
    least, which = torch.stack(costs).min(0)
    chosen = torch.zeros_like(weights, dtype=torch.bool)
    return chosen.scatter_(1, patterns.to(weights.device)[which], True), least
