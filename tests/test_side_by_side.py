"""Vectors that go through a graph side by side have the products that they have alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hesscli
from hesscli.operators.at_once import vectors_at_once
from hesscli.operators.base import LiveTerm
from hesscli.operators.curvature import Curvature
from hesscli.problem.batches import near

SAMPLES = Path(__file__).parents[1] / "samples"
MATRICES = [hesscli.Hessian, hesscli.GaussNewton, hesscli.EmpiricalFisher]


class Odd(nn.Module):
    """A scalar parameter, one that nothing reaches, and a last bias without second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale, self.unused = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.scale * self.first(x)))


def odd(loss: str) -> hesscli.Problem:
    torch.manual_seed(0)
    x = torch.randn(12, 4, dtype=torch.float64)
    y = torch.randint(3, (12,)) if loss == "cross_entropy" else torch.randn(12, 3).double()
    return hesscli.Problem(Odd().double(), loss, [(x, y)])


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_products_side_by_side_are_columns_of_the_matrix(
    matrix: type[Curvature], loss: str
) -> None:
    """Every column, to the rounding of a product of this size."""
    operator = matrix(odd(loss), mode="double-backward")
    identity = torch.eye(operator.parameters.size, dtype=torch.float64)
    batch = operator.problem.batch(0)
    alone, together = operator.live(batch), operator.live(batch, side_by_side=True)
    expected = alone(identity)
    assert len(identity) > 1
    assert float((together(identity) - expected).norm()) <= 1e-13 * float(expected.norm())


@pytest.mark.parametrize("checkpoint", ["fashion/model.pt", "text/model.safetensors"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_convolutions_and_attention_go_side_by_side(
    matrix: type[Curvature], checkpoint: str
) -> None:
    problem = hesscli.load(SAMPLES / checkpoint, examples=16, dtype="float64", trust=True)
    operator = matrix(problem, mode="double-backward")
    block = torch.randn(3, operator.parameters.size, dtype=torch.float64)
    batch = problem.batch(0)
    with problem.forward_context():
        expected = operator.live(batch)(block)
        found = operator.live(batch, side_by_side=True)(block)
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())


def test_passes_back_go_one_by_one_on_a_cpu() -> None:
    assert vectors_at_once(hesscli.Hessian(odd("mse"), mode="double-backward")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_takes_many_vectors_of_a_small_network_at_once() -> None:
    problem = hesscli.load(SAMPLES / "text/model.safetensors", device="cuda", trust=True)
    operator = hesscli.Hessian(problem)
    most = vectors_at_once(operator)
    assert most is not None
    assert most > 1
    block = torch.randn(most, operator.parameters.size, device="cuda")
    alone = LiveTerm(problem.batch(0), operator).apply(block)
    problem.together.most = most
    together = LiveTerm(problem.batch(0), operator).apply(block)
    # Two float32 products of the same graph, whose sums are over as many terms: their rounding
    # is what the preflight measured of one, and a margin of ten.
    rounding = operator.check().product_rounding
    assert rounding is not None
    assert float((together - alone).norm() / alone.norm()) <= 10 * rounding


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_examples_stay_on_the_device_or_are_pinned_beside_it() -> None:
    batches = ({"x": torch.ones(4, 3), "names": ["a", "b"]}, {"x": torch.zeros(2, 3), "names": []})
    device = torch.device("cuda")
    stay, beside = near(batches, device, room=72), near(batches, device, room=71)
    assert [batch["x"].device.type for batch in (*stay, *beside)] == ["cuda"] * 2 + ["cpu"] * 2
    assert all(batch["x"].is_pinned() for batch in beside)
    assert stay[0]["names"] == ["a", "b"]
