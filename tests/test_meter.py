"""Work is counted in passes, by their share of examples and parameters, on one meter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hesscli
from hesscli import GaussNewton, Hessian
from hesscli.engines.estimator import Estimator
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.per_example import PerExample
from hesscli.meter import Meter
from hesscli.operators.exactness import (
    _probe,
    exact_parameters,
    own_forms,
    require_output_hessian,
    within_parameters,
)
from hesscli.operators.hessian import Residual
from hesscli.operators.per_example.rows import Rows
from hesscli.problem.freezing import FrozenData
from hesscli.problem.losses import StepLoss
from hesscli.problem.problem import Problem
from hesscli.problem.work import PassWork
from hesscli.vocabulary import RowKind

COUNT, SAMPLE = 24, 8


def problem_of(loss: Any = "mse") -> Problem:
    """A network that is piecewise linear in each tensor alone, on batches of 16 and 8."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = torch.randn(COUNT, 3, dtype=torch.float64)
    pairs = tuple((part, part[:, :1] ** 2) for part in x.split(16))
    return Problem(model, loss, FrozenData(pairs, (16, 8), COUNT, True, "by hand"))


def beside(operator: Hessian, products: int) -> float:
    """What is done with vectors: each product is made, and then added to others in four passes."""
    return products * operator.problem.vectors(1, 4, operator.parameters.size)


def together() -> float:
    """A pass over all 24 at once, of which two batches call the operations twice as often."""
    problem = problem_of()
    (share,) = {problem.joint_share, problem.share_of(COUNT)}
    assert share == pytest.approx(1 - problem.share_of(0))
    return share


def test_blocks_count_with_their_whole() -> None:
    operator = Hessian(problem_of())
    operator @ torch.ones(operator.parameters.size)
    taken = 3 * together() + beside(operator, 1)
    assert (operator.meter.products, operator.meter.gradients) == pytest.approx((1, taken))
    block = operator.restrict("0")
    block @ torch.ones(block.parameters.size)
    taken += 3 * together() + beside(block, 1)
    assert (operator.meter.products, operator.meter.gradients) == pytest.approx((2, taken))


def test_sources_that_share_a_meter_are_counted_once() -> None:
    problem, meter = problem_of(), Meter()
    known = PerExample(GaussNewton(problem, meter=meter))
    probes = Hutchinson(Residual(problem, meter=meter), seed=0)
    estimator = Estimator(Hessian(problem), gauss_newton=known, probes=probes)
    for _ in estimator.extend(2):
        pass
    assert (estimator.products, estimator.gradients) == (meter.products, meter.gradients)
    assert meter.products == pytest.approx(2)
    alone = PerExample(GaussNewton(problem))
    list(alone.extend())
    vectors = beside(Hessian(problem), 2 * 2)
    assert meter.gradients == pytest.approx(alone.meter.gradients + 1 + 2 * 2 + vectors)


def test_a_proof_is_counted_however_often_it_was_asked_for() -> None:
    problem, first, second = problem_of(), Meter(), Meter()
    problem.prove()
    problem.prove(meter=first)
    problem.prove(meter=second)
    assert first == second == Meter(gradients=pytest.approx(together()))
    asked_twice = Meter()  # the user's function, and the outputs by themselves
    problem = problem_of(lambda outputs, y: (outputs - y).square().mean())
    problem.prove(meter=asked_twice)
    assert asked_twice.gradients == pytest.approx(4 / 3 * problem.joint_share)

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    without_outputs = Meter()
    problem = problem_of(StepLoss(step, "step"))
    problem.prove(meter=without_outputs)
    assert without_outputs.gradients == pytest.approx(problem.joint_share)


@pytest.mark.parametrize(("row", "check"), [("sampled", 1), ("example", 1), ("microbatch:4", 0)])
def test_rows_are_counted(row: str, check: int) -> None:
    """A gradient for all; first, 16 examples take three forward and three backward passes.

    Six of four examples each take as many operations and weights as one of all.
    """
    meter, problem = Meter(), problem_of()
    whole = 6 * problem.share_of(4) if row == "microbatch:4" else 1
    rows = Rows(problem, RowKind.parse(row), meter=meter)
    list(rows.take(min(rows.available, COUNT)))
    checked = meter.gradients
    list(rows.take(min(rows.available, COUNT)))
    checks = check * problem.share_of(16) * (3 / 3 + 3 * 2 / 3)
    assert checked == pytest.approx(whole + checks)
    assert meter.gradients - checked == pytest.approx(whole)


