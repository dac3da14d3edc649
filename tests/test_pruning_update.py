"""How other weights make up for those that go: against dense inverses on the sample."""

from __future__ import annotations

from itertools import accumulate, combinations, pairwise

import pytest
import torch
from mfac_truth import distance
from program import SPEC, SUNSPOTS
from torch import Tensor

import hesscli
from hesscli.engines.mfac import GradientWindow, StaticFisher
from hesscli.engines.mfac.pruning import cheapest_patterns, compensation, sum_of_columns
from hesscli.errors import UnsoundError, UsageError

LAYERS = [234, 76, 5]
BLOCKS = [None, LAYERS, [35] * 9, [105] * 3]
"""Whole, larger and smaller than the window's 256 rows."""


@pytest.fixture(scope="module")
def sunspots() -> tuple[Tensor, Tensor]:
    """Weights ``(d,)``, and gradients ``(n, d)`` of all examples, one backward pass each."""
    problem = hesscli.load(SUNSPOTS, spec=SPEC[1])
    rows = []
    for batch in problem.batches():
        inputs, targets = batch.data
        for x, y in zip(inputs, targets, strict=True):
            loss = torch.nn.functional.mse_loss(problem.model(x), y)
            parts = torch.autograd.grad(loss, list(problem.model.parameters()))
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    parameters = [p.detach().reshape(-1) for p in problem.model.parameters()]
    return torch.cat(parameters), torch.stack(rows)


def dense(rows: Tensor, damping: float, blocks: list[int] | None) -> Tensor:
    """(F̂ + λI)⁻¹, entry by entry."""
    matrix = rows.T @ rows / len(rows)
    if blocks is not None:
        kept = torch.zeros_like(matrix)
        for start, stop in pairwise(accumulate(blocks, initial=0)):
            kept[start:stop, start:stop] = matrix[start:stop, start:stop]
        matrix = kept
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))


@pytest.mark.parametrize("blocks", BLOCKS, ids=["whole", "layers", "35", "105"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_the_update_is_that_of_a_dense_inverse(
    sunspots: tuple[Tensor, Tensor], blocks: list[int] | None, share: float
) -> None:
    weights, rows = sunspots
    window = GradientWindow(len(rows), rows.shape[1], dtype=torch.float64)
    window.extend(rows)
    damping = 1e-3 * window.mean_square() / window.size
    fisher = StaticFisher(window, damping, blocks=blocks)
    inverse = dense(rows, damping, blocks)
    saliency = weights.square() / (2 * inverse.diagonal())
    gone = saliency <= saliency.quantile(share)
    columns = inverse[:, gone]
    exact = -columns @ torch.linalg.solve(columns[gone], weights[gone])
    alone = -(columns / columns[gone].diagonal()) @ weights[gone]
    alone[gone] = -weights[gone]
    found = compensation(fisher, weights, gone)
    assert distance(found, exact) < 1e-8
    assert torch.equal(found[gone], -weights[gone])
    assert distance(sum_of_columns(fisher, weights, gone), alone) < 1e-8


def test_weights_that_no_row_depends_on_move_nothing() -> None:
    window = GradientWindow(4, 6, dtype=torch.float64)
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, :2] = 0
    window.extend(rows)
    gone = torch.tensor([True, True, False, False, False, False])
    change = compensation(StaticFisher(window, 1e-2), torch.ones(6), gone)
    assert change.tolist() == [-1, -1, 0, 0, 0, 0]


def test_a_window_without_columns_reads_zeros_there() -> None:
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    window = GradientWindow(3, 5)
    window.extend(rows)
    masked = window.without(torch.tensor([False, True, False, False, True]))
    assert torch.equal(masked.tile(0, 5), rows * torch.tensor([1.0, 0, 1, 1, 0]))
    assert torch.equal(
        masked.gather(torch.tensor([4, 0])), torch.stack([0 * rows[:, 4], rows[:, 0]], 1)
    )
    kept = rows[:, [0, 2, 3]].double().square().sum(1).mean()
    assert masked.mean_square() == pytest.approx(float(kept), rel=1e-14)
    chosen = masked.select(torch.tensor([2]))
    assert torch.equal(chosen.tile(1, 3), torch.stack([0 * rows[2:, 1], rows[2:, 2]], 1))


def test_damping_that_rounding_swallows_is_refused() -> None:
    window = GradientWindow(8, 4, dtype=torch.float64)
    window.extend(torch.ones(8, 4))
    with pytest.raises(UnsoundError, match="damping"):
        compensation(StaticFisher(window, 1e-20), torch.ones(4), torch.tensor([True] + [False] * 3))


@pytest.mark.parametrize("blocks", [None, [210, 105], [35] * 9], ids=["whole", "parts", "35"])
def test_patterns_of_a_group_cost_what_a_dense_inverse_says(
    sunspots: tuple[Tensor, Tensor], blocks: list[int] | None
) -> None:
    weights, rows = sunspots
    window = GradientWindow(len(rows), rows.shape[1], dtype=torch.float64)
    window.extend(rows)
    damping = 1e-2 * window.mean_square() / window.size
    inverse = dense(rows, damping, blocks)
    found = StaticFisher(window, damping, blocks=blocks).groups(5)
    groups = weights.view(-1, 5)
    for count in (3, 5):
        chosen, costs = cheapest_patterns(groups, found, count)
        for number, (group, block) in enumerate(zip(groups, found, strict=True)):
            own = inverse[5 * number : 5 * number + 5, 5 * number : 5 * number + 5]
            assert distance(block, own) < 1e-8
            by_pattern = {}
            for pattern in combinations(range(5), count):
                q = list(pattern)
                by_pattern[pattern] = 0.5 * group[q] @ torch.linalg.solve(own[q][:, q], group[q])
            best = min(by_pattern, key=by_pattern.__getitem__)
            assert tuple(chosen[number].nonzero()[:, 0].tolist()) == best
            assert float(costs[number]) == pytest.approx(float(by_pattern[best]), rel=1e-8)


def test_groups_that_reach_over_blocks_are_refused() -> None:
    window = GradientWindow(3, 6)
    window.extend(torch.eye(3, 6))
    with pytest.raises(UsageError, match="reach over blocks"):
        StaticFisher(window, 1.0, blocks=[2, 4]).groups(4)
