"""How large is the trace, in all and layer by layer, and how sure is that?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

import hesscli
from hesscli.diagnostics.clock import Clock
from hesscli.diagnostics.estimation import Estimation, Outcome
from hesscli.diagnostics.surroundings import environment, peak_bytes
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.hutchinson.reading import Reading
from hesscli.engines.hutchinson.statistics import Design
from hesscli.engines.stopping import Tolerance
from hesscli.errors import UsageError
from hesscli.operators.matrices import matrix_named
from hesscli.operators.preflight import preflight
from hesscli.problem.problem import Problem
from hesscli.results import (
    Cost,
    Estimate,
    LayerTrace,
    MethodReport,
    Observe,
    ParameterReport,
    Preflight,
    Status,
    TraceResult,
)
from hesscli.streams import Distribution

PROOF_GRADIENTS = 4 / 3
"""What the proof of the problem costs: a gradient, and a forward pass that checks the labels."""

_FEW_EXAMPLES = 100


def trace(
    problem: Problem,
    *,
    matrix: str = "hessian",
    rtol: float | None = 0.05,
    atol: float | None = None,
    confidence: float = 0.95,
    budget: float | None = 600.0,
    probes: int | tuple[int, int] | None = None,
    probe_design: Design = "fresh",
    probe_distribution: Distribution = "rademacher",
    seed: int = 0,
    mode: str = "auto",
    observe: Observe | None = None,
) -> TraceResult:
    """Trace of a curvature matrix by Hutchinson's estimator, with error bars by source.

    Args:
        problem: model, loss and frozen examples.
        matrix: ``hessian``, ``ggn``, ``fisher`` or ``empirical-fisher``.
        rtol: wanted half-width of the interval relative to the true trace.
        atol: wanted half-width in the trace's own unit; the wider of the two counts.
        confidence: probability with which the interval is to hold, looks included.
        budget: seconds; None for no limit.
        probes: a fixed number ``N`` instead of a tolerance, or probes ``(a, b)`` of the stream.
        probe_design: ``fresh`` probes for each batch, or ``shared`` ones. Fresh ones are never
            worse unless the batches' matrices cancel in their mean, which those of a loss with a
            positive semidefinite part do not: tr A_a A_b ≥ 0.
        probe_distribution: ``rademacher`` or ``gaussian``.
        seed: of the probes.
        mode: autodiff mode; ``auto`` takes the cheapest that passes the preflight.
        observe: told how far the run is; returning True ends it at its result so far.

    Raises:
        UsageError: fewer than two probes, or a matrix that this problem does not have.
        UnsoundError: the problem's curvature would mean nothing.
        KeyboardInterrupt: stopped before there was any estimate.
    """
    first, last = probes if isinstance(probes, tuple) else (0, probes)
    fixed = None if last is None else last - first
    if fixed is not None and fixed < 2:
        raise UsageError("an error bar needs two probes", f"{fixed} probes", "--probes 2 or more")
    clock = Clock(budget, observe)
    build = matrix_named(matrix)
    problem.prove(observe)
    clock.tell("preflight")
    flight = preflight(problem, build, mode)
    with problem.in_dtype(working_dtype(problem, flight)):
        operator = build(problem, mode=flight.mode)
        engine = Hutchinson(
            operator,
            seed=seed,
            design=probe_design,
            distribution=probe_distribution,
            first_probe=first,
        )
        rounding = flight.relative_rounding or 0.0
        run = Estimation(engine, Tolerance(rtol, atol), 1 - confidence, rounding, clock)
        outcome = run.to_tolerance() if fixed is None else run.fixed(fixed)
    method = MethodReport(
        name="hutchinson",
        seed=seed,
        probe_distribution=probe_distribution,
        probe_design=engine.design,
        num_probes=engine.num_probes,
        looks=outcome.looks,
        mode=flight.mode,
        attention_kernel=flight.attention_kernel,
    )
    cost = Cost(
        products=operator.meter.products,
        gradients=operator.meter.gradients + PROOF_GRADIENTS,
        seconds=clock.seconds,
        peak_bytes=peak_bytes(problem.device),
    )
    return _result(engine, outcome, flight, method, cost, confidence, Tolerance(rtol, atol))


def working_dtype(problem: Problem, flight: Preflight) -> torch.dtype:
    """The problem's own type, but float64 for differences."""
    return torch.float64 if flight.mode == "finite-difference" else problem.dtype