def test_claims_of_exactness_cost_a_forward_pass_and_little_more() -> None:
    """A forward pass over all; on the sample one, a graph, and half a way back to each layer."""
    problem, meter, steps = problem_of(), Meter(), list[None]()
    claims = exact_parameters(problem, meter=meter, on_step=lambda: steps.append(None))
    assert all(claim.exact for claim in claims)
    ways = problem.ways_back([problem.parameters.tensors[:2], problem.parameters.tensors[2:]])
    share = problem.share_of(SAMPLE)
    taken = together() / 3 + share * (1 / 3 + 1 + sum(ways) / 2)
    vectors = problem.vectors(3)  # signs, those of a layer, and their product
    assert meter.gradients == pytest.approx(taken + vectors)
    assert len(steps) == 1 + 2  # the batches as one, and the layers


def test_a_losss_own_curvature_is_counted() -> None:
    named, users = Meter(), Meter()
    require_output_hessian(problem_of(), named)
    problem = problem_of(lambda o, t: (o - t).square().mean())
    require_output_hessian(problem, users)
    assert named.gradients == 0
    assert users.gradients == pytest.approx(problem.share_of(SAMPLE) * 2 / 3)


def test_a_pass_over_a_few_calls_its_operations_and_reads_all_weights() -> None:
    """For each of the two batches; beside them, what grows with the examples is in proportion."""
    problem = problem_of()
    work = problem.independence.work
    assert work.multiplied == 3 * 4 + 4 * 1  # per example, by the two layers
    assert work.weights == problem.parameters.size
    assert work.operations >= 4  # two layers, the rectifier, and the loss
    shares = [problem.share_of(count) for count in (0, 8, 16)]
    assert shares[2] + shares[1] == pytest.approx(1)
    assert shares[1] - shares[0] == pytest.approx(shares[2] - shares[1])
    assert 0 < shares[0] < 1 / 2


def test_a_pass_in_a_wider_type_takes_longer() -> None:
    """The examples' part four times as long, the weights' twice, the operations as they were."""
    work = PassWork(operations=0, numbers=0, multiplied=5, weights=0)
    assert work.nanoseconds(2, torch.float64) == pytest.approx(
        4 * work.nanoseconds(2, torch.float32)
    )
    work = PassWork(operations=0, numbers=7, multiplied=0, weights=3)
    assert work.nanoseconds(2, torch.float64) == pytest.approx(
        2 * work.nanoseconds(2, torch.float32)
    )
    work = PassWork(operations=3)
    assert work.nanoseconds(2, torch.float64) == work.nanoseconds(1, torch.float32) > 0


def test_the_products_of_one_tensor_alone_say_what_all_of_them_say(samples: Any) -> None:
    """On curved tensors, whose forms are not zero: the same entries of the same matrix."""

    problem = hesscli.load(samples / "sunspots/model.pt", examples=16)
    sample = problem.sample(8)
    for mode in ("double-backward", "forward-over-reverse"):
        residual = Residual(problem, mode=mode)
        places = range(len(problem.parameters))
        own = list(own_forms(residual, [[place] for place in places], sample))
        assert max(own) > 0
        dense = residual.live(sample)(torch.eye(problem.parameters.size, dtype=problem.dtype))
        for place, form in zip(places, own, strict=True):
            truth = _form(residual, place, dense)
            assert form == pytest.approx(abs(truth), rel=1e-9, abs=1e-12 * float(dense.norm()))
        relative = list(within_parameters(residual, places, sample))
        assert [form > 1e-9 for form in relative] == [form > 1e-9 for form in own]


def _form(residual: Residual, place: int, dense: torch.Tensor) -> float:
    """vᵀRv from the matrix, with the vector that is drawn for a tensor."""

    vector = torch.zeros(residual.parameters.size, dtype=dense.dtype)
    residual.parameters.split(vector)[place].view(-1).copy_(_probe(residual, place))
    return float(vector @ dense @ vector)


def test_a_users_small_batches_are_the_unit_however_they_are_cut() -> None:
    """Sixty-four of a loader's two examples, cut into sixteen of eight; the counts say so."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(128, 3), torch.randn(128, 1))
    given = [torch.utils.data.DataLoader(data, batch_size=size) for size in (2, 8)]
    for problem, passes in zip(
        (Problem(nn.Linear(3, 1), "mse", loader, examples="all") for loader in given),
        (64, 16),
        strict=True,
    ):
        assert problem.data.counts == (8,) * 16
        work = problem.independence.work
        whole, none = (work.nanoseconds(count, torch.float32) for count in (128, 0))
        assert problem.share_of(128) == pytest.approx(whole / (whole + (passes - 1) * none))
