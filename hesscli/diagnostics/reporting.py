"""What every estimate reports besides its numbers: cost, method, layers, and what to beware of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from hesscli.diagnostics.choice import Choice, Draw, choose, hurried
from hesscli.diagnostics.estimation import Estimation, Goal, Outcome
from hesscli.diagnostics.haste import in_haste
from hesscli.diagnostics.looks import Tolerance
from hesscli.diagnostics.measurement import Pace, Work, drive
from hesscli.diagnostics.run import Run
from hesscli.engines.estimator import Reading, Rounding
from hesscli.engines.per_example import PerExample
from hesscli.errors import UsageError
from hesscli.meter import watched
from hesscli.parameters import Parameter
from hesscli.problem.precision import tolerance as rounding_bound
from hesscli.problem.problem import Problem
from hesscli.results import (
    Estimate,
    LayerTrace,
    MethodReport,
    ParameterReport,
    Preflight,
    Status,
)

_CHOOSING = "choosing a method"
_FEW_EXAMPLES = 100
_FEW_BATCHES = 16
"""Batches below which heavy tails would not be seen."""


def rounding_of(run: Run, choice: Choice) -> Rounding:
    """Rounding of a table's cells: measured on a few examples against float64, or allowed for."""
    estimator, errors = choice.estimator, list[float | None]()
    mixed, bias = run.operator.autocast is not None, None
    if estimator.probes is not None and mixed:
        bias = estimator.probes.operator.bias(run.clock.watch(_CHOOSING))
        errors.append(rounding_bound(run.problem.dtype))
    elif estimator.probes is not None:
        errors.append(run.flight.relative_rounding)
    if isinstance(estimator.gauss_newton, PerExample):
        errors.append(estimator.gauss_newton.passes.relative_rounding())
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        allowed = rounding_bound(run.problem.precision.narrowest)
        return Rounding(max((*known, allowed)), known=False)
    return Rounding(max(known), mixed=mixed, bias=bias)


def chosen(run: Run, method: str, draw: Draw, *, may_hurry: bool = False) -> Choice:
    """The estimator of a run's matrix, chosen within its time, and how it rounds.

    Args:
        run: the matrix.
        method: by name.
        draw: of the probes.
        may_hurry: where time is too short for batches and method to be as they best are, fewer
            batches and a plain method will do.

    Raises:
        UsageError: what was kept is of another.
    """
    with watched(run.operator.meter) as took:
        haste = run.ledger.decided("haste", partial(in_haste, run)) if may_hurry else None
        on_step = run.clock.watch(_CHOOSING)
        if haste is not None:
            choice = hurried(run.operator, haste["groups"], haste["why"], draw, on_step)
        else:
            choice = choose(run.operator, method, draw, on_step, run.ledger.decided)
        rounding = rounding_of(run, choice)
    kept = run.ledger.decided("method", lambda: choice.name)
    if kept != choice.name:
        raise UsageError(
            "the method is another here than where the ledger was kept",
            f"{kept} there, and {choice.name} here: {choice.note}",
            f"--method {kept}, or a machine of the same kind",
        )
    return replace(choice, took=took, rounding=rounding)


def estimation(
    run: Run, choice: Choice, goal: Goal, miss: float, probes: int | None = None
) -> Estimation:
    """The chosen estimator's way to a goal, or through a number of probes.

    Raises:
        UsageError: some of the batches, each of which would need a number of its own.
    """
    if probes is None and choice.estimator.partial and not choice.estimator.exact:
        raise UsageError(
            "what is drawn of a range of batches needs a number",
            "--batches without --probes: a tolerance ends each range elsewhere",
            "--probes 64, or as many as you like, the same for every range",
        )
    rethink = None if choice.rethink is None else replace(choice.rethink, fits=run.pace())
    rounding = choice.rounding or rounding_of(run, choice)
    fits = run.pace() if choice.hurried else None
    look = run.clock.look
    return Estimation(choice.estimator, goal, miss, rounding, rethink, probes, look, fits)


