"""Quadratic forms of single layers' changes on one graph, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

import hesscli
from hesscli.errors import UnsoundError
from hesscli.operators.base import Operator
from hesscli.operators.forms import LayerForms, Layers
from hesscli.operators.matrices import matrix_named
from hesscli.parameters import Parameters


class Twice(nn.Module):
    """A layer that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        again: Tensor = self.conv(torch.tanh(self.conv(x)))
        return again


class Normed(nn.Conv2d):
    """The weight is made of another tensor, on the way to it."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight / self.weight.norm(), self.bias)


def convolutions() -> nn.Module:
    """Run twice, of unit length, grouped, and with batch norm at rest."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = torch.randn(3), torch.rand(3) + 0.5
    inner = nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.Tanh(), Twice())
    return nn.Sequential(
        inner,
        Normed(3, 4, 2),
        nn.Softplus(),
        nn.Conv2d(4, 4, 1, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()


def perceptron() -> nn.Module:
    first = nn.Linear(4, 4)
    tied = nn.Linear(4, 4, bias=False)
    tied.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), tied, nn.LayerNorm(4), nn.Linear(4, 3))


SHAPES = {"convolutions": (convolutions, (2, 5, 5)), "perceptron": (perceptron, (4,))}


def problem_of(name: str) -> hesscli.Problem:
    torch.manual_seed(0)
    make, shape = SHAPES[name]
    data = torch.utils.data.TensorDataset(
        torch.randn(4, *shape, dtype=torch.float64), torch.randint(3, (4,))
    )
    return hesscli.Problem(make().double(), "cross_entropy", data, weight_decay=0.1)


def by_layer(operator: Operator) -> Layers:
    whole = operator.parameters
    return Layers(operator, [Parameters(whole.in_layer(name)) for name in whole.layers])


def forms_of(layers: Layers, blocks: list[Tensor]) -> list[Tensor]:
    """Of the mean over batches; the last layers first, so that no order is taken for granted."""
    total = [torch.zeros(len(block), dtype=torch.float64) for block in blocks]
    for term in layers.operator.batches():
        forms = LayerForms(layers, term.batch)
        for number in reversed(range(len(blocks))):
            total[number] += term.weight * forms(number, blocks[number])
    return total


@pytest.mark.parametrize(
    ("name", "matrix", "mode"),
    [
        ("convolutions", "hessian", "double-backward"),
        ("convolutions", "ggn", "double-backward"),
        ("perceptron", "hessian", "double-backward"),
        ("perceptron", "empirical-fisher", "double-backward"),
        ("perceptron", "hessian", "forward-over-reverse"),
        ("perceptron", "ggn", "forward-over-reverse"),
    ],
)
def test_forms_are_those_of_the_dense_blocks(name: str, matrix: str, mode: str) -> None:
    problem = problem_of(name)
    operator = matrix_named(matrix)(problem, mode=mode)
    layers, places = by_layer(operator), problem.parameters.layer_places()
    blocks = [torch.randn(3, place.stop - place.start).double() for place in places]
    dense = matrix_named(matrix)(problem).to_dense()
    dense.diagonal().sub_(operator.decay)
    for found, block, place in zip(forms_of(layers, blocks), blocks, places, strict=True):
        expected = (block @ dense[place, place] * block).sum(1)
        # Sums of some thousand terms, each within 1e-16 of the largest form.
        size = float(expected.abs().max()) or 1.0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * max(size, 1.0))


def test_one_graph_a_batch_and_the_way_to_the_layer_is_what_counts() -> None:
    """Of four equal layers the k-th from the end takes a product's 2 gradients, k/4 times half."""
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(6, 6, bias=False), nn.Tanh())])
    data = torch.utils.data.TensorDataset(torch.randn(8, 6), torch.randn(8, 6))
    problem = hesscli.Problem(model, "mse", data, examples="all")
    operator = hesscli.Hessian(problem, mode="double-backward")
    forms_of(by_layer(operator), [torch.randn(5, 36)] * 4)
    # The first layer has no input to differentiate by: 7 of 8 passes make a whole way back.
    whole = 1 / 3 + 2 / 3
    products = 5 * sum(2 * (2 / 3) * (k / 7) for k in range(1, 5))
    taken = 8 * problem.share_of(1) * (whole + products)  # each of eight batches is by itself
    assert operator.meter.gradients == pytest.approx(taken)
    assert operator.meter.products == pytest.approx(20)


def test_what_is_not_finite_is_refused() -> None:
    """The root of exactly 0 has an infinite second derivative."""

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.detach()).abs().sqrt() + x

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Root(), nn.Linear(3, 2))
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randint(2, (8,)))
    problem = hesscli.Problem(model, "cross_entropy", data, examples="all")
    layers = by_layer(hesscli.Hessian(problem, mode="double-backward"))
    forms = LayerForms(layers, problem.batch(problem.indices[0]))
    with pytest.raises(UnsoundError, match="not finite"):
        forms(0, torch.ones(1, 12))
