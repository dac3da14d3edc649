"""What holds for each optimizer: its life in a training loop."""

from __future__ import annotations

import copy
import gc
import io
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizing import Make, batch, chunks, loss_of, net, taken, weights
from torch import Tensor, nn
from torch.nn import functional as F

from hesscli.errors import UsageError
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


def test_what_cannot_be_a_parameter() -> None:
    with pytest.raises(UsageError, match="real"):
        AdaHessian([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


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
