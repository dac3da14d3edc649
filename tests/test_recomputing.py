"""Blocks that are run again give the same derivatives, of far less that is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import hesscli
from hesscli.errors import UsageError
from hesscli.operators.products import work
from hesscli.problem.recomputing import blocks_of

Given = tuple[nn.Module, Any, Any]


class Attention(nn.Module):
    """Masked, called with a keyword, and returning more than a tensor, as others' blocks do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None
    ) -> tuple[Tensor, None, list[Tensor]]:
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.mlp(x), None, [x.mean((1, 2))]


class Transformer(nn.Module):
    """Its last block is its first once more, and one weight is frozen."""

    def __init__(self, depth: int = 2, width: int = 4) -> None:
        super().__init__()
        self.start = nn.Linear(2, width)
        self.layers = nn.ModuleList(Attention(width) for _ in range(depth))
        self.end = nn.Linear(width, 3)
        self.layers[-1].mix.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x, more = self.start(x), x.new_zeros(len(x))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        for layer in [*self.layers, self.layers[0]]:
            x, _, (mean,) = layer(x, mask=mask)
            more = more + mean
        found: Tensor = self.end(x[:, -1]) * more.tanh()[:, None]
        return found


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.softplus(self.norm(self.one(x)))


class Random(nn.Module):
    """Dropout that is the same in each pass, since the model seeds it."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(share), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


class Seeded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.end = nn.Sequential(Random(0.5), Random(0.5)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        found: Tensor = self.end(self.rows(x))
        return found


def attention() -> Given:
    return Transformer().eval(), torch.randn(6, 5, 2), torch.randint(3, (6,))


def residual() -> Given:
    """Batch norm by the statistics of the batch."""
    stem, end = nn.Conv2d(1, 2, 3), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)]
    rows = nn.Sequential(Residual(), Residual())
    return nn.Sequential(stem, rows, *end).train(), torch.randn(6, 1, 6, 6), torch.randint(3, (6,))


def seeded() -> Given:
    return Seeded().train(), torch.randn(6, 4), torch.randint(3, (6,))


NETWORKS: list[Callable[[], Given]] = [attention, residual, seeded]


def given(make: Callable[[], Given]) -> Given:
    torch.manual_seed(0)
    model, inputs, targets = make()
    return model.double(), inputs.double(), targets


def truth(model: nn.Module, inputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
    """Hv of the mean cross-entropy by differentiating twice."""
    tensors = [p for p in model.parameters() if p.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = F.cross_entropy(model(inputs), targets)
    slopes = torch.autograd.grad(loss, tensors, create_graph=True)
    flat = torch.cat([slope.flatten() for slope in slopes])
    return torch.cat([h.flatten() for h in torch.autograd.grad(flat @ vector, tensors)])


@pytest.mark.parametrize("make", NETWORKS)
def test_products_and_gradients_are_the_same(make: Callable[[], Given]) -> None:
    model, inputs, targets = given(make)
    before = copy.deepcopy(model.state_dict())
    problem = hesscli.Problem(
        model, "cross_entropy", (inputs, targets), batch_size=6, checkpoint_activations=True
    )
    assert blocks_of(model) == list(problem.blocks)
    plain = hesscli.Problem(copy.deepcopy(model), "cross_entropy", (inputs, targets), batch_size=6)
    torch.testing.assert_close(problem.prove().gradient, plain.prove().gradient)
    assert problem.prove().unreached == plain.prove().unreached
    vector = torch.randn(problem.parameters.size, dtype=torch.float64)
    batches = map(torch.cat, zip(*problem.data.batches, strict=True))  # in the order of dropout
    expected = truth(copy.deepcopy(model), *batches, vector)
    found = hesscli.Hessian(problem) @ vector
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.norm()))
    ggn = hesscli.GaussNewton(plain) @ vector
    found = hesscli.GaussNewton(problem) @ vector
    torch.testing.assert_close(found, ggn, rtol=1e-9, atol=1e-9 * float(ggn.norm()))
    differences = hesscli.Hessian(problem, mode="finite-difference") @ vector
    torch.testing.assert_close(differences, expected, rtol=0, atol=1e-6 * float(expected.norm()))
    assert all("forward" not in block.__dict__ for block in problem.blocks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Normed(nn.Module):
    """torch's kernel has a wrong second derivative, in whose place another function stands."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


