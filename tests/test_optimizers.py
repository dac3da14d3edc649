"""What holds for each optimizer: its life in a training loop."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizing import Make, batch, chunks, loss_of, net, taken, weights
from torch import Tensor, nn
from torch.nn import functional as F

from hesscli.errors import UnsoundError, UsageError
from hesscli.optim import MFAC, AdaHessian

MAKES: dict[str, Make] = {
    "adahessian": lambda params, **more: AdaHessian(params, **{"lr": 0.02} | more),
    "now and then": lambda params, **more: AdaHessian(
        params, **{"lr": 0.02, "hessian_every": 3, "diagonal": "abs"} | more
    ),
    "mfac": lambda params, seed=0, **more: MFAC(
        params, **{"lr": 1e-3, "window": 6, "damping": 1e-2, "momentum": 0.5} | more
    ),
    "a wide window": lambda params, seed=0, **more: MFAC(
        params, **{"lr": 1e-2, "window": 200, "damping": 0.1, "momentum": 0.9} | more
    ),
}
every = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As torch reads it without running code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


@every
def test_it_goes_on_from_a_saved_state_to_the_same_bits(make: Make) -> None:
    """Wherever it was cut, between products with the Hessian too."""
    model = net()
    optimizer = make(model.parameters(), seed=5)
    saved = {}
    for number in range(24):
        if number in (1, 2, 11, 17):
            saved[number] = through_a_file([optimizer.state_dict(), model.state_dict()])
        optimizer.step(loss_of(model, number))
    for number, (state, values) in saved.items():
        other = net()
        other.load_state_dict(values)
        resumed = make(other.parameters(), seed=9, lr=9.0)
        resumed.load_state_dict(state)
        taken(other, resumed, range(number, 24))
        assert torch.equal(weights(other), weights(model)), number


@every
def test_a_loaded_state_is_its_own(make: Make) -> None:
    model, other = net(), net()
    one, two = make(model.parameters()), make(other.parameters())
    taken(model, one, range(5))
    state = one.state_dict()
    other.load_state_dict(model.state_dict())
    two.load_state_dict(state)
    taken(other, two, range(5, 9))
    taken(model, one, range(5, 9))
    assert torch.equal(weights(model), weights(other))


@every
def test_a_loss_a_closure_or_parts_of_it(make: Make) -> None:
    """Shares of a batch's parts add up to it: products do so before they are squared.

    Both are sums of eight terms in float64, on which twelve steps build.
    """
    whole, called, parted, summed = (net() for _ in range(4))
    optimizers = [make(model.parameters()) for model in (whole, called, parted, summed)]
    for number in range(12):
        loss = optimizers[0].step(loss_of(whole, number))
        assert loss is not None
        assert not loss.requires_grad
        with torch.no_grad():
            optimizers[1].step(lambda n=number: loss_of(called, n))
        for share, images, labels in chunks(number, 3):
            optimizers[2].accumulate(share * F.cross_entropy(parted(images), labels))
        optimizers[2].step()
        for share, images, labels in chunks(number, 2):
            count = share * 8
            optimizers[3].accumulate(count * F.cross_entropy(summed(images), labels))
        optimizers[3].scale(torch.tensor(1 / 8))
        optimizers[3].step()
        assert torch.equal(weights(whole), weights(called))
        for other in (parted, summed):
            torch.testing.assert_close(weights(other), weights(whole), rtol=0, atol=1e-11)


@every
def test_a_parameter_that_no_loss_reaches_stays_as_it_is(make: Make) -> None:
    """Decay included; one that is frozen for a time comes back."""
    model = net()
    optimizer = make(model.parameters(), weight_decay=0.1)
    taken(model, optimizer, range(4))
    assert torch.equal(model.unused, torch.ones(3).double())
    model.image.requires_grad_(False)
    before = model.image.weight.detach().clone()
    taken(model, optimizer, range(4, 8))
    assert torch.equal(model.image.weight, before)
    model.image.requires_grad_(True)
    taken(model, optimizer, range(8, 12))
    assert not torch.equal(model.image.weight, before)


@every
def test_half_typed_parameters_have_a_state_in_float32(make: Make) -> None:
    model = net(torch.bfloat16)
    optimizer = make(model.parameters())
    taken(model, optimizer, range(4))
    for optimizer_now in (optimizer, make(net(torch.bfloat16).parameters())):
        optimizer_now.load_state_dict(through_a_file(optimizer.state_dict()))
        found = {t.dtype for t in tensors_in(optimizer_now.state_dict()["state"])}
        assert found == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert bool(weights(model).isfinite().all())
    assert not torch.equal(weights(model), weights(net(torch.bfloat16)))


def tensors_in(state: Any) -> list[Tensor]:
    if isinstance(state, dict):
        return [tensor for each in state.values() for tensor in tensors_in(each)]
    return [state] if isinstance(state, Tensor) else []


@pytest.mark.parametrize("name", ["now and then", "mfac"])
def test_a_thousand_steps_take_no_memory_and_leave_no_graph(name: str) -> None:
    """Without a collector of cycles: a graph goes when its loss does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    x, labels = torch.randn(64, 16), torch.arange(64) % 3
    optimizer = MAKES[name](model.parameters())
    for _ in range(20):
        optimizer.step(F.cross_entropy(model(x), labels))
    gc.collect()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            before, tensors = resident(), live_tensors()
            for _ in range(1000):
                loss = Marked.apply(F.cross_entropy(model(x), labels))
                node = weakref.ref(loss.grad_fn)
                optimizer.step(loss)
                del loss
                assert node() is None
            assert live_tensors() == tensors
            assert resident() - before < 8 * 2**20  # 8 kB a step, and a graph keeps 40
    finally:
        gc.enable()