def estimated(
    run: Run,
    choice: Choice,
    goal: Goal,
    miss: float,
    probes: int | None = None,
    ending: float = 0.0,
) -> Outcome:
    """What it comes to; ``ending`` is for :func:`drive`.

    Raises:
        BudgetError: the time was not enough for any estimate.
        KeyboardInterrupt: stopped before there was any.
    """
    measurement = estimation(run, choice, goal, miss, probes)
    return measurement.outcome(drive(run.clock, measurement, run.ledger, ending))


def expected(
    run: Run,
    choice: Choice,
    goal: Goal,
    miss: float,
    pace: Pace,
    probes: int | None = None,
) -> Iterator[Work]:
    """What :func:`chosen` and :func:`estimated` take, by an estimator that has seen some batches.

    Args:
        run: the matrix.
        choice: its estimator, of some batches at least.
        goal: as it will be seen from many probes.
        miss: probability.
        pace: of products.
        probes: as for :func:`estimation`.
    """
    yield Work(phase=_CHOOSING, spent=choice.took, note=f"{choice.name}: {choice.note}")
    rounding = choice.rounding or rounding_of(run, choice)
    ahead = Estimation(choice.estimator, goal, miss, rounding, choice.rethink, probes)
    yield from ahead.expected(pace)


def method_report(
    choice: Choice, outcome: Outcome, draw: Draw, tolerance: Tolerance, flight: Preflight
) -> MethodReport:
    """What was chosen, why, and what repeats it."""
    joined = "joined from runs over its parts" if outcome.joined else None
    estimator = outcome.estimator
    return MethodReport(
        name=choice.name,
        seed=draw.seed,
        probe_distribution=draw.distribution,
        probe_design=draw.sharing,
        num_probes=estimator.num_probes,
        looks=outcome.looks,
        batches_measured=len(estimator.indices) if estimator.partial else None,
        batches_joined=len(estimator.indices) if choice.hurried else None,
        rtol=tolerance.relative,
        atol=tolerance.absolute,
        mode=flight.mode,
        attention_kernel=flight.attention_kernel,
        note="; ".join(filter(None, (choice.note, outcome.turn, _types(outcome), joined))),
    )


def _types(outcome: Outcome) -> str | None:
    """In which types it was computed, where these are several."""
    if not outcome.rounding.mixed:
        return None
    if outcome.estimator.probes is None:
        return "nothing is probed, so that all is float32"
    return "probed in bfloat16, whose bias is in the error bars; all else in float32"


def total(problem: Problem, choice: Choice, outcome: Outcome, confidence: float) -> Estimate:
    """The trace of the whole matrix, with its error bars by source."""
    reading, estimator = outcome.reading, outcome.estimator
    known = problem.sampling_fraction is not None
    data, table = _data_variance(problem, reading), reading.table
    gauss_newton = estimator.gauss_newton_traces() if choice.splits else None
    estimate = float(reading.estimate[-1])
    return Estimate(
        estimate=estimate,
        probe_stderr=math.sqrt(table.probe.value[-1]),
        data_stderr=None if data is None else math.sqrt(data[-1]),
        label_stderr=None if table.label is None else math.sqrt(table.label.value[-1]),
        degrees_of_freedom=_freedom(reading),
        interval=reading.interval(),
        population_interval=reading.population_interval() if problem.unseen and known else None,
        confidence=confidence,
        gauss_newton=None if gauss_newton is None else float(gauss_newton[-1]),
        residual=None if gauss_newton is None else estimate - float(gauss_newton[-1]),
        rounding_error=float(reading.rounding[-1]) if outcome.rounding.known else None,
    )


def layers(problem: Problem, outcome: Outcome, tolerance: Tolerance) -> Iterator[LayerTrace]:
    """The trace of each layer's block."""
    reading, parameters = outcome.reading, problem.parameters
    data = _data_variance(problem, reading)
    exact = reading.table.within.value == 0
    is_certain = reading.fraction == 1 and outcome.rounding.is_exact
    for column, layer in enumerate(parameters.layers):
        owned = parameters.in_layer(layer)
        wanted = tolerance.half_width(float(reading.estimate[column]))
        reached = float(reading.half_width[column]) <= wanted
        missed: Status = "budget" if outcome.status in ("converged", "exact") else outcome.status
        status: Status = "converged" if reached else missed
        yield LayerTrace(
            name=layer,
            num_parameters=sum(p.numel for p in owned),
            parameters=described(owned),
            status="exact" if exact[column] and is_certain else status,
            estimate=float(reading.estimate[column]),
            probe_stderr=math.sqrt(reading.table.within.value[column]),
            data_stderr=None if data is None else math.sqrt(data[column]),
            interval=reading.interval(column),
        )


