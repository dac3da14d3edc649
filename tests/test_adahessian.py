"""AdaHessian's steps against the published formulas, on naive twins and in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizing import Net, Quadratic, batch, loss_of, net, weights
from test_blocks import block_of
from torch import Tensor, nn
from torch.nn import functional as F

from hesscli.errors import UnsoundError, UsageError
from hesscli.optim import AdaHessian
from hesscli.randomness import key, rademacher

Options = dict[str, Any]
OFFICIAL: Options = {"diagonal": "abs", "blocks": "image"}


class Twin:
    """The formulas, with loops over parameters and blocks."""

    def __init__(self, model: nn.Module, options: Callable[[str], Options], seed: int = 0) -> None:
        self.model, self.seed, self.step_number = model, seed, 0
        self.values = dict(model.named_parameters())
        self.options = {name: self.defaults() | options(name) for name in self.values}
        self.m = {name: torch.zeros_like(p.data) for name, p in self.values.items()}
        self.s = {name: torch.zeros_like(p.data) for name, p in self.values.items()}
        self.updates = 0

    @staticmethod
    def defaults() -> Options:
        return {
            "lr": 0.15, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.0,
            "hessian_power": 1.0, "blocks": "auto", "diagonal": "signed",
        }  # fmt: skip

    def step(self, number: int, every: int = 1, probes: int = 1) -> None:
        images, labels = batch(number)

        loss = F.cross_entropy(self.model(images), labels)
        gradient = derivatives(loss, self.values)
        fresh = self.step_number < every or self.step_number % every == 0
        sums = {name: torch.zeros_like(p.data) for name, p in self.values.items()}
        for probe in range(probes if fresh else 0):
            signs, offset = {}, 0
            stream = key(self.seed, self.step_number, probe)
            for name, p in self.values.items():
                kind = {"dtype": torch.float64, "device": torch.device("cpu")}
                signs[name] = rademacher(stream, offset, p.numel(), **kind).view(p.shape)
                offset += p.numel()
            slope = sum((gradient[name] * signs[name]).sum() for name in self.values)
            products = derivatives(slope, self.values)
            for name in sums:
                sums[name] += signs[name] * products[name].detach() / probes
        self.step_number += 1
        self.updates += fresh
        for name, p in self.values.items():
            if name == "unused":
                continue
            own = self.options[name]
            beta1, beta2 = own["betas"]
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * gradient[name].detach()
            if fresh:
                h = sums[name].abs() if own["diagonal"] == "abs" else sums[name]
                h = averaged(h, own["blocks"])
                self.s[name] = beta2 * self.s[name] + (1 - beta2) * h * h
            first = self.m[name] / (1 - beta1**self.step_number)
            root = self.s[name].sqrt() / math.sqrt(1 - beta2**self.updates)
            change = first / (root ** own["hessian_power"] + own["eps"])
            p.data = p.data - own["lr"] * (change + own["weight_decay"] * p.data)

    def flat(self) -> Tensor:
        return weights(self.model)


def derivatives(value: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(
        value, [*values.values()], create_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(values, found, strict=True))


def averaged(entries: Tensor, rule: str) -> Tensor:
    members: dict[object, list[tuple[int, ...]]] = {}
    for index in np.ndindex(*entries.shape):
        members.setdefault(block_of(index, tuple(entries.shape), rule), []).append(index)
    found = torch.empty_like(entries)
    for indices in members.values():
        mean = sum(float(entries[index]) for index in indices) / len(indices)
        for index in indices:
            found[index] = mean
    return found


def by_part(name: str) -> Options:
    """Groups with options of their own."""
    if name.startswith("head"):
        return {"lr": 0.05, "blocks": "row", "weight_decay": 0.1, "betas": (0.8, 0.99)}
    return {"hessian_power": 0.5} if name.startswith("image") else {}


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"lr": 0.02}, {}),
        ({**OFFICIAL, "weight_decay": 1e-2, "betas": (0.9, 0.98)}, {}),
        ({"diagonal": "abs", "hessian_power": 0.5}, {"hessian_every": 3, "probes": 2}),
    ],
    ids=["paper", "official", "now and then"],
)
def test_a_hundred_steps_are_the_formulas(options: Options, more: dict[str, int]) -> None:
    model = net()
    twin = Twin(net(), lambda _: options)
    optimizer = AdaHessian(model.parameters(), **options, **more)
    for number in range(100):
        optimizer.step(loss_of(model, number))
        twin.step(number, more.get("hessian_every", 1), more.get("probes", 1))
        torch.testing.assert_close(weights(model), twin.flat(), rtol=0, atol=1e-10)
    assert float((twin.flat() - weights(net())).norm()) > 0.1, "it has got somewhere"


def test_groups_have_options_of_their_own_and_schedulers_change_them() -> None:
    """In another order than the model's, in which the official code takes others' gradients."""
    model, twin = net(), Twin(net(), by_part)
    twin.options = {name: own | {"start": own["lr"]} for name, own in twin.options.items()}
    named = dict(model.named_parameters())
    order = sorted(named, key=lambda name: (not name.startswith("head"), name))
    groups = [{"params": [named[name]], **by_part(name)} for name in order]
    optimizer = AdaHessian(groups, lr=0.15, diagonal="signed")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    # Probes are counted in the optimizer's order of parameters.
    twin.values = {name: twin.values[name] for name in order}
    for number in range(20):
        optimizer.step(loss_of(model, number))
        twin.step(number)
        schedule.step()
        for own in twin.options.values():
            own["lr"] = own["start"] * 0.9 ** (number + 1)
        for name, expected in twin.values.items():
            torch.testing.assert_close(named[name], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, OFFICIAL], ids=["paper", "official"])
def test_a_float32_step_from_the_twins_state_is_off_by_no_more_than_rounding(
    options: Options,
) -> None:
    """With u = 2⁻²⁴, to first order and doubled for the rest.

    Sums of d terms are off by (d + 3) u of the sum of their sizes; θ itself by u|θ|. That is
    δg ≤ (d + 4) u (|A||θ| + |b|), and as much of |A| for δh, whose means add 33 u of their own
    size. A root mean square changes by no more than its latest term does times √((1 − β₂) / b₂),
    but for 8 u of itself, and m by (1 − β₁) δg and 4 u of its terms.
    """
    size, u, lr = 240, 2.0**-24, 0.15
    beta1, beta2, eps = 0.9, 0.999, 1e-4
    wide, narrow = Quadratic(size, torch.float64), Quadratic(size, torch.float32)
    twin = AdaHessian(wide.parameters(), **options)
    ours = AdaHessian(narrow.parameters(), **options)
    sizes, meaningful = wide.A.abs(), []
    for number in range(1, 31):
        if number > 1:
            ours.load_state_dict(twin.state_dict())
        before = wide.theta.detach().clone()
        narrow.theta.data.copy_(before)
        twin.step(wide())
        ours.step(narrow())
        x = before.flatten().abs()
        off_g = (size + 4) * u * (sizes @ x + wide.b.abs()).view_as(before)
        off_h = (size + 4 + 33) * u * sizes.sum(1).max()
        state = twin.state[wide.theta]
        bias1, bias2 = 1 - beta1**number, 1 - beta2**number
        m = state["momentum"].abs()
        off_m = (1 - beta1) * off_g + 4 * u * (m + (wide.A @ before.flatten()).view_as(m).abs())
        blocks = {"image": (6, 40, 1), "auto": (6, 2, 32)}[options.get("blocks", "auto")]
        root = state["curvature"].value.view(*blocks[:2], 1).expand(blocks)
        root = root.reshape(6, -1)[:, :40]
        off_root = off_h * math.sqrt((1 - beta2) / bias2) + 8 * u * root
        change = lr * m / bias1 / (root + eps)
        bound = lr * off_m / bias1 / (root + eps) + change * (off_root / (root + eps) + 8 * u)
        bound = 2 * (bound + 2 * u * before.abs())
        off = (narrow.theta.detach().double() - wide.theta.detach()).abs()
        assert bool((off <= bound).all())
        meaningful.append(float((bound / (change + u)).median()))
    assert max(meaningful) < 0.01, "the bound leaves two digits of a step"


def test_a_quadratic_with_a_diagonal_hessian_is_solved_in_one_step_at_any_scale() -> None:
    scales = torch.logspace(-8, 8, 9, dtype=torch.float64)
    x = torch.nn.Parameter(torch.linspace(-3, 5, 9, dtype=torch.float64))
    AdaHessian([x], lr=1.0, eps=0.0).step((scales * (x - 1) ** 2).sum() / 2)
    torch.testing.assert_close(x.detach(), torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-13)


def test_more_probes_lessen_the_noise() -> None:
    """E h² = D² + Var h, and the variance of a mean of P is a P-th."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    A = A + A.T
    exact = A.diagonal()
    noise = A.square().sum(1) - exact.square()
    for probes in (1, 4):
        x = torch.nn.Parameter(torch.zeros(30, dtype=torch.float64))
        optimizer = AdaHessian([x], lr=0.0, probes=probes, betas=(0.9, 0.9999))
        for _ in range(200):
            optimizer.step(x @ (A @ x) / 2)
        square = optimizer.state[x]["curvature"].mean_square
        # Squares have a relative spread of √2, and these are 200 × 30: 2%.
        assert float(((square - exact.square()) / noise).mean()) == pytest.approx(
            1 / probes, rel=0.1
        )