class Marked(torch.autograd.Function):
    """Its node in a graph can be told to be gone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Tensor:
        return above.clone()


def resident() -> int:
    """Bytes that the process takes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


@every
def test_copies_are_whole(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters())
    taken(model, optimizer, range(4))
    twin, own = copy.deepcopy((model, optimizer))
    taken(model, optimizer, range(4, 8))
    taken(twin, own, range(4, 8))
    assert torch.equal(weights(model), weights(twin))


@every
def test_gradients_that_share_memory_or_are_sparse(make: Make) -> None:
    """A sum gives one tensor as the gradient of each term, expanded from a number."""
    a, b = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = make([a, b], lr=1.0)
    optimizer.accumulate((a + b).sum() + (a.square() + b.square()).sum())
    norm = optimizer.clip(1.0)
    assert float(norm) == pytest.approx(6**0.5)
    nn.utils.clip_grad_norm_([a, b], 0.5)
    optimizer.step()
    assert torch.equal(a, b)


@every
def test_what_can_be_a_parameter(make: Make) -> None:
    """Whole numbers have no gradient, and a group that is refused is not taken."""
    codes = nn.Parameter(torch.arange(3), requires_grad=False)
    optimizer = make([codes, weight := nn.Parameter(torch.ones(2))])
    with pytest.raises(UsageError, match="real"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2) * 1j)]})
    assert len(optimizer.param_groups) == 1
    optimizer.step(weight.square().sum())
    assert codes.tolist() == [0, 1, 2]
    assert bool((weight < 1).all())


@every
def test_a_copy_of_a_scheduled_optimizer_steps_by_itself(make: Make) -> None:
    """A scheduler puts a step of its own into the optimizer that it has."""
    model = net()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.step(loss_of(model, 0))
    scheduler.step()
    for twin, own in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        before = weights(model)
        own.step(loss_of(twin, 1))
        assert torch.equal(weights(model), before)
        other, same = copy.deepcopy((model, optimizer))
        same.step(loss_of(other, 1))
        assert torch.equal(weights(other), weights(twin))
        assert not torch.equal(weights(other), before)


