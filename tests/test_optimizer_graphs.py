"""Losses whose graphs an optimizer cannot differentiate as it must, and what is around a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizing import loss_of, net, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hesscli.errors import UnsoundError, UsageError
from hesscli.optim import MFAC, AdaHessian

both = pytest.mark.parametrize(
    "make",
    [
        lambda params: AdaHessian(params, 0.02),
        lambda params: MFAC(params, 1e-3, window=4, damping=0.1),
    ],
    ids=["adahessian", "mfac"],
)
Make = Callable[[Any], AdaHessian | MFAC]
LABELS = torch.arange(8) % 3


class Recomputed(nn.Module):
    """Layers that are computed again on the way back, of which torch has two kinds."""

    def __init__(self, layers: int, *, old: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rest = nn.Linear(4, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 3))
        self.layers, self.old = layers, old

    def forward(self, x: Tensor) -> Tensor:
        x = self._again(self.first, x) if self.layers & 1 else self.first(x)
        return self._again(self.rest, x) if self.layers & 2 else self.rest(x)

    def _again(self, layer: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(layer, x, use_reentrant=self.old)
        return found


@both
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_whose_gradients_only_backward_makes_are_not_passed_over(
    make: Make, layers: int
) -> None:
    """``autograd.grad`` finds none of their parameters in the graph, or refuses to go through."""
    x = torch.randn(8, 4, requires_grad=True)
    old, new = (Recomputed(layers, old=is_old) for is_old in (True, False))
    plain = Recomputed(0, old=False)
    with pytest.raises(UnsoundError, match=r"backward\(\) alone") as caught:
        make(old.parameters()).step(F.cross_entropy(old(x), LABELS))
    assert "use_reentrant=False" in caught.value.hint
    assert torch.equal(weights(old), weights(plain))
    for model in (new, plain):
        make(model.parameters()).step(F.cross_entropy(model(x), LABELS))
    assert torch.equal(weights(new), weights(plain))


@both
def test_a_loss_of_other_parameters_is_told(make: Make) -> None:
    """As after a model was built anew; a loss that reaches some of them makes a step."""
    model, other = net(), net()
    optimizer = make(model.parameters())
    with pytest.raises(UsageError, match="reaches none of the parameters"):
        optimizer.step(loss_of(other, 0))
    assert optimizer.steps == 0
    optimizer.step(model.scale.square())
    assert optimizer.steps == 1


@both
@pytest.mark.parametrize("around", ["autocast", "another default device"])
def test_a_step_is_the_same_whatever_it_is_within(make: Make, around: str) -> None:
    """Autocast would make its sums in bfloat16; what is put nowhere would be elsewhere."""
    one, other = net(torch.float32), net(torch.float32)
    first, second = make(one.parameters()), make(other.parameters())
    for number in range(6):
        first.step(loss_of(one, number))
        loss = loss_of(other, number)
        if around == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                second.step(loss)
        else:
            with torch.device("meta"):
                second.step(loss)
    assert torch.equal(weights(one), weights(other))


def bags(table: Tensor) -> Tensor:
    return F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), table, mode="mean")


def distances(table: Tensor) -> Tensor:
    return torch.cdist(table, table[:2].detach())


def normed(table: Tensor) -> Tensor:
    """By a kernel of torch's that has a second derivative, and it is wrong."""
    return torch._weight_norm(table, torch.ones(4, 1)) - 1


@pytest.mark.parametrize(
    ("function", "cure"),
    [(bags, "an Embedding"), (distances, "MFAC"), (normed, "direction.norm")],
    ids=["bags", "distances", "weight norm"],
)
def test_what_has_no_second_derivative_is_told_with_what_has(
    function: Callable[[Tensor], Tensor], cure: str
) -> None:
    """Which is, for one, the optimizer that needs none."""
    table = nn.Parameter(torch.randn(4, 3))
    with pytest.raises(UnsoundError, match="differentiated twice") as caught:
        AdaHessian([table]).step(function(table).square().sum())
    assert cure in caught.value.hint
    before = table.detach().clone()
    MFAC([table], window=2).step(function(table).square().sum())
    assert not torch.equal(table, before)
