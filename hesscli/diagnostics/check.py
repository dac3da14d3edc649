"""Is the problem sound, and what will the commands cost?"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hesscli.diagnostics.measurement import Tolerance
from hesscli.diagnostics.plans import plan_ihvp, run_pilot
from hesscli.diagnostics.run import Clock, started
from hesscli.diagnostics.spectral_runs import plan_spectrum
from hesscli.diagnostics.window import WindowOptions
from hesscli.engines.hutchinson.designs import Probes
from hesscli.operators.base import Operator
from hesscli.operators.products import flatten, gradient
from hesscli.problem.problem import Problem
from hesscli.results import CheckResult, Observe, Plan
from hesscli.vocabulary import USUAL_BUDGET, USUAL_CONFIDENCE

_REPEATS = 3


def check(
    problem: Problem,
    *,
    matrix: str = "hessian",
    rtol: float | None = None,
    atol: float | None = None,
    confidence: float = USUAL_CONFIDENCE,
    budget: float | None = USUAL_BUDGET,
    method: str = "auto",
    window: WindowOptions | None = None,
    seed: int = 0,
    mode: str = "auto",
    observe: Observe | None = None,
) -> CheckResult:
    """Preflight, and a plan of time and memory from a few measured products.

    Args:
        problem: model, loss and frozen examples.
        matrix: as for :func:`hesscli.trace`, and so the other arguments.
        rtol: relative tolerance that is planned for; default each command's own.
        atol: absolute tolerance that is planned for.
        confidence: of the planned interval.
        budget: seconds that the planned commands would be given.
        method: as for :func:`hesscli.trace`.
        window: that ``ihvp`` would be given.
        seed: of the pilot's probes.
        mode: autodiff mode.
        observe: told of the phases.

    Raises:
        UnsoundError: the problem's curvature would mean nothing.
        KeyboardInterrupt: the observer wanted no more.
    """
    clock = Clock(None, observe)
    with started(problem, matrix, mode, clock) as run:
        measured = _measure(run.operator)
        pilot = run_pilot(run, method, seed)
    miss = 1 - confidence
    commands = (
        pilot.plan("trace", Tolerance(_usual(rtol, atol, 0.05), atol), miss, budget),
        pilot.plan("diag", Tolerance(_usual(rtol, atol, 0.1), atol), miss, budget),
        plan_spectrum(run.operator, measured[1], budget),
        plan_ihvp(run.operator, window or WindowOptions(), *measured[:2], budget),
    )
    gradient_seconds, product_seconds, product_bytes = measured
    return CheckResult(
        preflight=run.flight,
        plan=Plan(
            gradient_seconds=gradient_seconds,
            product_seconds=product_seconds,
            product_bytes=product_bytes,
            parameter_bytes=problem.parameters.size * problem.dtype.itemsize,
            kept_bytes=problem.data.nbytes,
            commands=commands,
        ),
        **run.header(),
    )


def _usual(rtol: float | None, atol: float | None, usual: float) -> float | None:
    return usual if rtol is None and atol is None else rtol


def _measure(operator: Operator) -> tuple[float, float, int]:
    """Seconds of a full-data gradient and product, and the bytes that a product keeps.

    One batch is timed and scaled to all: its graph is shared by the block's probes. Forward mode
    does not let its memory be watched: it carries what a gradient keeps once more for each probe.
    """
    problem = operator.problem
    batch = problem.batch(problem.indices[0])
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

    watched, times = (one_block, 1)
    if operator.mode == "forward-over-reverse":
        watched, times = one_gradient, 1 + len(block)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        watched()
    one_gradient()
    return (
        scale * _seconds(one_gradient, problem.device),
        scale * _seconds(one_block, problem.device) / len(block),
        times * sum(kept.values()) + 2 * block.nbytes,
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
