"""How large is each entry of the diagonal, how are a layer's spread, and do blocks keep that?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import hesscli
from hesscli.diagnostics.clock import Clock
from hesscli.diagnostics.estimation import Estimation, Standing
from hesscli.diagnostics.findings import Faced, Found
from hesscli.diagnostics.method import Draw, choose
from hesscli.diagnostics.opening import opened
from hesscli.diagnostics.reporting import (
    cost,
    method_report,
    rounding_of,
    total,
    warnings,
)
from hesscli.diagnostics.surroundings import environment
from hesscli.engines.entries import Entries, Part
from hesscli.engines.estimator import Estimator, Reading
from hesscli.engines.hutchinson.blocks import BlockRule
from hesscli.engines.hutchinson.engine import Hutchinson
from hesscli.engines.stopping import Tolerance
from hesscli.errors import UsageError
from hesscli.operators.base import Operator
from hesscli.problem.problem import Problem
from hesscli.results import Cost, DiagonalRun, MethodReport, Observe


def diagonal(
    problem: Problem,
    *,
    matrix: str = "hessian",
    rtol: float | None = 0.1,
    atol: float | None = None,
    confidence: float = 0.95,
    budget: float | None = 600.0,
    probes: int | tuple[int, int] | None = None,
    block: str = "auto",
    method: str = "auto",
    seed: int = 0,
    mode: str = "auto",
    observe: Observe | None = None,
) -> DiagonalRun:
    """Diagonal of a curvature matrix, exact where that is possible, with an error bar an entry.

    Args:
        problem: model, loss and frozen examples.
        matrix: ``hessian``, ``ggn``, ``fisher`` or ``empirical-fisher``.
        rtol: wanted ‖error‖ / ‖diagonal‖, which holds with probability ``confidence``.
        atol: wanted ‖error‖; the wider of the two counts.
        confidence: of the intervals, looks included.
        budget: seconds; None for no limit.
        probes: a fixed number ``N`` instead of a tolerance, or probes ``(a, b)`` of the stream.
            Where the diagonal is exact, they only show the noise that AdaHessian would face.
        block: AdaHessian's block averaging: ``auto``, ``row``, ``kernel``, ``channel``,
            ``head:N`` or ``N`` consecutive entries.
        method: as for :func:`hesscli.trace`.
        seed: of the probes.
        mode: autodiff mode; ``auto`` takes the cheapest that passes the preflight.
        observe: told how far the run is; returning True ends it at its result so far.

    Raises:
        UsageError: fewer than two probes, or a matrix, method or block that there is not.
        UnsoundError: the problem's curvature would mean nothing.
        KeyboardInterrupt: stopped before there was any estimate.
    """
    first, last = probes if isinstance(probes, tuple) else (0, probes)
    fixed = None if last is None else last - first
    if fixed is not None and fixed < 2:
        raise UsageError("an error bar needs two probes", f"{fixed} probes", "--probes 2 or more")
    rule = BlockRule.parse(block)
    _require_heads(rule, problem)
    clock, tolerance = Clock(budget, observe), Tolerance(rtol, atol)
    with opened(problem, matrix, mode, clock) as opening:
        entries = Entries(problem.parameters, problem.device)
        draw = Draw(seed, first=first, entries=entries)
        choice = choose(opening.operator, method, draw)
        run = Estimation(
            choice.estimator,
            partial(_standing, tolerance=tolerance),
            1 - confidence,
            rounding_of(problem, opening.flight, choice),
            clock,
            choice.rethink,
        )
        outcome = run.to_tolerance() if fixed is None else run.fixed(fixed)
        faced = None
        if fixed is not None and outcome.status == "exact":
            faced = _probe_noise(opening.operator, replace(draw, entries=None), fixed, clock)
    found = Found(problem, outcome, faced, rule, confidence)
    return DiagonalRun(
        status=outcome.status,
        problem=problem.report(opening.operator.name),
        method=_method(method_report(choice, outcome, draw, opening.flight), faced),
        cost=_cost(cost(problem, choice, outcome, clock), faced),
        trace=total(problem, choice, outcome, confidence),
        diagonal=found.report(),
        layers=tuple(found.layers(tolerance)),
        environment=environment(problem.device),
        hesscli_version=hesscli.__version__,
        warnings=(*problem.warnings, *warnings(problem, opening.flight, outcome, tolerance)),
        entries=found.by_name(found.best.values),
        stderr=found.by_name(found.best.bars()),
    )


def _require_heads(rule: BlockRule, problem: Problem) -> None:
    """Refuse heads that no matrix has, before the long work."""
    rows = [p.tensor.shape[0] for p in problem.parameters if p.tensor.dim() == 2]
    if rule.kind == "head" and all(n % rule.number for n in rows):
        sizes = ", ".join(map(str, sorted(set(rows))[:5])) or "no matrices"
        raise UsageError(
            "heads must divide the rows of some matrix",
            f"head:{rule.number}, and rows of {sizes}",
            "--block row, or the number of an attention layer's heads",
        )


def _standing(estimator: Estimator, reading: Reading, *, tolerance: Tolerance) -> Standing:
    """How far the diagonal's relative error is from the tolerance, both of the norm."""
    fraction = estimator.problem.sampling_fraction or 1.0
    found, random = estimator.diagonal(fraction), estimator.diagonal(1.0)
    error, drawn = found.relative_error(), random.relative_error()
    norm = found.squared_norm().estimate ** 0.5
    wanted = max(tolerance.relative or 0.0, (tolerance.absolute or 0.0) / norm if norm else 0.0)
    return Standing(
        error=found.relative_error_bound(1 - reading.miss),
        wanted=wanted,
        floor=max(error**2 - drawn**2, 0.0) ** 0.5,
        share=min((drawn / error) ** 2, 1.0) if error else 0.0,
    )


def _probe_noise(operator: Operator, draw: Draw, probes: int, clock: Clock) -> Faced | None:
    """Plain probes of the whole matrix; None where the run was stopped before they were done."""
    problem = operator.problem
    entries = Entries(problem.parameters, problem.device)
    stream = entries.stream(problem.parameters, exact=False)
    engine = Hutchinson(operator, seed=draw.seed, first_probe=draw.first, stream=stream)
    try:
        for _ in engine.extend(probes):
            clock.tell("probing", done=operator.meter.products, total=float(probes))
            if clock.out_of_time:
                return None
    except KeyboardInterrupt:
        return None
    noise = entries.diagonal([Part(stream, 1.0, probes)], 0.0).noise
    assert noise is not None  # probes have some
    return Faced(engine, noise)


def _method(report: MethodReport, faced: Faced | None) -> MethodReport:
    if faced is None:
        return report
    note = f"{report.note}; probes only for the noise that AdaHessian faces"
    return replace(report, num_probes=faced.engine.count, note=note)


def _cost(spent: Cost, faced: Faced | None) -> Cost:
    if faced is None:
        return spent
    meter = faced.engine.operator.meter
    return replace(
        spent,
        products=spent.products + meter.products,
        gradients=spent.gradients + meter.gradients,
    )