def described(parameters: Iterable[Parameter]) -> tuple[ParameterReport, ...]:
    """Names and shapes of parameters."""
    return tuple(ParameterReport(name=p.name, shape=tuple(p.tensor.shape)) for p in parameters)


def _data_variance(problem: Problem, reading: Reading) -> np.ndarray | None:
    return reading.table.data_variance if problem.sampling_fraction is not None else None


def _freedom(reading: Reading) -> float | None:
    """Degrees of freedom of the total's variance; None where there is none, or none is known."""
    if not 0 < reading.variance.value[-1] < math.inf:
        return None
    return float(np.broadcast_to(reading.variance.freedom, reading.estimate.shape)[-1])


def warnings(problem: Problem, outcome: Outcome, tolerance: Tolerance) -> Iterator[str]:
    """What a careful reader of the numbers must know."""
    if outcome.cut_turn is not None:
        yield (
            f"the run ended while {outcome.cut_turn}, and that says nothing before its end: these "
            f"numbers are from the {outcome.estimator.num_probes} probes a batch before it; more "
            "--budget, or --resume"
        )
    if outcome.estimator.partial:
        seen, every = len(outcome.estimator.indices), len(problem.indices)
        yield (
            f"{seen} of {every} batches were measured: error bars have what the others would "
            "change as data noise"
        )
        return
    yield from warnings_of_samples(problem, outcome.reading)
    if outcome.status == "data-limited" and math.isfinite(outcome.reading.half_width[-1]):
        yield from _examples_advice(problem, outcome.reading, tolerance)


def warnings_of_samples(problem: Problem, reading: Reading) -> Iterator[str]:
    """How far what was kept can speak of what was left out."""
    count, tails = problem.data.count, reading.table.tails
    if problem.sampling_fraction is None:
        yield (
            f"the loader was not read to its end: intervals are about the {count} examples that "
            "were kept"
        )
    elif problem.sampling_fraction == 1:
        return
    elif tails.count == 1:
        yield (
            f"one batch of {count} of {problem.data.available} examples: what the others would "
            "change is unknown; --examples all"
        )
    elif reading.table.heavy:
        yield (
            f"heavy tails: one of {tails.count} batches carries {tails.largest:.0%} of the trace; "
            "what the examples that were left out would change is unknown; --examples all"
        )
    elif tails.count < _FEW_BATCHES:
        yield (
            f"error bars rest on {tails.count} batches, too few to show whether some examples "
            "carry much of the trace"
        )
    elif count < _FEW_EXAMPLES:
        yield f"only {count} examples: their error bars are rough"


def _examples_advice(problem: Problem, reading: Reading, tolerance: Tolerance) -> Iterator[str]:
    """How many examples would bring data noise to half of the tolerance's variance."""
    available = problem.data.available or problem.data.count
    allowed = tolerance.half_width(float(reading.estimate[-1]))
    limited = problem.sampling_fraction == 1 or reading.rounding[-1] > allowed
    if limited and problem.dtype != torch.float64:
        wider = "float64" if problem.autocast is None else "float32"
        yield f"rounding alone exceeds the tolerance: --dtype {wider}"
        return
    if not (allowed and math.isfinite(reading.data_half_width())):
        yield "data noise alone exceeds the tolerance: --examples all"
        return
    ratio = reading.data_half_width() / allowed
    unused = 1 / problem.data.count - 1 / available
    wanted = math.ceil(1 / (unused / (2 * ratio**2) + 1 / available))
    yield f"data noise alone exceeds the tolerance: about --examples {wanted} would do"
