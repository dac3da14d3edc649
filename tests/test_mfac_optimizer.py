"""M-FAC's steps against dense inverses of the same gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mfac_truth import Truth, distance
from optimizing import Quadratic, loss_of, net, taken, weights
from torch import Tensor, nn

from hesscli.engines.mfac.gram import inner_rounding
from hesscli.errors import UnsoundError, UsageError
from hesscli.optim import MFAC


class Twin:
    """(F̂ + λI)⁻¹ g by a dense matrix, of rows in a list."""

    def __init__(self, model: nn.Module, lr: float, momentum: float, decay: float) -> None:
        self.model, self.lr, self.momentum, self.decay = model, lr, momentum, decay
        self.rows: list[Tensor] = []
        self.v: Tensor | float = 0.0

    def step(self, loss: Tensor, window: int, damping: float) -> None:
        parameters = [*self.model.parameters()]
        parts = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        g = torch.cat([part.flatten() for part in parts])
        self.rows = [*self.rows, g][-window:]
        matrix = sum(torch.outer(row, row) for row in self.rows) / len(self.rows)
        y = torch.linalg.solve(matrix + damping * torch.eye(len(g), dtype=g.dtype), g)
        self.v = self.momentum * self.v + (1 - self.momentum) * y
        places = torch.split(self.v, [p.numel() for p in parameters])
        for p, change in zip(parameters, places, strict=True):
            if p is not getattr(self.model, "unused", None):
                p.data = p.data - self.lr * (change.view(p.shape) + self.decay * p.data)


def gradient(model: nn.Module, number: int = 0) -> Tensor:
    parts = torch.autograd.grad(
        loss_of(model, number), [*model.parameters()], materialize_grads=True, allow_unused=True
    )
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize(
    ("window", "momentum", "decay"), [(12, 0.0, 0.0), (12, 0.9, 0.1), (128, 0.0, 0.01)]
)
def test_a_hundred_steps_are_the_formulas(window: int, momentum: float, decay: float) -> None:
    """Of damping 1e-3 of tr F̂/d: while the window fills, and through eight turns of it."""
    model, twin = net(), Twin(net(), 1e-3, momentum, decay)
    g = gradient(model)
    damping = 1e-3 * float(g.square().mean())
    optimizer = MFAC(
        model.parameters(), 1e-3, momentum, decay, window=window, damping=damping
    )  # fmt: skip
    for number in range(100):
        optimizer.step(loss_of(model, number))
        twin.step(loss_of(twin.model, number), window, damping)
        torch.testing.assert_close(weights(model), weights(twin.model), rtol=0, atol=1e-10)
    assert float((weights(model) - weights(net())).norm()) > 0.1, "it has got somewhere"


@pytest.mark.parametrize("relative", [1e-1, 1e-3, 1e-6])
def test_a_step_is_as_near_the_inverse_as_its_condition_lets_it_be(relative: float) -> None:
    """The matrix is of n × n sums of d products, each off by d u of its size: n d κ u in all."""
    model, n = net(), 12
    damping = relative * float(gradient(model).square().mean())
    optimizer = MFAC(model.parameters(), 1e-4, window=n, damping=damping)
    rows: list[Tensor] = []
    for number in range(30):
        rows = [*rows, g := gradient(model, number)][-n:]
        before = weights(model)
        optimizer.step(loss_of(model, number))
        if number not in (0, n - 1, n, 2 * n, 29):  # the first, full, replaced
            continue
        truth = Truth(torch.stack(rows), damping)
        moved = (before - weights(model)) / 1e-4
        expected = truth.solve(g)
        expected[g == 0] = 0  # of what the loss does not reach
        bound = n * len(g) * truth.condition * 2.0**-53
        rounding = float(before.norm()) * 2.0**-53 / 1e-4 / float(moved.norm())
        assert distance(moved, expected) <= bound + rounding


def test_a_float32_step_from_the_twins_state_is_off_by_no_more_than_rounding() -> None:
    """With u = 2⁻²⁴, to first order and doubled for the rest.

    Each gradient is off by δ_i, (d + 4) u (|A||θ| + |b|) in an entry, and y = M⁻¹g, whose M⁻¹ is
    no larger than 1/λ, by ‖δ‖/λ and by 2 ‖g_i‖‖δ_i‖‖y‖/λ on average over the rows. Products of
    rows in float32 do what a row does that is off by as much; y's own sum of n rows n Σ |c_i||g_i|
    is off by (n + 1) u of it.
    """
    size, n, lr, u = 240, 8, 100.0, 2.0**-24
    wide, narrow = Quadratic(size, torch.float64), Quadratic(size, torch.float32)
    damping = 0.1 * float((wide.A @ wide.theta.flatten() - wide.b).detach().square().sum())
    twin, ours = Twin(wide, lr, 0.0, 0.0), MFAC(narrow.parameters(), lr, window=n, damping=damping)
    offs: list[float] = []
    for _ in range(20):
        before = wide.theta.detach().clone()
        narrow.theta.data.copy_(before)
        twin.step(wide(), n, damping)
        ours.step(narrow())
        sizes = wide.A.abs() @ before.flatten().abs() + wide.b.abs()
        offs = [*offs, (size + 4) * u * float(sizes.norm())][-n:]
        G = torch.stack(twin.rows)
        count, norms = len(G), G.norm(dim=1)
        A = G @ G.T + count * damping * torch.eye(count, dtype=G.dtype)
        c = torch.linalg.solve(A, torch.eye(count, dtype=G.dtype)[-1])
        y = count * G.T @ c
        rounded = torch.tensor(offs) + inner_rounding(size, torch.float32) * norms
        bound = (rounded[-1] + 2 * float((norms * rounded).mean() * y.norm())) / damping
        bound += count * (count + 1) * u * float((c.abs() * norms).sum())
        bound = 2 * (lr * float(bound) + 2 * u * float(before.norm()))
        off = float((narrow.theta.detach().double() - wide.theta.detach()).norm())
        assert off <= bound
        assert bound < 0.05 * lr * float(y.norm()), "the bound leaves a digit of a step"


def test_the_window_can_be_left_out_of_a_state() -> None:
    model = net()
    optimizer = MFAC(model.parameters(), window=8, damping=0.1, momentum=0.5)
    taken(model, optimizer, range(10))
    state = optimizer.state_dict(window=False)
    assert state["fisher"] is None
    resumed = MFAC(model.parameters(), lr=1.0, window=8, damping=0.1, momentum=0.5)
    resumed.load_state_dict(state)
    g, before = gradient(model), weights(model)
    v = torch.cat(
        [
            optimizer.state[p]["momentum"].flatten() if p in optimizer.state else torch.zeros(3)
            for p in model.parameters()
        ]
    ).clone()
    resumed.step(loss_of(model, 0))
    expected = before - 1e-3 * (v + g / (g.square().sum() + 0.1)) / 2
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-12)


def test_the_gradient_may_be_made_elsewhere() -> None:
    one, other = net(), net()
    first, second = (MFAC(m.parameters(), window=4, damping=0.1) for m in (one, other))
    for number in range(6):
        first.step(loss_of(one, number))
        second.zero_grad()
        loss_of(other, number).backward()
        second.step()
        # float64 sums in the order of another engine's accumulation
        torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_in_another_type(dtype: torch.dtype) -> None:
    """The inverse is that of the rows as they are kept, of which 2⁻⁹ at most is lost."""
    model = net(torch.float32)
    optimizer = MFAC(model.parameters(), 1.0, window=4, damping=0.1, window_dtype=dtype)
    g, before = gradient(model).double(), weights(model)
    optimizer.step(loss_of(model, 0))
    kept = g.to(dtype).double()
    moved = before - weights(model)
    torch.testing.assert_close(moved, kept / (kept.square().sum() + 0.1), rtol=0, atol=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = net()
    optimizer = MFAC(model.parameters(), window=4, damping=0.1)
    taken(model, optimizer, range(5))
    before, rows = weights(model), optimizer.state_dict()["fisher"]["window"]["rows"].clone()
    with pytest.raises(UnsoundError, match="not finite") as caught:
        optimizer.step(loss_of(model, 5) * math.nan)
    assert "clip" in caught.value.hint
    optimizer.zero_grad()
    assert torch.equal(weights(model), before)
    assert torch.equal(optimizer.state_dict()["fisher"]["window"]["rows"], rows)
    taken(model, optimizer, range(5, 7))


def taken_by(optimizer: MFAC, model: nn.Module) -> MFAC:
    taken(model, optimizer, range(6))
    return optimizer


def test_misuse_is_told_as_options_are_typed_here() -> None:
    model = net()
    for options in ({"window": 0}, {"damping": 0.0}, {"momentum": 1.0}, {"lr": -1.0}):
        with pytest.raises(UsageError):
            MFAC(model.parameters(), **options)
    optimizer = MFAC(model.parameters(), window=4, damping=1e-40)
    optimizer.step(loss_of(model, 0))
    model.load_state_dict(net().state_dict())
    with pytest.raises(UnsoundError, match="lost in rounding") as caught:
        optimizer.step(loss_of(model, 0))
    assert caught.value.hint.startswith("damping=")
    with pytest.raises(UsageError, match="columns"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    state = taken_by(MFAC(model.parameters(), window=4, damping=0.1), model).state_dict()
    for window in (3, 8):
        with pytest.raises(UsageError, match="window of another size") as refused:
            MFAC(model.parameters(), window=window).load_state_dict(state)
        assert "window=4" in refused.value.hint
    state = taken_by(MFAC(model.parameters(), window=9, damping=0.1), model).state_dict()
    with pytest.raises(UsageError, match="window of another size") as refused:
        MFAC(model.parameters(), window=5).load_state_dict(state)
    assert "window=9" in refused.value.hint, "of which 6 were taken"
    huge: Any = MFAC([nn.Parameter(torch.zeros(1 << 20))], window=1 << 30)
    with pytest.raises(UsageError, match="larger than the memory") as told:
        huge.step(huge.param_groups[0]["params"][0].sum())
    assert "window=" in told.value.hint
    assert "--" not in told.value.hint
