"""Is the problem sound, and what will the commands cost?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from scipy.special import ndtri

import hesscli
from hesscli.diagnostics.clock import Clock
from hesscli.diagnostics.pilot import Pilot, run_pilot
from hesscli.diagnostics.surroundings import environment, peak_bytes
from hesscli.diagnostics.trace import PROOF_GRADIENTS, working_dtype
from hesscli.engines.hutchinson.probes import Probes
from hesscli.engines.stopping import Tolerance, first_look, miss_probability
from hesscli.operators.base import Operator
from hesscli.operators.matrices import matrix_named
from hesscli.operators.preflight import preflight
from hesscli.operators.products import flatten, gradient
from hesscli.problem.problem import Problem
from hesscli.results import CheckResult, Observe, Plan, PlannedCommand

_REPEATS = 3


def check(
    problem: Problem,
    *,
    matrix: str = "hessian",
    rtol: float | None = 0.05,
    atol: float | None = None,
    confidence: float = 0.95,
    budget: float | None = 600.0,
    seed: int = 0,
    mode: str = "auto",
    observe: Observe | None = None,
) -> CheckResult:
    """Preflight, and a plan of time and memory from a few measured products.

    Args:
        problem: model, loss and frozen examples.
        matrix: as for :func:`hesscli.trace`, and so the other arguments.
        rtol: relative tolerance that is planned for.
        atol: absolute tolerance that is planned for.
        confidence: of the planned interval.
        budget: seconds that the planned commands would be given.
        seed: of the pilot's probes.
        mode: autodiff mode.
        observe: told of the phases.

    Raises:
        UnsoundError: the problem's curvature would mean nothing.
        KeyboardInterrupt: the observer wanted no more.
    """
    clock = Clock(None, observe)
    build = matrix_named(matrix)
    problem.prove(observe)
    clock.tell("preflight")
    flight = preflight(problem, build, mode)
    with problem.in_dtype(working_dtype(problem, flight)):
        operator = build(problem, mode=flight.mode)
        gradient_seconds, product_seconds, product_bytes = _measure(operator)
        pilot = run_pilot(
            operator,
            seed=seed,
            on_step=lambda: clock.tell("pilot", done=operator.meter.products),
        )
    planned = _plan_trace(
        operator, pilot, Tolerance(rtol, atol), 1 - confidence, budget, product_seconds
    )
    return CheckResult(
        problem=problem.report(matrix),
        preflight=flight,
        plan=Plan(
            gradient_seconds=gradient_seconds,
            product_seconds=product_seconds,
            product_bytes=product_bytes,
            parameter_bytes=problem.parameters.size * problem.dtype.itemsize,
            kept_bytes=problem.data.nbytes,
            commands=(planned,),
        ),
        environment=environment(problem.device),
        hesscli_version=hesscli.__version__,
        warnings=(*problem.warnings, *problem.prove().warnings),
    )


def _measure(operator: Operator) -> tuple[float, float, int]:
    """Seconds of a full-data gradient and product, and the bytes that a product keeps.

    One batch is timed and scaled to all: its graph is shared by the block's probes.
    """
    problem = operator.problem
    batch = problem.batch(next(i for i, mass in enumerate(problem.masses) if mass > 0))
    scale = problem.data.count / batch.count
    block = Probes(operator, 0, "fresh", "rademacher").block(batch.index, 0, 4)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def one_gradient() -> None:
        flatten(gradient(problem.evaluate(batch.data), operator.parameters.tensors))

    def one_block() -> None:
        with problem.forward_context():
            operator.live(batch)(block)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        one_block()
    one_gradient()
    return (
        scale * _seconds(one_gradient, problem.device),
        scale * _seconds(one_block, problem.device) / len(block),
        sum(kept.values()) + 2 * block.nbytes,
    )


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Median time of a few runs."""
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[_REPEATS // 2]


def _plan_trace(
    operator: Operator,
    pilot: Pilot,
    tolerance: Tolerance,
    miss: float,
    budget: float | None,
    product_seconds: float,
) -> PlannedCommand:
    """The look at which the pilot's variance would meet the tolerance."""
    problem = operator.problem
    wanted = tolerance.half_width(pilot.estimate)
    probes, look = first_look("fresh", problem.num_batches), 1
    while wanted and _normal_half_width(pilot, probes, miss, look) > wanted and look < 40:
        probes, look = 2 * probes, look + 1
    graphs = look * operator.cost[0]
    gradients = PROOF_GRADIENTS + graphs + probes * operator.cost[1]
    seconds = product_seconds * probes
    note = f"± {wanted:.3g} expected at look {look}"
    if budget is not None and seconds > budget:
        note += f"; beyond --budget {budget:.0f}s, which ends it at its result so far"
    return PlannedCommand(
        command="trace",
        products=float(probes),
        gradients=gradients,
        seconds=seconds,
        peak_bytes=peak_bytes(problem.device),
        note=note,
    )


def _normal_half_width(pilot: Pilot, probes: int, miss: float, look: int) -> float:
    quantile = float(ndtri(1 - miss_probability(miss, look) / 2))
    return quantile * math.sqrt(pilot.variance / probes)
