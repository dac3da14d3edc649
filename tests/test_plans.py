"""Plans are what commands expect of themselves: counted, cut where the budget ends, or refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hesscli
from hesscli.diagnostics import plans
from hesscli.diagnostics.looks import Standing
from hesscli.diagnostics.measurement import Pace, Work
from hesscli.diagnostics.plans import Asked, Pilot, measured_pace, planned
from hesscli.diagnostics.run import Clock, Run, started
from hesscli.diagnostics.spectral_runs import SpectralPlan
from hesscli.diagnostics.spectral_study import SpectralStudy
from hesscli.diagnostics.window import WindowOptions
from hesscli.engines.diagonal import Diagonal, SquaredNorm
from hesscli.errors import BudgetError, UsageError
from hesscli.meter import Spent
from hesscli.results import PlannedCommand

if TYPE_CHECKING:
    from conftest import TimeIsUp

PACE = Pace(
    gradient=Spent(gradients=1.0, seconds=500.0),
    graph=Spent(gradients=1.0, seconds=0.0),
    product=Spent(products=1.0, gradients=2.0, seconds=1000.0),
    graph_bytes=1,
)
"""A product takes 1000 s, beside which all that these tests really take is nothing."""
ASKED = Asked(rtol=None, atol=None, confidence=0.95, method="auto", window=WindowOptions(), seed=0)


class Seen(nn.Sequential):
    """A network that knows how many examples went through it."""

    examples = 0

    def forward(self, x: Tensor) -> Tensor:
        self.examples += len(x)
        return super().forward(x)


def smooth() -> hesscli.Problem:
    """A classifier whose Hessian is not the Gauss-Newton matrix, its examples in 16 batches."""
    torch.manual_seed(0)
    model = Seen(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    return hesscli.Problem(model, "cross_entropy", TensorDataset(x, y))


@contextmanager
def running(budget: float | None = None) -> Iterator[Run]:
    with started(smooth(), "hessian", "auto", Clock(budget, None)) as run:
        yield run


def plan_of(command: str, problem: hesscli.Problem, **asked: object) -> PlannedCommand:
    return next(p for p in hesscli.check(problem, **asked).plan.commands if p.command == command)


# What stands ahead.


def test_a_standing_foresees_what_probes_and_data_do() -> None:
    """Of an error of 5, whose square is 16 by probes and 9 by data."""
    now = Standing(error=5.0, wanted=1.0, floor=3.0, share=16 / 25)
    assert now.after(4).error == pytest.approx((16 / 4 + 9) ** 0.5)
    assert now.after(4).share == pytest.approx(4 / 13)
    assert now.after(4).hopeless
    assert now.after(1, data=100).error == pytest.approx(0.5)
    assert now.after(1, data=100).reached


@pytest.mark.parametrize("command", ["trace", "diag"])
@pytest.mark.parametrize("method", ["auto", "hutchinson"])
def test_an_absolute_tolerance_alone_is_planned_as_it_is_run(command: str, method: str) -> None:
    """To about what eight probes have, where both may turn to unit vectors if they are fewer."""
    run = {"trace": hesscli.trace, "diag": hesscli.diagonal}[command]
    problem = smooth()
    rough = run(problem, method=method, probes=8)
    if command == "trace":
        atol = 2 * rough.trace.probe_stderr
    else:
        atol = rough.diagonal.relative_error * rough.diagonal.norm
    result = run(problem, rtol=None, atol=atol, method=method, budget=None)
    assert result.status in ("converged", "exact")
    plan = plan_of(command, problem, atol=atol, method=method)
    # looks double, and two noisy variances may lie on both sides of one and of another
    assert result.cost.products / 4 <= plan.products <= 4 * result.cost.products
    assert plan.products > 2


def test_data_noise_ends_a_plan() -> None:
    """A plan of probes without end would be longer than any run."""
    problem = hesscli.Problem(
        smooth().model,
        "cross_entropy",
        TensorDataset(torch.randn(640, 6), torch.randint(0, 3, (640,))),
        examples=64,
    )
    plan = plan_of("trace", problem, rtol=1e-4, method="hutchinson")
    assert "data noise" in plan.note
    assert plan.products < 1e6


# What would be refused.


@pytest.mark.parametrize("command", ["trace", "diag"])
def test_a_method_that_is_refused_is_not_planned(command: str) -> None:
    problem = smooth()
    plan = plan_of(command, problem, method="exact")
    assert plan.note.startswith("refused: ")
    assert (plan.products, plan.gradients, plan.seconds) == (0, 0, 0)
    with pytest.raises(UsageError) as refusal:
        hesscli.trace(problem, method="exact")
    assert refusal.value.what in plan.note
    assert plan_of("spectrum", problem, method="exact").gradients > 0


def test_a_window_that_is_refused_is_not_planned() -> None:
    window = WindowOptions(size=1 << 44)
    plan = plan_of("ihvp", smooth(), window=window)
    assert plan.note.startswith("refused: the window is larger than the memory that is free")
    assert plan.gradients == 0


# What would be cut.


def test_a_plan_names_what_the_budget_would_cut() -> None:
    """Stages end after 3000, 7000 and 9000 s: of 6000 s three quarters of the second are left."""
    stages = tuple(
        Work(phase=phase, spent=Spent(seconds=seconds))
        for phase, seconds in (("reading", 3000.0), ("solving", 4000.0), ("drawing", 2000.0))
    )
    with running(6000.0) as run:
        plan = planned("any", lambda _: stages, Pilot(run, ASKED, PACE))
    assert plan.seconds == pytest.approx(9000, rel=1e-2)
    assert "beyond --budget 1h40m" in plan.note
    assert "after 75% of solving, without drawing" in plan.note


def test_a_plan_says_how_many_ranks_would_be_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 batches three ranks have six at most, 3/8 of the time; two, planned for, have 1/2."""
    work = Work(phase="solving", spent=Spent(seconds=4000.0, shared=4000.0))
    with running(3500.0) as run:
        pilot = Pilot(run, ASKED, PACE)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
        monkeypatch.setenv("WORLD_SIZE", "2")
        plan = planned("any", lambda _: [work], pilot)
        assert "; 3 ranks, each on a core or GPU of its own, would take 50m" in plan.note
        alone = Work(phase="solving", spent=Spent(seconds=4000.0))
        assert "ranks" not in planned("any", lambda _: [alone], pilot).note