def test_a_closure_may_differentiate_its_loss_itself() -> None:
    """As other optimizers want it: M-FAC needs no more, and AdaHessian says that it does."""
    model, other = net(), net()
    one, two = MAKES["mfac"](model.parameters()), MAKES["mfac"](other.parameters())

    def closure(m: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(m, number)
        loss.backward()
        return loss

    for number in range(3):
        one.step(lambda n=number: closure(model, one, n))
        two.step(loss_of(other, number))
    assert torch.equal(weights(model), weights(other))
    three = AdaHessian(model.parameters())
    with pytest.raises(UsageError, match="without a product"):
        three.step(lambda: closure(model, three, 0))
    assert torch.equal(weights(model), weights(other))


@every
@pytest.mark.parametrize("drop", ["the model's gradients", "a step that is not finite"])
def test_what_is_dropped_is_dropped_whole(make: Make, drop: str) -> None:
    model, other = net(), net()
    one, two = make(model.parameters()), make(other.parameters())
    if drop == "the model's gradients":
        one.accumulate(100 * loss_of(model, 0))
        model.zero_grad()
    else:
        for bad in (math.nan, math.inf):
            with pytest.raises(UnsoundError, match="a gradient is not finite"):
                one.step(bad * loss_of(model, 0))
    for number in range(3):
        one.step(loss_of(model, number))
        two.step(loss_of(other, number))
    assert torch.equal(weights(model), weights(other))


@every
def test_a_scaled_loss_makes_the_same_step(make: Make) -> None:
    """A scale is a power of two, and what is too large for it is left out and tried again."""
    model, other = net(), net()
    one, two = make(model.parameters()), make(other.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for number in range(4):
        factor = math.inf if number == 2 else 1.0
        one.accumulate(scaler.scale(factor * loss_of(model, number)))
        scaler.step(one)
        scaler.update()
        if number != 2:
            two.step(loss_of(other, number))
    assert torch.equal(weights(model), weights(other))
    assert scaler.get_scale() == 2.0**15
    one.accumulate(scaler.scale(loss_of(model, 4)))
    with pytest.raises(UsageError, match="GradScaler has not looked at"):
        scaler.step(one, loss_of(model, 4))
    scaler.update()
    one.accumulate(scaler.scale(loss_of(model, 4)))
    scaler.unscale_(one)
    if isinstance(one, MFAC):
        scaler.step(one)
        two.step(loss_of(other, 4))
        assert torch.equal(weights(model), weights(other))
    elif one.steps % one.hessian_every == 0:
        with pytest.raises(UsageError, match="products with the Hessian are scaled"):
            scaler.step(one)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_of_half_typed_parameters_add_up(make: Make, dtype: torch.dtype) -> None:
    """As in float32: each is less than half of what there is between two numbers at 1.

    A loss that is linear in the parameters has the same gradient at both, so that float32 and its
    rounded twin differ by no more than that rounding.
    """
    half, single = nn.Parameter(torch.ones(4, dtype=dtype)), nn.Parameter(torch.ones(4))
    slope = torch.tensor([1.0, -1.0, 0.5, 0.0])
    optimizers = [make([p], weight_decay=1.0) for p in (half, single)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 1e-8 if isinstance(optimizer, AdaHessian) else 1e-4
    for number in range(80):
        for parameter, optimizer in zip((half, single), optimizers, strict=True):
            optimizer.step((slope * parameter).sum())
        if number == 40:
            state = through_a_file(optimizers[0].state_dict())
            optimizers[0] = make([half])
            optimizers[0].load_state_dict(state)
    assert torch.equal(half, single.to(dtype))
    assert not torch.equal(half, torch.ones_like(half))
    with torch.no_grad():
        half.zero_()  # as a mask does: nothing of what was there comes back
    before = optimizers[0].param_groups[0]
    before["lr"] = 0.0
    optimizers[0].step((slope * half).sum())
    assert not bool(half.any())


@every
def test_a_state_of_other_parameters_is_refused(make: Make) -> None:
    """Which broadcasting would take for these."""
    row, matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))
    one = make([row, matrix])
    one.step((row * matrix).square().sum())
    with pytest.raises(UsageError, match="other parameters"):
        make([matrix, row]).load_state_dict(one.state_dict())


def state_of(kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """Of an optimizer that has made two steps by gradients or losses."""
    model = net()
    optimizer = kind(model.parameters(), lr=1e-3)
    for number in range(2):
        if kind is torch.optim.AdamW:
            loss_of(model, number).backward()
            optimizer.step()
        else:
            optimizer.step(loss_of(model, number))
    return optimizer.state_dict()


@pytest.mark.parametrize("own", [AdaHessian, MFAC])
@pytest.mark.parametrize("other", [AdaHessian, MFAC, torch.optim.AdamW])
def test_a_state_of_another_optimizer_is_refused_and_changes_nothing(own: Any, other: Any) -> None:
    model = net()
    optimizer = own(model.parameters(), lr=0.5)
    if own is other:
        optimizer.load_state_dict(state_of(other))
        assert optimizer.steps == 2
        return
    with pytest.raises(UsageError, match="another optimizer") as refused:
        optimizer.load_state_dict(state_of(other))
    assert own.__name__ in refused.value.hint
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.steps == 0


@every
def test_a_loss_that_cannot_be_differentiated_says_why(make: Make) -> None:
    model = net()
    optimizer, before = make(model.parameters()), weights(model)
    images, labels = batch(0)
    with pytest.raises(UsageError, match="one number") as refused:
        optimizer.step(F.cross_entropy(model(images), labels, reduction="none"))
    assert "(8,)" in refused.value.got
    loss = loss_of(model, 0)
    loss.backward()
    with pytest.raises(UsageError, match="differentiated already") as refused:
        optimizer.step(loss)
    assert "without backward()" in refused.value.hint
    with torch.no_grad():
        loss = loss_of(model, 0)
    with pytest.raises(UsageError, match="no gradient"):
        optimizer.step(loss)
    assert torch.equal(weights(model), before)
    optimizer.step(loss_of(model, 0))  # nothing of them is left


def test_what_is_printed_has_every_option() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    shown = repr(MFAC(parameters, lr=0.25, window=7, damping=0.125)).splitlines()
    assert shown[:3] == ["MFAC (", "window: 7", "damping: 0.125"]
    assert "    lr: 0.25" in shown
    shown = repr(AdaHessian(parameters, hessian_every=3)).splitlines()
    assert "hessian_every: 3" in shown


def test_gradients_that_autograd_takes_for_constant_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    loss = torch.tanh(table(torch.arange(4))).square().sum()
    with pytest.raises(UnsoundError, match="sparse"):
        AdaHessian(table.parameters()).step(loss)
    assert table.weight.grad is None
    optimizer = MFAC(table.parameters())
    optimizer.step(torch.tanh(table(torch.arange(4))).square().sum())
    table.requires_grad_(False)
    with pytest.raises(UsageError, match="all parameters are frozen"):
        optimizer.step(loss)


def test_clipping_reaches_the_hessian() -> None:
    """Without ε a step is as long at any scale of the loss: so it is at any clipping."""
    plain, clipped, scaled = net(), net(), net()
    one, two, three = (AdaHessian(m.parameters(), 0.02, eps=0.0) for m in (plain, clipped, scaled))
    for number in range(3):
        one.step(loss_of(plain, 0))
        images, labels = batch(0)
        two.accumulate(F.cross_entropy(clipped(images), labels))
        exact = torch.cat([p.grad.flatten() for p in clipped.parameters() if p.grad is not None])
        norm = two.clip(1e-3)
        assert float(norm) == pytest.approx(float(exact.norm()), rel=1e-6), number
        after = torch.cat([p.grad.flatten() for p in clipped.parameters() if p.grad is not None])
        assert float(after.norm()) == pytest.approx(1e-3, rel=1e-6)
        two.step()
        three.step(1024 * loss_of(scaled, 0))
        if number == 0:  # later, the clipped steps weigh differently in the means
            torch.testing.assert_close(weights(clipped), weights(plain), rtol=0, atol=1e-6)
        torch.testing.assert_close(weights(scaled), weights(plain), rtol=0, atol=1e-9)
