"""Unit vectors: exact diagonals of small problems, for no more products than there are entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesscli
from hesscli.engines.entries import Entries
from hesscli.engines.estimator import Estimator
from hesscli.engines.unit_vectors import UnitVectors
from hesscli.operators.hessian import Hessian
from hesscli.problem.losses import StepLoss
from hesscli.results import Snapshot

if TYPE_CHECKING:
    from conftest import TimeIsUp


def problem_of(decay: float = 0.0) -> hesscli.Problem:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    data = TensorDataset(torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (40,)))
    return hesscli.Problem(model, "cross_entropy", data, weight_decay=decay)


def dense(problem: hesscli.Problem) -> Tensor:
    """By double backward over the whole loss, row by row."""
    tensors = problem.parameters.tensors
    total = sum(b.weight * problem.evaluate(b.data) for b in problem.batches())
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(total, tensors, create_graph=True)])
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(entry, tensors, retain_graph=True)])
        for entry in slope
    ]
    return torch.stack(rows) + problem.weight_decay * torch.eye(len(rows), dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_entries_and_traces_are_the_matrix_s_own(decay: float) -> None:
    problem = problem_of(decay)
    operator = Hessian(problem, mode="double-backward")
    entries = Entries(problem.parameters, problem.device)
    units = UnitVectors(operator, entries.stream(problem.parameters, exact=True))
    estimator = Estimator(operator, gauss_newton=units, entries=entries)
    for _ in estimator.extend(2):
        pass
    truth = dense(problem).diagonal()
    table = estimator.table()
    assert table is not None
    found = table.estimate + estimator.decay_traces()
    # Sums of some hundred float64 terms of the diagonal's size.
    allowed = 1e3 * torch.finfo(torch.float64).eps * float(truth.abs().sum())
    assert found[-1] == pytest.approx(float(truth.sum()), abs=allowed)
    assert found[0] == pytest.approx(float(truth[:15].sum()), abs=allowed)
    diagonal = estimator.diagonal(1.0)
    torch.testing.assert_close(diagonal.values, truth, rtol=0, atol=allowed)
    assert diagonal.noise is None
    assert operator.meter.products == pytest.approx(len(truth))


@pytest.mark.parametrize("command", ["trace", "diagonal"])
def test_no_more_products_than_parameters_after_a_first_look(command: str) -> None:
    problem = problem_of()
    size, truth = problem.parameters.size, dense(problem).diagonal()
    result = getattr(hesscli, command)(problem, rtol=1e-6, budget=None)
    assert result.status == "exact"
    low, high = result.trace.interval
    assert low <= float(truth.sum()) <= high
    assert high - low < 1e-6 * abs(float(truth.sum()))
    assert result.cost.products <= size + 4
    assert "unit vectors" in result.method.note
    assert result.trace.gauss_newton is None


@pytest.mark.parametrize("batches", [1, 2, 8])
def test_nor_where_noise_hides_all_that_the_first_look_could_say(batches: int) -> None:
    """Probes of nine entries: a bound that is unknown foretells nothing, and is no reason for more.

    At most the probes of one look are made besides, which are no more than the unit vectors.
    """

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        mixed = batch[0] - batch[0].mean(0)  # the batch is the unit
        return nn.functional.smooth_l1_loss(model(mixed), batch[1])

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    data = [(torch.randn(5, 2).double(), torch.randn(5, 1).double()) for _ in range(batches)]
    problem = hesscli.Problem(model, StepLoss(step, "step"), data)
    size, truth = problem.parameters.size, dense(problem).diagonal()
    result = hesscli.diagonal(problem, budget=None)
    found = torch.cat([torch.from_numpy(array).flatten() for array in result.entries.values()])
    allowed = 1e3 * torch.finfo(torch.float64).eps * float(truth.abs().sum())
    torch.testing.assert_close(found, truth, rtol=0, atol=allowed)
    assert result.status == "exact"
    assert result.cost.products <= 2 * size
    (plan,) = (p for p in hesscli.check(problem).plan.commands if p.command == "diag")
    assert result.cost.products / 2 <= plan.products <= size


def test_cut_short_the_first_look_stands(time_is_up_when: TimeIsUp) -> None:
    problem = problem_of()
    late = time_is_up_when(lambda snapshot: snapshot.phase == UnitVectors.phase)
    result = hesscli.trace(problem, rtol=1e-6, observe=late)
    assert result.status == "budget"
    assert result.trace.probe_stderr > 0
    (why,) = (warning for warning in result.warnings if UnitVectors.phase in warning)
    assert f"{result.method.num_probes} probes a batch" in why
    truth = float(dense(problem).trace())
    assert abs(result.trace.estimate - truth) < 10 * result.trace.probe_stderr


@pytest.mark.parametrize("command", ["trace", "diag"])
def test_plans_have_no_more_either(command: str) -> None:
    problem = problem_of()
    plan = hesscli.check(problem, rtol=1e-6).plan
    products = {planned.command: planned.products for planned in plan.commands}
    assert products[command] <= problem.parameters.size + 4


def test_there_must_be_time_for_all_of_them(time_is_up_when: TimeIsUp) -> None:
    """The first probes take two thirds of the budget: 27 products more are not to be had."""
    late = time_is_up_when(lambda snapshot: snapshot.phase == "probing")

    def observe(snapshot: Snapshot) -> bool:
        late(snapshot)
        return snapshot.phase == "probing" and (snapshot.done or 0) >= 40

    result = hesscli.trace(problem_of(), rtol=1e-6, budget=1.5e9, observe=observe)
    assert result.status == "interrupted"
    assert result.method.num_probes >= 16
    assert "unit vectors" not in result.method.note


def test_they_are_no_answer_to_noise_of_the_data() -> None:
    """Where no number of probes would do, neither would they."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    data = TensorDataset(torch.randn(400, 4, dtype=torch.float64), torch.randint(0, 3, (400,)))
    part = hesscli.Problem(model, "cross_entropy", data, examples=64)
    result = hesscli.trace(part, rtol=1e-3, budget=None)
    assert result.status == "data-limited"
    assert "unit vectors" not in result.method.note