def test_a_plan_within_the_budget_is_not_cut() -> None:
    with running(60_000.0) as run:
        work = Work(phase="solving", spent=Spent(seconds=4000.0), note="of one piece")
        plan = planned("any", lambda _: [work], Pilot(run, ASKED, PACE))
    assert plan.note == "of one piece"


def test_a_spectrum_is_planned_with_as_many_steps_as_there_is_time_for() -> None:
    """Four start vectors have 8 steps each: 27 of the first one make 59, and 28 exactly 60."""
    with running(60_000.0) as run:
        usual = SpectralPlan(
            steps=64, probes=5, count=3, goal=0.01, early=False, seed=0, shorter=True
        )
        (work,) = SpectralStudy(run, usual, (), exact=False).expected(PACE)
        assert work.spent.products == 59
        assert "27 steps for want of time" in work.note
        asked = SpectralPlan(steps=64, probes=5, count=3, goal=0.01, early=False, seed=0)
        (work,) = SpectralStudy(run, asked, (), exact=False).expected(PACE)
        assert work.spent.products == 128


# What planning takes.


def test_a_pace_takes_one_gradient_and_one_graph_where_a_batch_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batch goes through the model twice, and not four times as often to time it better."""
    monkeypatch.setattr(plans, "_TIMING", 0.0)
    problem = smooth()
    with started(problem, "hessian", "double-backward", Clock(None, None)) as run:
        problem.model.examples = 0
        measured_pace(run.operator)
    assert problem.model.examples == 2 * problem.data.counts[problem.indices[0]]


def test_a_pilot_is_shorter_where_products_are_slow() -> None:
    """It has half a minute at most, for two products of 1000 s: two probes on two of 16 batches."""
    with running(60_000.0) as run:
        before = run.operator.meter.products
        Pilot(run, ASKED, PACE).choice("hutchinson")
        assert run.operator.meter.products - before == 4 / 16


def test_check_keeps_to_its_budget(time_is_up_when: TimeIsUp) -> None:
    """Without time for its checks there is nothing; a pilot without time costs its plans alone."""
    with pytest.raises(BudgetError):
        hesscli.check(smooth(), budget=1e-9)
    late = time_is_up_when(lambda snapshot: snapshot.phase == "pilot")
    plan = hesscli.check(smooth(), budget=60_000.0, observe=late).plan
    notes = {planned.command: planned.note for planned in plan.commands}
    assert notes["trace"].startswith("no time to plan it")
    assert not notes["spectrum"].startswith("no time")


def test_one_slow_moment_is_not_what_reading_off_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps within one norm, as where others have the processor: there is a result."""
    norm, now, late = Diagonal.squared_norm, time.perf_counter, [0.0]

    def slow_once(self: Diagonal, *through: Any) -> SquaredNorm:
        late[0] = late[0] or 3600.0
        return norm(self, *through)

    monkeypatch.setattr(Diagonal, "squared_norm", slow_once)
    monkeypatch.setattr(time, "perf_counter", lambda: now() + late[0])
    result = hesscli.diagonal(smooth(), method="hutchinson", probes=4, budget=3600.0)
    assert result.method.num_probes == 4
