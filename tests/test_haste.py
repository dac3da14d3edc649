"""Where time is short, a trace takes fewer batches, and has a number whose bar holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import stdtrit
from scipy.stats import binom
from torch import nn

import hesscli
from hesscli.diagnostics import reporting, run
from hesscli.diagnostics.choice import Draw, hurried
from hesscli.diagnostics.estimation import Estimation
from hesscli.diagnostics.looks import Tolerance
from hesscli.diagnostics.run import Clock
from hesscli.diagnostics.trace import standing
from hesscli.engines.estimator import Rounding
from hesscli.ledger import FileLedger
from hesscli.meter import Meter
from hesscli.problem.problem import Problem
from hesscli.render.tables.shared import more_work
from hesscli.results import TraceResult

LEVEL = 1e-4
"""Of a test that fails though all is well."""


def problem(rows: int = 64, bend: Callable[[], nn.Module] = nn.Tanh, **how: Any) -> Problem:
    """Of a user who has all examples in a batch, which are cut into sixteen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), bend(), nn.Linear(8, 8), bend(), nn.Linear(8, 3))
    data = torch.randn(rows, 6), torch.randint(3, (rows,))
    return Problem(model.double(), "cross_entropy", data, batch_size=64, **how)


@pytest.fixture
def counted_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which each gradient takes a second, and nothing else does."""
    meters = list[Meter]()

    def made() -> Meter:
        meters.append(Meter())
        return meters[-1]

    monkeypatch.setattr(run, "Meter", made)
    passed = property(lambda clock: meters[-1].gradients - clock.earlier if meters else 0.0)
    monkeypatch.setattr(Clock, "_passed", passed)


def truth(given: Problem) -> float:
    return float(hesscli.Hessian(given).to_dense().trace())


def before_probes(given: Problem) -> float:
    """Gradients that proof and checks take."""
    meter = Meter()
    given.prove(meter=meter)
    run.checked(given, hesscli.Hessian, "auto", meter)
    return meter.gradients


# -- When, and what of it is said ------------------------------------------------------------------


@pytest.mark.usefixtures("counted_clock")
def test_in_haste_the_users_own_batch_gives_a_number_in_time() -> None:
    given = problem()
    budget = before_probes(given) + 20  # of the 100 that a first look would take
    found = hesscli.trace(given, budget=budget, rtol=1e-3)
    assert found.status == "budget"
    assert found.cost.seconds <= budget
    assert 7 <= found.method.num_probes <= 9  # 1 + 2 n gradients, and what vectors take
    low, high = found.trace.interval
    assert low < truth(given) < high
    assert "one batch of 64 examples: 20s of --budget were left" in found.method.note
    assert "all 16 batches" in found.method.note
    assert found.method.batches_joined == 1


@pytest.mark.usefixtures("counted_clock")
def test_with_time_enough_nothing_is_done_in_haste() -> None:
    given = problem()
    usual = hesscli.trace(given, budget=None, rtol=0.5)
    found = hesscli.trace(given, budget=2 * usual.cost.gradients, rtol=0.5)
    assert (found.trace, found.method) == (usual.trace, usual.method)
    assert found.method.batches_joined is None


@pytest.mark.usefixtures("counted_clock")
@pytest.mark.parametrize(
    "asked",
    [{"probes": 2}, {"probes": 2, "batches": (0, 8)}, {"method": "split"}, {"matrix": "ggn"}],
    ids=str,
)
def test_what_was_asked_for_is_not_hurried(asked: dict[str, Any]) -> None:
    given = problem()
    found = hesscli.trace(given, budget=before_probes(given) + 20, **asked)
    assert "were left" not in found.method.note
    assert found.method.name != "hutchinson"


@pytest.mark.usefixtures("counted_clock")
def test_what_may_be_exact_is_not_hurried() -> None:
    given = problem(bend=nn.ReLU)
    found = hesscli.trace(given, budget=before_probes(given) + 40)
    assert found.status == "exact"
    assert found.trace.estimate == pytest.approx(truth(given), rel=1e-10)


@pytest.mark.usefixtures("counted_clock")
def test_of_a_sample_so_many_batches_are_taken_as_show_the_others() -> None:
    given = problem(128, examples=64)
    found = hesscli.trace(given, budget=before_probes(given) + 80, rtol=1e-3)
    assert "8 batches of at most 8 examples" in found.method.note
    assert found.method.batches_joined == 8
    assert found.trace.data_stderr
    low, high = found.trace.interval
    assert low < truth(problem(128)) < high


@pytest.mark.usefixtures("counted_clock")
@pytest.mark.parametrize("how", [{}, {"rows": 128, "examples": 64}], ids=["one", "a sample"])
def test_haste_is_foreseen_up_to_the_first_number(how: dict[str, Any]) -> None:
    """A budget of what was planned and half a product is enough for one, and no more."""
    told = hesscli.check(problem(**how), budget=before_probes(problem(**how)) + 40)
    planned = next(one for one in told.plan.commands if one.command == "trace")
    found = hesscli.trace(problem(**how), budget=planned.gradients + 1, rtol=1e-3)
    assert found.method.num_probes == 2
    assert planned.gradients == pytest.approx(found.cost.gradients, rel=0.02)
    assert planned.seconds == pytest.approx(planned.gradients, rel=1e-6)
    assert planned.products == found.cost.products
    assert found.method.note.partition(": ")[0] in planned.note
    assert "beyond" not in planned.note


@pytest.mark.usefixtures("counted_clock")
@pytest.mark.parametrize(
    "asked", [{"budget": 300.0}, {"method": "split"}, {"matrix": "ggn"}], ids=str
)
def test_no_haste_is_foreseen_where_there_is_none(asked: dict[str, Any]) -> None:
    usual = {"budget": before_probes(problem()) + 40}
    told = hesscli.check(problem(), **(usual | asked))
    planned = next(one for one in told.plan.commands if one.command == "trace")
    assert "in haste" not in planned.note


# -- What it comes to ------------------------------------------------------------------------------


def estimation(given: Problem, groups: list[list[int]], seed: int, rtol: float) -> Estimation:
    choice = hurried(hesscli.Hessian(given), groups, "in haste", Draw(seed), lambda: None)
    goal = partial(standing, tolerance=Tolerance(rtol))
    return Estimation(choice.estimator, goal, 0.05, Rounding(0.0))


@pytest.mark.parametrize("groups", [[[*range(16)]], [[*range(6)], [*range(6, 16)]]], ids=len)
@pytest.mark.parametrize("seeds", [80, pytest.param(4000, marks=pytest.mark.study)])
def test_bars_of_few_probes_hold(groups: list[list[int]], seeds: int) -> None:
    """Cut off at three probes of one batch, or two of each of two.

    What is told holds as often as it says; and the standard error is neither too small nor too
    large for half of Student's t to be within his quartiles.
    """
    given = problem()
    true, missed, within = truth(given), 0, 0
    for seed in range(seeds):
        steps = estimation(given, groups, seed, 1e-3)
        for _ in steps.steps():
            if steps.estimator.has(4 - len(groups)):
                break
        reading = steps.outcome("budget").reading
        low, high = reading.interval()
        missed += not low <= true <= high
        variance, freedom = reading.variance.value[-1], np.broadcast_to(reading.variance.freedom, 4)
        quartile = stdtrit(freedom[-1], 0.75) * variance**0.5
        within += abs(reading.estimate[-1] - true) <= quartile
    assert missed <= binom.ppf(1 - LEVEL, seeds, 0.05)
    assert binom.ppf(LEVEL, seeds, 0.5) <= within <= binom.ppf(1 - LEVEL, seeds, 0.5)


def test_batches_that_are_taken_as_one_are_their_mean() -> None:
    """With weights of their own, and each round on the graph of the one before."""
    given = problem(61)
    whole, apart = (
        estimation(given, groups, 0, 0.5) for groups in ([[*range(16)]], [[i] for i in range(16)])
    )
    dense = hesscli.Hessian(given).to_dense()
    for steps in (whole, apart):
        source = steps.estimator.probes
        assert source is not None
        for _ in steps.estimator.extend(3):
            pass
        masses = np.array([source.operator.masses[i] for i in source.indices])
        forms = np.stack([source.cells[i][:, -1] for i in source.indices])
        expected = []
        for index in source.indices:
            block = source.probes.block(index, 0, 3).double()
            batch = given.batch(*([*range(16)] if len(masses) == 1 else [index]))
            product = hesscli.Hessian(given).live(batch)(block)
            expected.append((block * product).sum(1).detach().numpy())
        assert forms == pytest.approx(np.stack(expected), rel=1e-10)
        if len(masses) == 1:
            assert expected[0] == pytest.approx(
                torch.einsum("pi,ij,pj->p", block, dense, block).numpy(), rel=1e-8
            )
            assert source.meter.gradients < 1.5 + 2 * 3  # one graph
        assert masses.sum() == pytest.approx(given.total_weight)


def test_what_was_begun_in_haste_goes_on_with_more_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To its tolerance, as one that nobody had cut off."""
    haste = {"groups": [[*range(16)]], "why": "in haste"}
    monkeypatch.setattr(reporting, "in_haste", lambda _: haste)
    expected = hesscli.trace(problem(), budget=None, rtol=0.5)
    monkeypatch.setattr(run.Run, "pace", lambda _: lambda products: False)
    kept = partial(FileLedger, tmp_path / "trace.ledger", {}, say=pytest.fail)
    first = hesscli.trace(problem(), budget=600, rtol=0.5, ledger=kept(resume=False))
    assert (first.status, first.method.num_probes) == ("budget", 2)
    monkeypatch.undo()
    found: TraceResult = hesscli.trace(problem(), budget=None, rtol=0.5, ledger=kept(resume=True))
    assert found.status == "converged"
    assert (found.trace, found.method) == (expected.trace, expected.method)
    assert found.cost.gradients == pytest.approx(expected.cost.gradients)


@pytest.mark.usefixtures("counted_clock")
def test_after_haste_the_hint_does_what_it_says(tmp_path: Path) -> None:
    """Of a number of probes each of the sixteen batches would have that many."""
    kept = partial(FileLedger, tmp_path / "trace.ledger", {}, say=pytest.fail)
    budget = before_probes(problem()) + 20
    first = hesscli.trace(problem(), budget=budget, rtol=1e-3, ledger=kept(resume=False))
    hint = more_work(replace(first, files={"json": "trace.json"}))
    told = re.fullmatch(r"--resume and a --budget that is 1m(\d+)s larger \(four times.*", hint)
    assert told is not None, hint
    longer = 60 + int(told[1])
    found = hesscli.trace(problem(), budget=budget + longer, rtol=1e-3, ledger=kept(resume=True))
    assert found.method.batches_joined == 1
    assert 4 <= found.method.num_probes / first.method.num_probes < 10
    assert found.cost.gradients <= 4.1 * first.cost.gradients