def test_what_is_run_again_is_made_of_the_same_functions() -> None:
    """Autograd leaves all function modes on its way back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Normed(), Normed()), nn.Linear(4, 3)).double()
    data = torch.randn(6, 4).double(), torch.randint(3, (6,))
    once, again = (
        hesscli.Hessian(
            hesscli.Problem(model, "cross_entropy", data, checkpoint_activations=is_again),
            mode="double-backward",
        ).to_dense()
        for is_again in (False, True)
    )
    torch.testing.assert_close(again, once, rtol=0, atol=1e-13 * float(once.norm()))


COMMANDS: list[Callable[..., Any]] = [
    partial(hesscli.trace, method="hutchinson", probes=2),
    partial(hesscli.trace, matrix="ggn"),
    partial(hesscli.sensitivity, window=hesscli.WindowOptions(size=16)),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_the_same(command: Callable[..., Any]) -> None:
    """Whatever looks at single examples or at graphs does so as ever."""
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        rows = nn.Sequential(Random(0), Random(0))
        model = nn.Sequential(nn.Linear(4, 4), rows, nn.Linear(4, 3)).double()
        data = torch.randn(16, 4).double(), torch.randint(3, (16,))
        problem = hesscli.Problem(model, "cross_entropy", data, checkpoint_activations=again)
        found.append(command(problem, budget=None))
    one, other = found
    for layer, its in zip(one.layers, other.layers, strict=True):
        for name in ("estimate", "leverage"):
            if hasattr(layer, name):
                assert getattr(its, name) == pytest.approx(getattr(layer, name), rel=1e-8)
    assert one.cost.products == other.cost.products
    assert one.cost.gradients < other.cost.gradients < 2 * one.cost.gradients


class Held:
    """A tensor that a graph keeps, as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_by_a_graph(depth: int, *, again: bool) -> int:
    """Bytes that the graph of a product keeps, the weights apart."""
    torch.manual_seed(0)
    model, alive = Transformer(depth, 8).eval(), WeakSet[Held]()
    data = torch.randn(4, 32, 2), torch.randint(3, (4,))
    problem = hesscli.Problem(model, "cross_entropy", data, checkpoint_activations=again)
    operator = hesscli.Hessian(problem, mode="double-backward")

    def hold(tensor: Tensor) -> Held:
        alive.add(held := Held(tensor))
        return held

    keeping = torch.autograd.graph.saved_tensors_hooks(hold, lambda held: held.tensor)
    with problem.forward_context(), keeping:
        graph = operator.live(problem.batch(0))
    storages = [held.tensor.untyped_storage() for held in alive]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    del graph
    return sum(size for address, size in sizes.items() if address not in weights)


def test_a_block_keeps_what_it_is_given_and_what_comes_back() -> None:
    """Else it keeps queries, keys, values, what is normed, and a layer twice as wide."""
    each = 4 * 32 * 8 * 4  # examples, places, width, and bytes
    more = {
        again: (kept_by_a_graph(12, again=again) - kept_by_a_graph(4, again=again)) / 8
        for again in (False, True)
    }
    assert more[True] <= 2 * each + 64  # and some numbers an example
    assert more[False] > (3 + 1 + 2) * each


class Told(nn.Module):
    """A block that does something beside making an output of its input."""

    seen: Any = None

    def __init__(self, does: str) -> None:
        super().__init__()
        self.does, self.inner, self.calls = does, nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.does == "changes":
            x.mul_(2)
        scale = 1.0
        if self.does == "remembers":
            scale, Told.seen = (1.0 if Told.seen is None else Told.seen), x.detach().mean() + 2
        if self.does == "leaves" and Told.seen is not None:
            x = x + Told.seen
        found: Tensor = scale * self.inner(x).tanh()
        Told.seen = found if self.does == "leaves" else Told.seen
        return found


class Telling(nn.Module):
    def __init__(self, does: str) -> None:
        super().__init__()
        self.first, self.end = nn.Linear(3, 3), nn.Linear(3, 3)
        self.rows = nn.Sequential(Told(does), Told(does))

    def forward(self, x: Tensor) -> Tensor:
        Told.seen = None
        x = self.first(x)
        if self.rows[0].does == "is not called":
            x = self.rows[1].inner(self.rows[0].inner(x))
        else:
            x = self.rows(x)
        found: Tensor = self.end(x)
        return found


@pytest.mark.parametrize("does", ["remembers", "leaves", "changes", "is not called"])
def test_blocks_that_are_no_functions_are_refused(does: str) -> None:
    torch.manual_seed(0)
    data = torch.randn(8, 3).double(), torch.randint(3, (8,))
    problem = hesscli.Problem(
        Telling(does).double(), "cross_entropy", data, checkpoint_activations=True
    )
    with pytest.raises(UsageError, match="cannot be run again by themselves") as refusal:
        problem.prove()
    assert "no --checkpoint-activations" in refusal.value.hint


def test_what_cannot_be_had_is_refused_in_three_lines() -> None:
    with pytest.raises(UsageError, match="finds no blocks") as refusal:
        hesscli.Problem(
            nn.Sequential(nn.Linear(3, 3)),
            "mse",
            (torch.randn(4, 3), torch.randn(4, 3)),
            checkpoint_activations=True,
        )
    assert "Sequential" in refusal.value.got
    model, inputs, targets = given(seeded)
    problem = hesscli.Problem(
        model, "cross_entropy", (inputs, targets), checkpoint_activations=True
    )
    with pytest.raises(UsageError, match="for products by passes back"):
        hesscli.trace(problem, mode="forward-over-reverse")


def test_what_is_run_again_is_counted() -> None:
    """A forward pass for a gradient, and for a product a way back besides, which may be short."""
    (graph, product), (more, again) = (
        work("hessian", "double-backward", 0.5, again=each) for each in (False, True)
    )
    assert more - graph == pytest.approx(1 / 3)
    assert again - product == pytest.approx(1 / 3 + 0.5)
