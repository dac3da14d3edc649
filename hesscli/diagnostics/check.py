"""Is the problem sound, and what will the commands cost?"""

from __future__ import annotations

from dataclasses import replace
from pkgutil import resolve_name

from hesscli import world
from hesscli.commands import COMMANDS
from hesscli.diagnostics.arguments import as_asked
from hesscli.diagnostics.plans import Asked, Pilot, measured_pace, planned
from hesscli.diagnostics.run import Clock, started
from hesscli.diagnostics.symmetry import check_of_symmetry
from hesscli.diagnostics.window import WindowOptions
from hesscli.problem.problem import Problem
from hesscli.results import CheckResult, Observe, Plan
from hesscli.vocabulary import USUAL_BUDGET, USUAL_CONFIDENCE


@as_asked
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
    symmetry: bool = False,
    observe: Observe | None = None,
) -> CheckResult:
    """Preflight, and a plan of time and memory from a few measured products.

    Args:
        problem: model, loss and frozen examples.
        matrix: as for :func:`hesscli.trace`, and so the other arguments.
        rtol: relative tolerance that is planned for; default each command's own.
        atol: absolute tolerance that is planned for.
        confidence: of the planned interval.
        budget: seconds that the planned commands would be given, and that this may take.
        method: as for :func:`hesscli.trace`.
        window: that ``ihvp`` would be given.
        seed: of the pilot's probes.
        mode: autodiff mode.
        symmetry: whether products are to be tried on null directions of the model's own symmetries.
        observe: told of the phases.

    Raises:
        UnsoundError: the problem's curvature would mean nothing.
        KeyboardInterrupt: the observer wanted no more.
    """
    asked = Asked(
        rtol=rtol,
        atol=atol,
        confidence=confidence,
        method=method,
        window=window or WindowOptions(),
        seed=seed,
    )
    with started(problem, matrix, mode, Clock(budget, observe)) as run:
        flight = run.flight
        if symmetry:
            flight = replace(flight, checks=(*flight.checks, check_of_symmetry(run, seed)))
        pace, product_bytes = measured_pace(run.operator)
        pilot = Pilot(run, asked, pace)
        commands = tuple(
            planned(name, resolve_name(command.plan), pilot)
            for name, command in COMMANDS.items()
            if command.plan
        )
    return CheckResult(
        preflight=flight,
        plan=Plan(
            gradient_seconds=pace.gradient.seconds,
            product_seconds=pace.products(2, 1).seconds / 2,
            product_bytes=product_bytes,
            parameter_bytes=problem.parameters.size * problem.dtype.itemsize,
            kept_bytes=problem.data.nbytes,
            ranks=world.launched(),
            commands=commands,
        ),
        **run.header(),
    )