class Once(torch.autograd.Function):
    """Has a gradient, whose own fails as that of fused attention does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Tensor:
        return Never.apply(above)


class Never(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Tensor:
        raise RuntimeError("derivative for this operation is not implemented")


def test_a_second_derivative_that_is_missing() -> None:
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = AdaHessian([x], hessian_every=2)
    with pytest.raises(UnsoundError, match="differentiated twice") as caught:
        optimizer.step(Once.apply(x).square().sum())
    assert caught.value.got == "derivative for this operation is not implemented"
    assert "MFAC" in caught.value.hint


class Marked(torch.autograd.Function):
    """Autograd takes what lies behind it for unused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> Tensor:
        return above.clone()


@pytest.mark.parametrize("inner", [torch.clone, torch.sin], ids=["first", "within"])
def test_a_second_derivative_that_is_left_out_in_silence(
    inner: Callable[[Tensor], Tensor],
) -> None:
    x = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UnsoundError, match="differentiated twice"):
        AdaHessian([x]).step(Marked.apply(inner(x)).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_whose_square_is_too_large_is_never_taken_in(dtype: torch.dtype) -> None:
    """In its mean square it would stay for good, and the parameter where it is."""
    x = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer, size = AdaHessian([x]), 2 * torch.finfo(dtype).max ** 0.5
    with pytest.raises(UnsoundError, match="the square of a product with the Hessian"):
        optimizer.step(size * x.square().sum())
    optimizer.step(size / 8 * x.square().sum())
    assert bool((x < 1).all())


def test_attention_is_differentiated_twice_as_the_hint_says() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 1, batch_first=True)
    tokens, before = torch.randn(2, 3, 4), attention.in_proj_weight.detach().clone()
    optimizer = AdaHessian(attention.parameters())
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
        pytest.raises(UnsoundError) as caught,
    ):
        optimizer.step(attention(tokens, tokens, tokens, need_weights=False)[0].square().mean())
    assert "SDPBackend.MATH" in caught.value.hint
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        optimizer.step(attention(tokens, tokens, tokens, need_weights=False)[0].square().mean())
    assert not torch.equal(attention.in_proj_weight, before)