def _result(
    engine: Hutchinson,
    outcome: Outcome,
    flight: Preflight,
    method: MethodReport,
    cost: Cost,
    confidence: float,
    tolerance: Tolerance,
) -> TraceResult:
    operator, problem, reading = engine.operator, engine.operator.problem, outcome.reading
    known = problem.sampling_fraction is not None
    data = reading.table.data_variance if known else None
    return TraceResult(
        status=outcome.status,
        problem=problem.report(operator.name),
        method=method,
        cost=cost,
        trace=Estimate(
            estimate=float(reading.estimate[-1]),
            probe_stderr=math.sqrt(reading.table.probe.value[-1]),
            data_stderr=None if data is None else math.sqrt(data[-1]),
            label_stderr=None,
            degrees_of_freedom=float(np.ravel(reading.variance.freedom)[-1]),
            interval=reading.interval(),
            population_interval=reading.population_interval() if problem.unseen and known else None,
            confidence=confidence,
            gauss_newton=None,
            residual=None,
            rounding_error=float(reading.rounding[-1]),
        ),
        layers=tuple(_layers(engine, outcome, tolerance)),
        environment=environment(problem.device),
        hesscli_version=hesscli.__version__,
        warnings=(*problem.warnings, *_warnings(problem, flight, outcome, tolerance)),
    )


def _layers(engine: Hutchinson, outcome: Outcome, tolerance: Tolerance) -> Iterator[LayerTrace]:
    parameters, reading = engine.operator.parameters, outcome.reading
    known = engine.operator.problem.sampling_fraction is not None
    data = reading.table.data_variance if known else None
    for column, layer in enumerate(parameters.layers):
        owned = parameters.in_layer(layer)
        wanted = tolerance.half_width(float(reading.estimate[column]))
        reached = float(reading.half_width[column]) <= wanted
        missed: Status = "budget" if outcome.status == "converged" else outcome.status
        yield LayerTrace(
            name=layer,
            num_parameters=sum(p.numel for p in owned),
            parameters=tuple(
                ParameterReport(name=p.name, shape=tuple(p.tensor.shape)) for p in owned
            ),
            status="converged" if reached else missed,
            estimate=float(reading.estimate[column]),
            probe_stderr=math.sqrt(reading.table.probe.value[column]),
            data_stderr=None if data is None else math.sqrt(data[column]),
            interval=reading.interval(column),
        )


def _warnings(
    problem: Problem, flight: Preflight, outcome: Outcome, tolerance: Tolerance
) -> Iterator[str]:
    """What a careful reader of the numbers must know."""
    yield from problem.prove().warnings
    if flight.fallback is not None:
        yield f"slower {flight.mode} products, for {flight.fallback}"
    if flight.mode == "finite-difference":
        yield "products are central differences: no error bar covers what a kink adds to them"
    if unreached := problem.prove().unreached:
        yield f"the loss does not reach {', '.join(unreached[:5])} ({len(unreached)} tensors)"
    if problem.couples_examples is not None:
        yield f"{problem.couples_examples} couples the examples of a batch: the batch is the unit"
    if problem.sampling_fraction is None:
        yield (
            f"the loader was not read to its end: intervals are about the {problem.data.count} "
            "examples that were kept"
        )
    elif problem.data.count < _FEW_EXAMPLES and problem.data.count < (problem.data.available or 0):
        yield f"only {problem.data.count} examples: their error bars are rough"
    if outcome.status == "data-limited":
        yield from _examples_advice(problem, outcome.reading, tolerance)


def _examples_advice(problem: Problem, reading: Reading, tolerance: Tolerance) -> Iterator[str]:
    """How many examples would bring data noise to half of the tolerance's variance."""
    available = problem.data.available or problem.data.count
    ratio = reading.data_half_width() / tolerance.half_width(float(reading.estimate[-1]))
    unused = 1 / problem.data.count - 1 / available
    wanted = math.ceil(1 / (unused / (2 * ratio**2) + 1 / available)) if math.isfinite(ratio) else 0
    yield f"data noise alone exceeds the tolerance: about --examples {wanted or 'all'} would do"
