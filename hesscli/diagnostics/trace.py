"""How large is the trace, in all and layer by layer, and how sure is that?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from scipy.special import ndtri

from hesscli.diagnostics import haste
from hesscli.diagnostics.arguments import as_asked
from hesscli.diagnostics.choice import Draw, batches_within, probe_range
from hesscli.diagnostics.keeping import UNKEPT, Ledger
from hesscli.diagnostics.looks import Standing, Tolerance
from hesscli.diagnostics.measurement import Work
from hesscli.diagnostics.plans import Pilot
from hesscli.diagnostics.reporting import (
    chosen,
    estimated,
    layers,
    method_report,
    total,
    warnings,
)
from hesscli.diagnostics.run import Clock, started
from hesscli.engines.estimator import Estimator, Reading
from hesscli.engines.hutchinson.table import Sharing
from hesscli.problem.problem import Problem
from hesscli.randomness import Distribution
from hesscli.results import Observe, TraceResult
from hesscli.vocabulary import USUAL_BUDGET, USUAL_CONFIDENCE, USUAL_RTOL


@as_asked
def trace(
    problem: Problem,
    *,
    matrix: str = "hessian",
    rtol: float | None = USUAL_RTOL["trace"],
    atol: float | None = None,
    confidence: float = USUAL_CONFIDENCE,
    budget: float | None = USUAL_BUDGET,
    probes: int | tuple[int, int] | None = None,
    batches: tuple[int, int] | None = None,
    probe_design: Sharing = "fresh",
    probe_distribution: Distribution = "rademacher",
    method: str = "auto",
    seed: int = 0,
    mode: str = "auto",
    observe: Observe | None = None,
    ledger: Ledger = UNKEPT,
) -> TraceResult:
    """Trace of a curvature matrix, exact where that is possible, with error bars by source.

    Args:
        problem: model, loss and frozen examples.
        matrix: ``hessian``, ``ggn``, ``fisher`` or ``empirical-fisher``.
        rtol: wanted half-width of the interval relative to the true trace.
        atol: wanted half-width in the trace's own unit; the wider of the two counts.
        confidence: probability with which the interval is to hold, looks included.
        budget: seconds; None for no limit. Where those that are left would not do for a first
            look at all batches by the method ``auto``, it takes plain probes in the user's own
            batches, which are fewer, and says so.
        probes: a fixed number ``N`` instead of a tolerance, or probes ``(a, b)`` of the stream.
        batches: only the batches ``(a, b)``, whose number of probes must be fixed.
        probe_design: ``fresh`` probes for each batch, or ``shared`` ones. Fresh ones are never
            worse unless the batches' matrices cancel in their mean, which those of a loss with a
            positive semidefinite part do not: tr A_a A_b ≥ 0.
        probe_distribution: ``rademacher`` or ``gaussian``.
        method: ``auto``, ``exact``, ``split``, ``deflated``, ``stratified`` or ``hutchinson``;
            ``auto`` takes the Gauss-Newton part without probes wherever that is possible.
        seed: of the probes.
        mode: autodiff mode; ``auto`` takes the cheapest that passes the preflight.
        observe: told how far the run is; returning True ends it at its result so far.
        ledger: keeps the run, so that it can go on from there.

    Raises:
        UsageError: fewer than two probes, or a matrix or method that this problem does not have.
        UnsoundError: the problem's curvature would mean nothing.
        BudgetError: the time was not enough for any estimate.
        KeyboardInterrupt: stopped before there was any estimate.
    """
    first, fixed = probe_range(probes)
    clock, tolerance = Clock(budget, observe), Tolerance(rtol, atol)
    with started(problem, matrix, mode, clock, ledger) as run:
        measured = batches_within(problem, batches, method)
        draw = Draw(seed, probe_design, probe_distribution, first, batches=measured)
        may_hurry = method == "auto" and measured is None and fixed is None
        choice = chosen(run, method, draw, may_hurry=may_hurry)
        goal = partial(standing, tolerance=tolerance)
        outcome = estimated(run, choice, goal, 1 - confidence, fixed)
    return TraceResult(
        status=outcome.status,
        method=method_report(choice, outcome, draw, tolerance, run.flight),
        cost=run.cost(),
        trace=total(problem, choice, outcome, confidence),
        layers=tuple(layers(problem, outcome, tolerance)),
        **run.header(warnings(problem, outcome, tolerance)),
    )


def standing(estimator: Estimator, reading: Reading, *, tolerance: Tolerance) -> Standing:
    """How far the total's interval is from the tolerance."""
    return Standing(
        error=float(reading.half_width[-1]),
        wanted=tolerance.half_width(float(reading.estimate[-1])),
        floor=reading.data_half_width(),
        share=reading.random_share,
    )


# -- What ``hesscli trace`` will take --------------------------------------------------------------


def plan(pilot: Pilot) -> Iterator[Work]:
    """Probes to the tolerance, or one pass where none are needed; in haste up to a number."""
    hurried = haste.expected(pilot.run) if pilot.asked.method == "auto" else None
    if hurried is not None:
        yield hurried
        return
    yield from pilot.estimated(partial(_foreseen, tolerance=pilot.asked.tolerance("trace")))


def _foreseen(estimator: Estimator, reading: Reading, *, tolerance: Tolerance) -> Standing:
    """As :func:`standing`, with the many degrees of freedom that a pilot does not have."""
    probed = float(reading.table.within.value[-1]) ** 0.5 * float(ndtri(1 - reading.miss / 2))
    floor = reading.data_half_width()
    error = math.hypot(probed, floor)
    return Standing(
        error=error,
        wanted=tolerance.half_width(float(reading.estimate[-1])),
        floor=floor,
        share=(probed / error) ** 2 if error else 0.0,
    )