def test_a_loss_that_is_linear_has_a_hessian_of_zeros() -> None:
    x = torch.nn.Parameter(torch.zeros(3))
    AdaHessian([x], lr=1e-4, eps=1e-4).step((x * torch.tensor([1.0, 2.0, -3.0])).sum())
    torch.testing.assert_close(x.detach(), torch.tensor([-1.0, -2.0, 3.0]))


def test_a_gradient_from_elsewhere_is_no_step_with_a_product() -> None:
    model: Net = net()
    optimizer = AdaHessian(model.parameters(), hessian_every=2)
    loss_of(model, 0).backward()
    with pytest.raises(UsageError, match="without a product"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.accumulate(loss_of(model, 0))
    model.unused.sum().backward()
    with pytest.raises(UsageError, match="without a product"):
        optimizer.step()
    assert torch.equal(weights(model), weights(net())), "nothing has moved"
    optimizer.zero_grad()
    for number in range(3):  # the third begins to go without
        optimizer.step(loss_of(model, number))
    loss_of(model, 3).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1}, {"betas": (0.9, 1.0)}, {"eps": -1e-3}, {"weight_decay": -1},
        {"hessian_power": 2}, {"diagonal": "absolute"}, {"blocks": "rows"},
        {"hessian_every": 0}, {"probes": 0},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_be_meant(options: Options) -> None:
    x = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UsageError):
        AdaHessian([x], **options)
    if not options.keys() & {"hessian_every", "probes"}:
        with pytest.raises(UsageError):
            AdaHessian([{"params": [x], **options}])
